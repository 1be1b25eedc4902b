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

# Of generation_config.json: what changes no text, or only how transformers computes it.
_IDLE = ('_from_model_config', 'transformers_version', 'bos_token_id', 'decoder_start_token_id')
_IDLE += ('use_cache', 'low_memory', 'disable_compile', 'prefill_chunk_size', 'generation_kwargs')
_IDLE += ('num_assistant_tokens', 'num_assistant_tokens_schedule', 'target_lookbehind')
_IDLE_BEGINNINGS = ('output_', 'return_', 'cache_', 'compile_', 'is_assistant', 'assistant_')
# Options that transformers does not know: in its file they are somebody else's.
_OURS = ('presence_penalty', 'frequency_penalty', 'logit_bias', 'logprobs', 'echo', 'seed')
_OURS += ('beyond_context', 'split_special_tokens')
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
        source: str = '',
    ) -> None:
        """Use load().

        Args:
          defaults: generation options that were published with the weights.
          raw: the parameters lie as they are stored; prepare() lays them for decoding.
          source: where the weights are, for errors.
        """
        self._source = source
        self.decoder, self.params, self.tokenizer = decoder, params, tokenizer
        self.defaults = defaults
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
          UsageError: as options.make(). InputError: what is published cannot be.
        """
        return resolve(self._source, self.defaults, given)

    def job(
        self, prompt: Any, given: Mapping[str, Any], draft: speculative.Draft | None = None
    ) -> tuple[list[int], options.Options]:
        """A prompt's ids, and what is asked of it.

        A length that the user did not ask for is cut to what the context has room for.

        Args:
          prompt: a text, or token ids.
          draft: what will propose tokens, which need room, too.

        Raises:
          InputError: there is no tokenizer for a text. UsageError: as options.make().
        """
        asked = self.asked(given)
        ids = self._ids(prompt, not asked.split_special_tokens)
        lengths = ('max_new_tokens', 'max_length', 'max_tokens')
        decoders = [self.decoder, draft.decoder] if draft else [self.decoder]
        most = [one.most_tokens for one in decoders if one.most_tokens is not None]
        proposed = asked.prompt_lookup_num_tokens or (draft.number if draft else 0)
        if most and asked.beyond_context == 'error' and not any(map(given.get, lengths)):
            room = min(most) - proposed - len(ids)
            if 0 < room < asked.limit(len(ids)) - len(ids):
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
    defaults = published(source)
    if 'eos_token_id' not in defaults and tokenizer is not None and tokenizer.end_of_text >= 0:
        defaults['eos_token_id'] = tokenizer.end_of_text
    _tell_unknown(source)
    return Loaded(decoder, params, tokenizer, defaults, raw, str(source.path))


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


def resolve(source: str, published: Mapping[str, Any], given: Mapping[str, Any]) -> options.Options:
    """Options from what is given, else published with weights, else the defaults.

    Args:
      source: where the weights are, for errors.

    Raises:
      UsageError: as options.make(). InputError: what is published cannot be, whatever is given.
    """
    usual = base.get_config().decode.to_dict()
    known = {k: v for k, v in published.items() if k != 'pad_token_id'}
    given = {k: v for k, v in given.items() if k != 'eos_token_id' or v not in ((), [])}
    try:
        below = dict(known)
        if any(given.get(name) for name in ('max_length', 'max_new_tokens', 'max_tokens')):
            below.pop('max_length', None)
        return options.make(options.plain(usual, below), given)
    except errors.UsageError:
        try:
            options.make(options.plain(usual, known), {})
        except errors.UsageError as e:
            raise errors.InputError(f'{source}, {beside.GENERATION}: {e}; mend or remove it') from e
        raise


def published(source: weights_lib.Source) -> dict[str, Any]:
    """Generation options beside weights: a run's own, generation_config.json, the end token's ids.

    pad_token_id may be among them.
    """
    known = {*base.get_config().decode, 'pad_token_id'}.difference(_OURS)
    stored, ends = _stored(source)
    found = {name: value for name, value in stored.items() if name in known}
    return ({} if ends is None else {'eos_token_id': ends}) | found | dict(source.decoding)


def _stored(source: weights_lib.Source) -> tuple[dict[str, Any], Any]:
    """generation_config.json without what it leaves open, and config.json's eos_token_id."""
    try:
        stored = beside.fields(source.beside, beside.GENERATION)
        ends = beside.fields(source.beside, beside.CONFIG).get('eos_token_id')
    except errors.InputError as e:
        raise errors.InputError(f'{source.path}: {e}') from e
    return {name: value for name, value in stored.items() if value is not None}, ends


def _tell_unknown(source: weights_lib.Source) -> None:
    """Names what generation_config.json asks for and is not built."""
    known = {*base.get_config().decode, 'pad_token_id', *_IDLE}.difference(_OURS)
    unknown = [
        f'{name} = {value!r}'
        for name, value in _stored(source)[0].items()
        if name not in known and not name.startswith(_IDLE_BEGINNINGS) and value and value != 1
    ]
    if unknown:
        _log.warning(
            '%s of %s asks for what is not built here, left out: %s',
            beside.GENERATION,
            source.path,
            ', '.join(unknown),
        )
