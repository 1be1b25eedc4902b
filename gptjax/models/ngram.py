# SPDX-License-Identifier: Apache-2.0
"""The n-gram baseline behind the interface of the networks: its parameters are tables.

Order k's table holds the k-grams, those of one context side by side: the context's row in the table
below says where they begin. A row has its log probability given the context and, as a context, the
log of what is left for tokens never seen after it. models/kneser_ney.py estimates them.
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, ArrayLike, Float, Int

from gptjax.configs import errors
from gptjax.models import axes
from gptjax.storage import files

Tables = Mapping[str, Mapping[str, Any]]


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
    """Tokens -> log probabilities of the next one; these are the hidden states and the logits."""

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
    ) -> tuple[Float[Array, 'B L V'], Int[Array, 'B C'] | None]:
        """float32 log probabilities, looked up on the host.

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
        shape = (*tokens_BxL.shape, self.config.n_vocab)
        log_probs_BxLxV = jax.pure_callback(
            _host, jax.ShapeDtypeStruct(shape, jnp.float32), self.tables, joined_BxM
        )
        first = joined_BxM.shape[1] - (self.config.order - 1)
        order_BxM = jnp.argsort(joined_BxM >= 0, axis=1, stable=True)  # padding before tokens
        after_BxC = jnp.take_along_axis(joined_BxM, order_BxM, axis=1)[:, first:]
        return log_probs_BxLxV, None if cache is None else after_BxC

    def unembed(self, hidden_BxLxV: Float[Array, 'B L V']) -> Float[Array, 'B L V']:
        return hidden_BxLxV

    def nats(
        self,
        hidden_BxLxV: jax.Array,
        targets_BxL: jax.Array,
        weights_BxL: jax.Array,
        z_loss: float,
    ) -> tuple[Float[Array, ''], Float[Array, '']]:
        """The weighted sum of -log p(target); probabilities of counts need no z-loss."""
        del z_loss
        chosen_BxL = jnp.take_along_axis(hidden_BxLxV, targets_BxL[..., None], axis=-1)[..., 0]
        return -jnp.sum(chosen_BxL * weights_BxL), jnp.zeros(())


def params_of(tables: Tables) -> dict:
    """Estimated tables as the parameters of a LanguageModel."""
    flat = {f'{k}_{name}': x for k, table in tables.items() for name, x in table.items()}
    return {'network': flat}


def log_probs(
    tables: Tables, tokens_BxM: Int[np.ndarray, 'B M'], skip: int
) -> Float[np.ndarray, 'B L V']:
    """Log probabilities of what follows each token but the first `skip`; -1 ends a context."""
    tables = {k: {n: np.asarray(x) for n, x in table.items()} for k, table in tables.items()}
    rows, length = tokens_BxM.shape
    unigram_V = np.exp(tables['order_1']['log_prob'])
    found_PxV = np.tile(unigram_V, (rows * (length - skip), 1))
    node_BxM = tokens_BxM  # the context of k tokens that ends here; -1 = never seen
    for k in range(1, len(tables)):
        if k > 1:
            node_BxM = np.concatenate(
                [np.full((rows, 1), -1), _child(tables, k, node_BxM[:, :-1], tokens_BxM[:, 1:])], 1
            )
        node_P = node_BxM[:, skip:].ravel()
        seen = np.flatnonzero(node_P >= 0)
        node = node_P[seen]
        context, higher = tables[f'order_{k}'], tables[f'order_{k + 1}']
        found_PxV[seen] *= np.exp(context['log_backoff'][node])[:, None]
        first, last = context['first'][node], context['first'][node + 1]
        place = np.repeat(last - np.cumsum(last - first), last - first) + np.arange(
            (last - first).sum()
        )
        found_PxV[np.repeat(seen, last - first), higher['token'][place]] = np.exp(
            higher['log_prob'][place]
        )
    return np.log(found_PxV).reshape(rows, length - skip, -1)


def write_arpa(tables: Tables, path: pathlib.Path) -> None:
    """An ARPA file whose words are the token ids; kenlm reads it, from order 2 on.

    <s>, </s> and <unk> are there because the format wants them: no text has them.
    """
    orders = [{n: np.asarray(x) for n, x in table.items()} for table in tables.values()]
    with files.replacing(path, 'x') as file:
        sizes = (f'ngram {k}={len(t["token"]) + 3 * (k == 1)}' for k, t in enumerate(orders, 1))
        file.write('\n'.join(['\\data\\', *sizes, '']))
        grams_NxK = np.zeros((1, 0), np.int32)
        children = np.array([len(orders[0]['token'])])
        for k, table in enumerate(orders, 1):
            words = table['token'][:, None]
            grams_NxK = np.concatenate([np.repeat(grams_NxK, children, axis=0), words], axis=1)
            file.write(f'\n\\{k}-grams:\n')
            if k == 1:
                file.writelines(f'-99\t{word}\t0\n' for word in ('<unk>', '<s>', '</s>'))
            columns = [table['log_prob'], table.get('log_backoff', table['log_prob'])]
            probs, backoffs = (x.astype(np.float64) / math.log(10) for x in columns)
            for gram, prob, backoff in zip(grams_NxK, probs, backoffs, strict=True):
                line = f'{prob:.7g}\t{" ".join(map(str, gram.tolist()))}'
                file.write(f'{line}\t{backoff:.7g}\n' if 'log_backoff' in table else f'{line}\n')
            children = np.diff(table['first']) if 'first' in table else children
        file.write('\n\\end\\\n')


def _columns(size: int, is_context: bool) -> list[tuple]:
    found = [('token', (size,), jnp.int32), ('log_prob', (size,), jnp.float32)]
    if is_context:
        found += [('log_backoff', (size,), jnp.float32), ('first', (size + 1,), jnp.int32)]
    return found


def _zeros(rng: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    del rng
    return jnp.zeros(shape, dtype)


def _host(tables: Tables, tokens_BxM: Any) -> np.ndarray:
    order = len(tables)
    return log_probs(tables, np.asarray(tokens_BxM), order - 1)


def _child(tables: Tables, k: int, node: np.ndarray, token: np.ndarray) -> np.ndarray:
    """The k-gram of a (k-1)-gram and one more token; -1 where it was never seen. Binary search."""
    first, words = tables[f'order_{k - 1}']['first'], tables[f'order_{k}']['token']
    if not len(words):
        return np.full(node.shape, -1)
    known = (node >= 0) & (token >= 0)
    low = np.where(known, first[np.maximum(node, 0)], 0)
    end = np.where(known, first[np.maximum(node, 0) + 1], 0)
    high = end
    while (low < high).any():
        middle = (low + high) // 2
        less = (low < high) & (words[np.minimum(middle, len(words) - 1)] < token)
        low, high = np.where(less, middle + 1, low), np.where(less, high, middle)
        high = np.maximum(low, high)
    found = (low < end) & (words[np.minimum(low, len(words) - 1)] == token)
    return np.where(found, low, -1)
