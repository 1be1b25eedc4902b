# SPDX-License-Identifier: Apache-2.0
"""The n-gram baseline behind the interface of the networks: its parameters are tables.

Order k's table holds the k-grams, those of one context side by side: the context's row in the table
below says where they begin. A row has its log probability given the context and, as a context, the
log of what is left for tokens never seen after it. models/kneser_ney.py estimates them.

The hidden state of a place is the rows of its contexts: where the last k tokens stand in order k's
table, -1 where they were never seen.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, ArrayLike, Float, Int

from gptjax.configs import errors
from gptjax.models import axes

Tables = Mapping[str, Mapping[str, Any]]
_ROWS = 1 << 14  # n-grams written into distributions at once


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape of an n-gram model; the fields are explained in configs/sections/models.py."""

    family: Literal['ngram']
    order: int
    n_ctx: int
    n_vocab: int
    entries: tuple[int, ...]

    def __post_init__(self) -> None:
        errors.require_positive(self, 'order', 'n_ctx', 'n_vocab')
        errors.require_numbers(vars(self), 2**31 - 1)
        errors.require_between(self, 1, 64, 'order')
        errors.require_choice(self, 'family', ('ngram',))
        errors.require(
            len(self.entries) in (0, self.order),
            f'entries must be empty or one number an order, got {self.entries}',
        )

    def network(self) -> 'NGram':
        return NGram(self)

    most_tokens = None  # any number can be read, one after the other
    has_slots = False

    def empty_cache(self, batch: int, slots: int, dtype: str = '') -> Int[Array, 'B C']:
        """The last order - 1 tokens; -1 before the text."""
        del slots, dtype
        return jnp.full((batch, self.order - 1), -1, jnp.int32)

    def rate_scale(self, about: axes.Parameter) -> float:
        del about
        return 1.0

    def kernels(self, windows: int) -> dict[str, str]:
        del windows
        return {}

    def flops_per_token(self, n_params: int) -> float:
        del n_params
        return 0.0  # counting multiplies nothing


class NGram(nn.Module):
    """Tokens -> rows of their contexts -> log probabilities of the next one."""

    config: Config

    def setup(self) -> None:
        cfg = self.config
        sizes = cfg.entries or (cfg.n_vocab,) + (0,) * (cfg.order - 1)
        self.tables = {
            f'order_{k}': {
                name: self.param(f'order_{k}_{name}', axes.vector(_zeros, 'layers'), shape, dtype)
                for name, shape, dtype in _columns(size, k < cfg.order)
            }
            for k, size in enumerate(sizes, 1)
        }

    def __call__(
        self,
        tokens_BxL: Int[ArrayLike, 'B L'],
        positions_BxL: Int[ArrayLike, '#B L'] | None = None,
        cache: Int[Array, 'B C'] | None = None,
    ) -> tuple[Int[Array, 'B L C'], Int[Array, 'B C'] | None]:
        """The rows of each place's contexts, of 1 to C tokens.

        Args:
          tokens_BxL: token ids.
          positions_BxL: -1 marks padding: a context ends there.
          cache: the tokens before these; None = none.
        """
        tokens_BxL = jnp.asarray(tokens_BxL, jnp.int32)
        if positions_BxL is not None:
            tokens_BxL = jnp.where(jnp.asarray(positions_BxL) < 0, -1, tokens_BxL)
        before_BxC = self.config.empty_cache(len(tokens_BxL), 0) if cache is None else cache
        joined_BxM = jnp.concatenate([before_BxC, tokens_BxL], axis=1)
        hidden_BxLxC = contexts(self.tables, joined_BxM)
        first = joined_BxM.shape[1] - (self.config.order - 1)
        order_BxM = jnp.argsort(joined_BxM >= 0, axis=1, stable=True)  # padding before tokens
        after_BxC = jnp.take_along_axis(joined_BxM, order_BxM, axis=1)[:, first:]
        return hidden_BxLxC, None if cache is None else after_BxC

    def unembed(self, hidden_BxLxC: Int[Array, 'B L C']) -> Float[Array, 'B L V']:
        """float32 log probabilities."""
        return log_probs(self.tables, hidden_BxLxC)

    def nats(
        self,
        hidden_BxLxC: jax.Array,
        targets_BxL: ArrayLike,
        weights_BxL: ArrayLike,
        z_loss: float,
    ) -> tuple[Float[Array, ''], Float[Array, '']]:
        """The weighted sum of -log p(target); probabilities of counts need no z-loss."""
        del z_loss
        chosen_BxL = target_log_probs(self.tables, hidden_BxLxC, targets_BxL)
        return -jnp.sum(chosen_BxL * weights_BxL), jnp.zeros(())


def tables_of(params: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The tables of a LanguageModel's parameters, order 1 first."""
    flat = params['network']
    order = max(int(name.split('_')[1]) for name in flat)
    starts = {f'order_{k}': f'order_{k}_' for k in range(1, order + 1)}
    return {
        k: {name.removeprefix(start): x for name, x in flat.items() if name.startswith(start)}
        for k, start in starts.items()
    }


def params_of(tables: Tables) -> dict:
    """Estimated tables as the parameters of a LanguageModel."""
    flat = {f'{k}_{name}': x for k, table in tables.items() for name, x in table.items()}
    return {'network': flat}


def contexts(tables: Tables, tokens_BxM: Int[Array, 'B M']) -> Int[Array, 'B L C']:
    """The rows of the contexts that end at each token but the first C = order - 1.

    Args:
      tokens_BxM: token ids; -1 ends a context.
    """
    n_contexts = len(tables) - 1
    found, row_BxM = [], tokens_BxM
    for k in range(1, n_contexts + 1):
        if k > 1:
            row_BxM = _child(tables, k, row_BxM[:, :-1], tokens_BxM[:, 1:])
            row_BxM = jnp.pad(row_BxM, ((0, 0), (1, 0)), constant_values=-1)
        found.append(row_BxM[:, n_contexts:])
    return jnp.stack(found, -1) if found else jnp.zeros((*tokens_BxM.shape, 0), jnp.int32)


def target_log_probs(
    tables: Tables, contexts_BxLxC: Int[Array, 'B L C'], targets_BxL: Int[ArrayLike, 'B L']
) -> Float[Array, 'B L']:
    """The log probability of one token after each place."""
    targets_BxL = jnp.asarray(targets_BxL)
    found_BxL = tables['order_1']['log_prob'][targets_BxL]
    for k in range(1, len(tables)):
        row_BxL, context = contexts_BxLxC[..., k - 1], tables[f'order_{k}']
        if not context['log_backoff'].size:
            break  # nothing was ever seen of this length
        left_BxL = context['log_backoff'][jnp.maximum(row_BxL, 0)]
        found_BxL += jnp.where(row_BxL < 0, 0, left_BxL)
        child_BxL = _child(tables, k + 1, row_BxL, targets_BxL)
        if tables[f'order_{k + 1}']['log_prob'].size:
            seen_BxL = tables[f'order_{k + 1}']['log_prob'][jnp.maximum(child_BxL, 0)]
            found_BxL = jnp.where(child_BxL < 0, found_BxL, seen_BxL)
    return found_BxL


def log_probs(tables: Tables, contexts_BxLxC: Int[Array, 'B L C']) -> Float[Array, 'B L V']:
    """The log probabilities of every token after each place."""
    *shape, n_contexts = contexts_BxLxC.shape
    contexts_PxC = contexts_BxLxC.reshape(math.prod(shape), n_contexts)
    unigram_V = tables['order_1']['log_prob']
    found_PxV = jnp.broadcast_to(unigram_V, (len(contexts_PxC), unigram_V.size))
    for k in range(1, len(tables)):
        row_P = contexts_PxC[:, k - 1]
        context, higher = tables[f'order_{k}'], tables[f'order_{k + 1}']
        if not context['log_backoff'].size:
            break  # nothing was ever seen of this length
        left_P = context['log_backoff'][jnp.maximum(row_P, 0)]
        found_PxV += jnp.where(row_P < 0, 0, left_P)[:, None]
        if higher['token'].size:
            found_PxV = _with_children(found_PxV, *_children(context, row_P), higher)
    return found_PxV.reshape(*shape, -1)


def _columns(size: int, is_context: bool) -> list[tuple]:
    found = [('token', (size,), jnp.int32), ('log_prob', (size,), jnp.float32)]
    if is_context:
        found += [('log_backoff', (size,), jnp.float32), ('first', (size + 1,), jnp.int32)]
    return found


def _zeros(rng: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    del rng
    return jnp.zeros(shape, dtype)


def _children(context: Mapping[str, Any], row: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where the n-grams that extend contexts begin and end; nowhere, where those are -1."""
    first = context['first'][jnp.maximum(row, 0)]
    return first, jnp.where(row < 0, first, context['first'][jnp.maximum(row, 0) + 1])


def _child(tables: Tables, k: int, row: jax.Array, token: jax.Array) -> jax.Array:
    """The k-grams of (k-1)-grams and one more token; -1 where there is none. Binary search."""
    words = tables[f'order_{k}']['token']
    if not words.size:
        return jnp.full(row.shape, -1, jnp.int32)
    first, end = _children(tables[f'order_{k - 1}'], row)

    def halved(_: Any, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        less = (low < high) & (words[middle] < token)
        return jnp.where(less, middle + 1, low), jnp.where(less, high, middle)

    steps = tables['order_1']['token'].size.bit_length()  # a context has so many children at most
    low, _ = jax.lax.fori_loop(0, steps, halved, (first, end))
    return jnp.where((low < end) & (words[low] == token), low, -1)


def _with_children(
    found_PxV: jax.Array, first_P: jax.Array, end_P: jax.Array, higher: Mapping[str, Any]
) -> jax.Array:
    """Distributions with the tokens that were seen behind their contexts put in."""
    ends_P = jnp.cumsum(end_P - first_P)
    if not ends_P.size:
        return found_PxV

    def put(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        done, found_PxV = state
        number = done + jnp.arange(_ROWS)
        place = jnp.searchsorted(ends_P, number, side='right')  # beyond the last: not put
        row = end_P[place] - ends_P[place] + number
        chosen = (place, higher['token'][row])
        return done + _ROWS, found_PxV.at[chosen].set(higher['log_prob'][row], mode='drop')

    start = (jnp.int32(0), found_PxV)
    return jax.lax.while_loop(lambda state: state[0] < ends_P[-1], put, start)[1]
