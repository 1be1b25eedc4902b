# SPDX-License-Identifier: Apache-2.0
"""Weights ready to decode, with what stands beside them: tokenizer, published options."""

import json
import pathlib
from typing import Any

from gptjax.configs import base, errors
from gptjax.models import heads, pretrained, quantize, sources
from gptjax.models import weights as weights_lib
from gptjax.runtime import mesh as mesh_lib
from gptjax.sampling import decode, speculative, texts
from gptjax.text import tokenizer as tokenizer_lib

_CONFIG = 'generation_config.json'


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

    pad_token_id may be among them; what is not an option of ours is left out.
    """
    known = {*base.get_config().decode, 'pad_token_id'}
    found = {}
    file = source.path / _CONFIG
    if file.is_file():
        try:
            stored = json.loads(file.read_text(encoding='utf-8'))
            found = {k: v for k, v in stored.items() if k in known and v is not None}
        except (ValueError, AttributeError) as e:
            raise errors.InputError(f'{file} is no JSON object: {e}; mend or remove it') from e
    if 'eos_token_id' not in found:
        end = source.token_ids.get('eos_token_id')
        if end is None and tokenizer is not None and tokenizer.end_of_text >= 0:
            end = tokenizer.end_of_text
        found |= {} if end is None else {'eos_token_id': end}
    return found
