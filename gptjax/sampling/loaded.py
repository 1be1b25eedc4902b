# SPDX-License-Identifier: Apache-2.0
"""Weights ready to decode, with what stands beside them: tokenizer, published options."""

import logging
import pathlib
from collections.abc import Mapping
from typing import Any

from gptjax.configs import base, errors
from gptjax.models import heads, pretrained, quantize, sources
from gptjax.models import weights as weights_lib
from gptjax.models.published import beside
from gptjax.runtime import mesh as mesh_lib
from gptjax.sampling import decode, options, speculative, texts
from gptjax.text import tokenizer as tokenizer_lib

# Of generation_config.json: what changes no text, or only how transformers computes it.
_IDLE = ('_from_model_config', 'transformers_version', 'bos_token_id', 'decoder_start_token_id')
_IDLE += ('use_cache', 'low_memory', 'disable_compile', 'max_time', 'prefill_chunk_size')
_IDLE += ('generation_kwargs', 'num_assistant_tokens', 'num_assistant_tokens_schedule')
_IDLE += ('assistant_confidence_threshold', 'assistant_lookbehind', 'target_lookbehind')
_IDLE_BEGINNINGS = ('output_', 'return_', 'cache_', 'compile_', 'is_assistant', 'assistant_')
_log = logging.getLogger(__name__)


class Loaded:
    """Weights ready to decode, with what stands beside them."""

    def __init__(
        self,
        decoder: decode.Decoder,
        params: Any,
        tokenizer: Any,
        defaults: dict[str, Any],
        raw: bool = False,
    ) -> None:
        """Args: raw: the parameters lie as they are stored; prepare() lays them for decoding."""
        self.decoder, self.params, self.tokenizer = decoder, params, tokenizer
        self.defaults = defaults  # generation options that were published with the weights
        self._raw = raw
        self.stops = texts.Stops(tokenizer) if tokenizer else None

    def prepare(self) -> None:
        """Lays raw parameters out as decoding is fastest; they are not held twice."""
        if self._raw:
            described = heads.describe(self.decoder.model)
            self.params = quantize.for_decoding(self.params, described, consume=True)
            self._raw = False

    def asked(self, given: Mapping[str, Any]) -> options.Options:
        """Options of a request: what is given, else published with the weights, else the defaults.

        Raises:
          UsageError: as options.make().
        """
        published = {k: v for k, v in self.defaults.items() if k != 'pad_token_id'}
        given = {k: v for k, v in given.items() if k != 'eos_token_id' or v not in ((), [])}
        if any(given.get(name) for name in ('max_length', 'max_new_tokens', 'max_tokens')):
            published.pop('max_length', None)
        return options.make(options.plain(base.get_config().decode.to_dict(), published), given)

    def job(self, prompt: Any, given: Mapping[str, Any]) -> tuple[list[int], options.Options]:
        """A prompt's ids, and what is asked of it.

        A length that nobody asked for is cut to what the context has room for.

        Args:
          prompt: a text, or token ids.

        Raises:
          InputError: there is no tokenizer for a text. UsageError: as options.make().
        """
        asked = self.asked(given)
        ids = self._ids(prompt, not asked.split_special_tokens)
        named = {*self.defaults, *(name for name, value in given.items() if value is not None)}
        most = self.decoder.most_tokens
        if most is not None and named.isdisjoint(('max_new_tokens', 'max_length', 'max_tokens')):
            room = most - len(ids)
            if 0 < room < asked.max_new_tokens and asked.beyond_context == 'error':
                asked = self.asked({**given, 'max_new_tokens': room})
        return ids, asked

    def _ids(self, prompt: Any, names: bool) -> list[int]:
        if not isinstance(prompt, str):
            return [int(i) for i in prompt]
        if self.tokenizer is None:
            raise errors.InputError('these weights have no tokenizer; give prompts as token ids')
        return texts.prompt_ids(self.tokenizer, prompt, allow_special=names)


def load(
    path: str | pathlib.Path | weights_lib.Source,
    dtype: str | None = None,
    weights: quantize.Weights = '',
    cache_dtype: str = '',
    mesh: mesh_lib.Mesh | None = None,
    progress: Any = lambda parameters: None,
    raw: bool = False,
) -> Loaded:
    """Weights in the form that decodes fastest, and generation_config.json.

    Args:
      raw: leave them as they are stored, which reads fastest; Loaded.prepare() is for later.
    """
    source = path if isinstance(path, weights_lib.Source) else sources.open(path)
    shardings = None if mesh is None else mesh.shardings
    model, params, tokenizer = pretrained.load(source, dtype, shardings, progress)
    n_vocab = model.config.n_vocab
    if tokenizer is not None:
        n_vocab = min(n_vocab, tokenizer.n_vocab)
    decoder = decode.Decoder(model, n_vocab, cache_dtype)
    if not raw:
        params = quantize.for_decoding(params, heads.describe(model), weights, consume=True)
    return Loaded(decoder, params, tokenizer, published(source, tokenizer), raw)


def draft(
    path: str | pathlib.Path | weights_lib.Source | None,
    number: int,
    dtype: str | None = None,
    mesh: mesh_lib.Mesh | None = None,
) -> speculative.Draft | None:
    """A small model that proposes `number` tokens at a time; of no path none."""
    if not path:
        return None
    found = load(path, dtype, mesh=mesh)
    return speculative.Draft(found.decoder, found.params, number)


def published(
    source: weights_lib.Source, tokenizer: tokenizer_lib.Tokenizer | None
) -> dict[str, Any]:
    """Generation options beside weights: generation_config.json, else the end token they name.

    pad_token_id may be among them; what asks for more than there is here is said, and left out.
    """
    known = {*base.get_config().decode, 'pad_token_id'}
    try:
        stored = beside.fields(source.beside, beside.GENERATION)
        stored = {name: value for name, value in stored.items() if value is not None}
        ends = beside.fields(source.beside, beside.CONFIG).get('eos_token_id')
    except errors.InputError as e:
        raise errors.InputError(f'{source.path}: {e}') from e
    found = {name: value for name, value in stored.items() if name in known}
    unknown = [
        name
        for name, value in stored.items()
        if name not in {*known, *_IDLE} and not name.startswith(_IDLE_BEGINNINGS) and value
    ]
    if unknown:
        said = ', '.join(f'{name} = {stored[name]!r}' for name in unknown)
        _log.warning(
            '%s of %s asks for what is not built here, left out: %s',
            beside.GENERATION,
            source.path,
            said,
        )
    if ends is None and tokenizer is not None and tokenizer.end_of_text >= 0:
        ends = tokenizer.end_of_text
    return found if ends is None else {'eos_token_id': ends, **found}
