# SPDX-License-Identifier: Apache-2.0
"""Embedding lookup where the table is split over devices, without ever gathering the table.

Every device looks up its part of the vectors, for the tokens of all devices that share the batch
with it; then they exchange parts. The gradient goes back the same way, and is summed in place.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from gptjax.models import axes, quantize


def lookup(
    table_VxD: jax.Array | quantize.ByOutput, tokens_BxL: jax.Array, dtype: str
) -> jax.Array:
    """Vectors (B, L, D) of tokens in `dtype`; the table's gradient has the table's own dtype."""
    if isinstance(table_VxD, quantize.ByOutput):
        return table_VxD.rows(tokens_BxL, dtype)
    shape = (*tokens_BxL.shape, table_VxD.shape[1])
    if not axes.fits(shape, 'batch', 'length', 'act_embed'):
        return table_VxD[tokens_BxL].astype(dtype)
    return _lookup(table_VxD, tokens_BxL, dtype, table_VxD.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _lookup(table: jax.Array, tokens: jax.Array, dtype: Any, table_dtype: Any) -> jax.Array:
    del table_dtype
    if axes.n_devices() == 1:
        return table[tokens].astype(dtype)
    vocab, embed = axes.parameter_spec('vocab', 'embed')

    def local(table: jax.Array, tokens: jax.Array) -> jax.Array:
        ids = jax.lax.all_gather(tokens, embed, axis=0, tiled=True) if embed else tokens
        ids, mine = _mine(ids, table.shape[0], vocab)
        x = jnp.where(mine, table.astype(dtype)[ids], 0)
        x = jax.lax.psum(x, vocab) if vocab else x
        return jax.lax.all_to_all(x, embed, 0, 2, tiled=True) if embed else x

    return axes.shard_map(local, (PartitionSpec(vocab, embed), _tokens()), _hidden())(table, tokens)


def _forward(table: jax.Array, tokens: jax.Array, dtype: Any, table_dtype: Any) -> tuple:
    return _lookup(table, tokens, dtype, table_dtype), (tokens, table.shape[0])


def _backward(dtype: Any, table_dtype: Any, kept: tuple, dx: jax.Array) -> tuple:
    del dtype
    tokens, n_vocab = kept
    vocab, embed = (None, None)
    if axes.n_devices() > 1:
        vocab, embed = axes.parameter_spec('vocab', 'embed')
        n_vocab //= axes.parameter_size('vocab')
    rest = tuple(a for a in axes.flat(_tokens()) if a != embed) if axes.n_devices() > 1 else ()

    def local(tokens: jax.Array, dx: jax.Array) -> jax.Array:
        ids = jax.lax.all_gather(tokens, embed, axis=0, tiled=True) if embed else tokens
        dx = jax.lax.all_to_all(dx, embed, 2, 0, tiled=True) if embed else dx
        ids, mine = _mine(ids, n_vocab, vocab)
        dx = jnp.where(mine, dx, 0).astype(jnp.float32)
        dtable = jnp.zeros((n_vocab, dx.shape[2])).at[ids].add(dx)
        return (jax.lax.psum(dtable, rest) if rest else dtable).astype(table_dtype)

    if axes.n_devices() > 1:
        local = axes.shard_map(local, (_tokens(), _hidden()), PartitionSpec(vocab, embed))
    return local(tokens, dx), np.zeros(tokens.shape, jax.dtypes.float0)


_lookup.defvjp(_forward, _backward)


def _mine(ids: jax.Array, n_local: int, vocab: str | None) -> tuple:
    """Places of ids in this device's part of the table, and which of them it holds (B, L, 1)."""
    if vocab is None:
        return ids, jnp.ones((*ids.shape, 1), bool)
    ids = ids - jax.lax.axis_index(vocab) * n_local
    mine = (ids >= 0) & (ids < n_local)
    return jnp.clip(ids, 0, n_local - 1), mine[..., None]


def _tokens() -> PartitionSpec:
    return axes.spec('batch', 'length')


def _hidden() -> PartitionSpec:
    return axes.spec('batch', 'length', 'act_embed')
