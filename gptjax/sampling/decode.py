# SPDX-License-Identifier: Apache-2.0
"""Prefill and decode: continuations of a batch of prompts, one compiled program a shape bucket."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.configs import errors
from gptjax.sampling import processors

_BUCKET = 32  # prompt lengths are rounded up to a multiple of it


@dataclasses.dataclass(frozen=True)
class Config:
    """The decode section of configs/base.py."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    samples: int

    def __post_init__(self) -> None:
        errors.require_positive(self, 'max_new_tokens', 'samples')
        errors.require_between(self, 0.0, 1e4, 'temperature')
        errors.require_between(self, 0, 2**31 - 1, 'top_k')
        errors.require(0.0 < self.top_p <= 1.0, f'top_p must be in (0, 1], got {self.top_p}')


class Decoder(NamedTuple):
    """What decoding needs of a model.

    extend: (params, tokens_BxL, positions_BxL, cache) -> (logits_Bx1xV of the last place, cache)
    empty_cache: (rows, slots) -> cache
    n_ctx: the most tokens, prompt and continuation together.
    """

    extend: Callable[..., Any]
    empty_cache: Callable[[int, int], Any]
    n_ctx: int


def generate(
    decoder: Decoder,
    params: Any,
    prompts: Sequence[Sequence[int]],
    config: Config,
    end_of_text: int,
    seed: int,
) -> list[list[int]]:
    """Continuations of token-id prompts, without prompt and end-of-text.

    Prompts of different lengths are padded on the left; padding is invisible to the model. The
    draws of a row depend on (seed, row) only, not on its neighbours.

    Returns:
      prompt 0's `samples` continuations, then prompt 1's, ...

    Raises:
      InputError: a prompt is empty, or prompt and continuation do not fit n_ctx.
    """
    rows = [list(prompt) for prompt in prompts for _ in range(config.samples)]
    longest = max(map(len, rows), default=0)
    if not rows or min(map(len, rows)) == 0:
        raise errors.InputError('a prompt is empty; begin one with end-of-text instead')
    if longest + config.max_new_tokens > decoder.n_ctx:
        raise errors.InputError(
            f'a prompt of {longest} tokens and max_new_tokens = {config.max_new_tokens} do not fit '
            f'n_ctx = {decoder.n_ctx}; shorten the prompt or lower --config.decode.max_new_tokens'
        )
    width = min(-(-longest // _BUCKET) * _BUCKET, decoder.n_ctx)
    tokens_BxP = np.zeros((len(rows), width), np.int32)
    positions_BxP = np.full((len(rows), width), -1, np.int32)
    for i, row in enumerate(rows):
        tokens_BxP[i, width - len(row) :] = row
        positions_BxP[i, width - len(row) :] = range(len(row))
    options = {
        'temperature': np.full(len(rows), config.temperature, np.float32),
        'top_k': np.full(len(rows), config.top_k, np.int32),
        'top_p': np.full(len(rows), config.top_p, np.float32),
    }
    keys_B = jax.random.split(jax.random.key(seed), len(rows))
    new_BxR, length_B = _decode(
        decoder, params, tokens_BxP, positions_BxP, options, keys_B, config.max_new_tokens,
        end_of_text,
    )  # fmt: skip
    found = zip(np.asarray(new_BxR), np.asarray(length_B), strict=True)
    return [new_R[:length].tolist() for new_R, length in found]


@functools.partial(jax.jit, static_argnames=('decoder', 'max_new_tokens'))
def _decode(
    decoder, params, tokens_BxP, positions_BxP, options, keys_B, max_new_tokens, end_of_text
):
    """(tokens_BxR, lengths_B): what came before end-of-text in each row."""
    rows, width = tokens_BxP.shape
    cache = decoder.empty_cache(rows, width + max_new_tokens)
    logits_Bx1xV, cache = decoder.extend(params, tokens_BxP, positions_BxP, cache)

    def choose(logits_Bx1xV, index):
        logits_BxV = processors.temperature(logits_Bx1xV[:, 0], options['temperature'])
        logits_BxV = processors.top_k(logits_BxV, options['top_k'])
        logits_BxV = processors.top_p(logits_BxV, options['top_p'])
        keys = jax.vmap(lambda key: jax.random.fold_in(key, index))(keys_B)
        return jax.vmap(jax.random.categorical)(keys, logits_BxV).astype(jnp.int32)

    def go_on(carry):
        index, _, _, length_B, _ = carry
        return (index < max_new_tokens) & jnp.any(length_B == index)

    def extend(carry):
        index, logits_Bx1xV, out_BxR, length_B, cache = carry
        token_B = choose(logits_Bx1xV, index)
        alive_B = (length_B == index) & (token_B != end_of_text)
        out_BxR = out_BxR.at[:, index].set(jnp.where(alive_B, token_B, 0))
        length_B = length_B + alive_B
        position_Bx1 = positions_BxP[:, -1:] + 1 + index
        logits_Bx1xV, cache = decoder.extend(params, token_B[:, None], position_Bx1, cache)
        return index + 1, logits_Bx1xV, out_BxR, length_B, cache

    start = (
        jnp.zeros((), jnp.int32),
        logits_Bx1xV,
        jnp.zeros((rows, max_new_tokens), jnp.int32),
        jnp.zeros(rows, jnp.int32),
        cache,
    )
    _, _, out_BxR, length_B, _ = jax.lax.while_loop(go_on, extend, start)
    return out_BxR, length_B
