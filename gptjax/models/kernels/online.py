# SPDX-License-Identifier: Apache-2.0
"""Attention of long windows on CPUs, in memory that grows with their length alone.

Blocks of queries meet blocks of keys one after the other; the softmax is carried along as a maximum
and a sum (Milakov and Gimelshein 2018), and its weights are computed again in the backward pass
(FlashAttention-2, Dao 2023, algorithms 1 and 2). Blocks that a mask leaves empty are passed over.
Windows that are short are faster whole: tiled.py.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.models import masks

FROM = 2048  # tokens: from there on this is the faster one, too
_BLOCK = 512  # queries, and keys
_LOWEST = -1e30


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def attend(
    query_BxLxHxK: jax.Array,
    key_BxLxGxK: jax.Array,
    value_BxLxGxK: jax.Array,
    mask: masks.Mask,
    halve: bool,
) -> jax.Array:
    """Attention of scaled queries, as tiled.attend."""
    return _forward(query_BxLxHxK, key_BxLxGxK, value_BxLxGxK, mask, halve)[0]


def _forward(
    query_BxLxHxK: jax.Array,
    key_BxLxGxK: jax.Array,
    value_BxLxGxK: jax.Array,
    mask: masks.Mask,
    halve: bool,
) -> tuple[jax.Array, tuple]:
    n_kv_heads, length = key_BxLxGxK.shape[2], query_BxLxHxK.shape[1]
    grid = _Grid.of(mask, length)
    query = _grouped(query_BxLxHxK, n_kv_heads)
    key, value = (_padded(x.swapaxes(1, 2)) for x in (key_BxLxGxK, value_BxLxGxK))  # BxGxLxK
    out, log_sum = _each(functools.partial(_out, grid), (query, key, value), halve)
    return _flat(out, length), (query, key, value, out, log_sum)


def _backward(
    mask: masks.Mask, halve: bool, kept: tuple, cotangent_BxLxHxK: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    query, key, value, out, log_sum = kept
    length = cotangent_BxLxHxK.shape[1]
    cotangent = _grouped(cotangent_BxLxHxK, key.shape[1])
    delta = (cotangent.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1, keepdims=True)
    work = functools.partial(_gradients, _Grid.of(mask, length))
    arrays = (query, key, value, cotangent, delta, log_sum)
    dquery, dkey, dvalue = _each(work, arrays, halve)  # the last two BxGxKxL
    dkey, dvalue = (x[..., :length].transpose(0, 3, 1, 2).astype(key.dtype) for x in (dkey, dvalue))
    return _flat(dquery, length), dkey, dvalue


attend.defvjp(_forward, _backward)


class _Grid(NamedTuple):
    """Which blocks of keys, first to last - 1, each block of queries meets."""

    mask: masks.Mask
    length: int
    first: np.ndarray
    last: np.ndarray

    @classmethod
    def of(cls, mask: masks.Mask, length: int) -> '_Grid':
        starts = range(0, length, _BLOCK)
        spans = [mask.span(at, min(at + _BLOCK, length), length) for at in starts]
        first, last = (np.array(each) for each in zip(*spans, strict=True))
        return cls(mask, length, first // _BLOCK, -(-last // _BLOCK))

    def seen(self, i: jax.Array, j: jax.Array) -> jax.Array:
        """What the queries of block i see of the keys of block j."""
        here = i * _BLOCK + jnp.arange(_BLOCK)[None, None, None, :, None]
        there = j * _BLOCK + jnp.arange(_BLOCK)[None, None, None, None]
        return self.mask.seen(here, there) & (there < self.length)


def _out(
    grid: _Grid, query: jax.Array, key: jax.Array, value: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Attention, and the logarithm of each query's sum of exponentials."""
    first, last = jnp.asarray(grid.first), jnp.asarray(grid.last)

    def block(_: None, i: jax.Array) -> tuple[None, tuple[jax.Array, jax.Array]]:
        q = _at(query, i)

        def meet(j: jax.Array, carried: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            highest, total, out = carried
            att = _dot('bgslk,bgmk->bgslm', q, _at(key, j))
            att = jnp.where(grid.seen(i, j), att, _LOWEST)
            higher = jnp.maximum(highest, att.max(-1, keepdims=True))
            weights, kept = jnp.exp(att - higher), jnp.exp(highest - higher)
            added = _dot('bgslm,bgmk->bgslk', weights.astype(value.dtype), _at(value, j))
            total = total * kept + weights.sum(-1, keepdims=True)
            return higher, total, out * kept + added

        one = jnp.zeros((*q.shape[:-1], 1))
        start = (one + _LOWEST, one, jnp.zeros(q.shape))
        highest, total, out = jax.lax.fori_loop(first[i], last[i], meet, start)
        return None, ((out / total).astype(query.dtype), highest + jnp.log(total))

    found = jax.lax.scan(block, None, jnp.arange(len(grid.first)))[1]
    return _in_line(found[0]), _in_line(found[1])


def _gradients(
    grid: _Grid,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    cotangent: jax.Array,
    delta: jax.Array,
    log_sum: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    first, last = jnp.asarray(grid.first), jnp.asarray(grid.last)

    def block(sums: tuple[jax.Array, ...], i: jax.Array) -> tuple[tuple, jax.Array]:
        q, d_out, d_total, logs = (_at(x, i) for x in (query, cotangent, delta, log_sum))

        def meet(j: jax.Array, carried: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            dq, dkey, dvalue = carried
            k, v = _at(key, j), _at(value, j)
            att = _dot('bgslk,bgmk->bgslm', q, k)
            weights = jnp.where(grid.seen(i, j), jnp.exp(att - logs), 0)
            dweights = _dot('bgslk,bgmk->bgslm', d_out, v)
            datt = (weights * (dweights - d_total)).astype(query.dtype)
            dk = _dot('bgskl,bgslm->bgkm', q.swapaxes(3, 4), datt)
            dv = _dot('bgskl,bgslm->bgkm', d_out.swapaxes(3, 4), weights.astype(query.dtype))
            dq += _dot('bgslm,bgmk->bgslk', datt, k)
            return dq, _added(dkey, dk, j), _added(dvalue, dv, j)

        dq, *sums = jax.lax.fori_loop(first[i], last[i], meet, (jnp.zeros(q.shape), *sums))
        return tuple(sums), dq.astype(query.dtype)

    zeros = jnp.zeros(key.swapaxes(2, 3).shape)
    sums, dquery = jax.lax.scan(block, (zeros, zeros), jnp.arange(len(grid.first)))
    return _in_line(dquery), *sums


def _dot(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _at(x: jax.Array, i: jax.Array) -> jax.Array:
    """Block i of the last axis but one."""
    return jax.lax.dynamic_slice_in_dim(x, i * _BLOCK, _BLOCK, -2)


def _added(sums: jax.Array, more: jax.Array, j: jax.Array) -> jax.Array:
    """Sums with more of block j, which is on the last axis."""
    more += jax.lax.dynamic_slice_in_dim(sums, j * _BLOCK, _BLOCK, -1)
    return jax.lax.dynamic_update_slice_in_dim(sums, more, j * _BLOCK, -1)


def _in_line(blocks: jax.Array) -> jax.Array:
    """Blocks (N B G S l K), joined to (B G S L K)."""
    joined = jnp.moveaxis(blocks, 0, 3)
    return joined.reshape(*joined.shape[:3], -1, joined.shape[-1])


def _padded(x: jax.Array) -> jax.Array:
    """Whole blocks along the last axis but one."""
    missing = -x.shape[-2] % _BLOCK
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, missing), (0, 0)])


def _grouped(x_BxLxHxK: jax.Array, n_kv_heads: int) -> jax.Array:
    """(B G S L K): query heads by the key-value head that they share."""
    shape = x_BxLxHxK.shape
    return _padded(x_BxLxHxK.reshape(*shape[:2], n_kv_heads, -1, shape[3]).transpose(0, 2, 3, 1, 4))


def _flat(x_BxGxSxLxK: jax.Array, length: int) -> jax.Array:
    """(B L H K), as _grouped() was given it."""
    x_BxLxGxSxK = x_BxGxSxLxK[:, :, :, :length].transpose(0, 3, 1, 2, 4)
    return x_BxLxGxSxK.reshape(*x_BxLxGxSxK.shape[:2], -1, x_BxLxGxSxK.shape[-1])


def _each(
    work: Callable[..., tuple[jax.Array, ...]], arrays: tuple[jax.Array, ...], halve: bool
) -> tuple[jax.Array, ...]:
    """work(*arrays), of halves of rows or heads: a batched product fills one core alone."""
    even = [axis for axis in (0, 1) if arrays[0].shape[axis] % 2 == 0]
    if not (halve and even):
        return work(*arrays)
    halves = zip(*(jnp.split(x, 2, even[0]) for x in arrays), strict=True)
    found = zip(*(work(*half) for half in halves), strict=True)
    return tuple(jnp.concatenate(parts, even[0]) for parts in found)
