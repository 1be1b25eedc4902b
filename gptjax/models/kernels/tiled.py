# SPDX-License-Identifier: Apache-2.0
"""Causal attention for CPUs: few large tiles, each product in the form that XLA runs fast there.

The queries are cut into blocks, each of which meets only the keys that some query of it may see.
XLA:CPU runs a batched product on one core, so independent blocks fill the others; it is slow where
the left operand is transposed, so the backward pass transposes what is small (never L x L).
Softmax is float32 and products are accumulated in float32, whatever the dtype of the operands.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.models import masks

_BLOCKS = 4  # of queries
_SMALLEST = 64  # a block below this costs more than it saves


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def attend(
    query_BxLxHxK: jax.Array,
    key_BxLxGxK: jax.Array,
    value_BxLxGxK: jax.Array,
    mask: masks.Mask,
    halve: bool,
) -> jax.Array:
    """Attention of scaled queries, as flash.attend.

    Args:
      halve: whether to work on two halves of the batch independently, where all of it is here.
    """
    return _forward(query_BxLxHxK, key_BxLxGxK, value_BxLxGxK, mask, halve)[0]


def _forward(
    query_BxLxHxK: jax.Array,
    key_BxLxGxK: jax.Array,
    value_BxLxGxK: jax.Array,
    mask: masks.Mask,
    halve: bool,
) -> tuple[jax.Array, tuple]:
    shape = query_BxLxHxK.shape
    grouped = query_BxLxHxK.reshape(*shape[:2], key_BxLxGxK.shape[2], -1, shape[3])
    query = grouped.transpose(0, 2, 3, 1, 4)  # BxGxSxLxK
    key, value = key_BxLxGxK.swapaxes(1, 2), value_BxLxGxK.swapaxes(1, 2)  # BxGxLxK
    outs, weights = [], []
    for q, k, v in zip(*(_halves(x, halve) for x in (query, key, value)), strict=True):
        found = [_block_forward(q, k, v, block, mask) for block in _blocks(shape[1], mask)]
        weights.append([w for w, _ in found])
        outs.append(jnp.concatenate([out for _, out in found], axis=3))
    out = jnp.concatenate(outs)
    return out.transpose(0, 3, 1, 2, 4).reshape(shape), (query, key, value, weights, out)


def _backward(
    mask: masks.Mask, halve: bool, kept: tuple, cotangent_BxLxHxK: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    query, key, value, weights, out = kept
    shape = cotangent_BxLxHxK.shape
    grouped = cotangent_BxLxHxK.reshape(*shape[:2], key.shape[1], -1, shape[3])
    cotangent = grouped.transpose(0, 2, 3, 1, 4)
    delta = (cotangent.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1, keepdims=True)
    halved = (_halves(x, halve) for x in (query, key, value, cotangent, delta))
    grads = []
    for *arrays, kept_weights in zip(*halved, weights, strict=True):
        dquery, dkey, dvalue = [], 0.0, 0.0
        for block, w in zip(_blocks(shape[1], mask), kept_weights, strict=True):
            dq, dk, dv = _block_backward(*arrays, w, block)
            dquery.append(dq)
            dkey, dvalue = dkey + dk, dvalue + dv
        grads.append((jnp.concatenate(dquery, axis=3), dkey, dvalue))
    dquery, dkey, dvalue = (jnp.concatenate(parts) for parts in zip(*grads, strict=True))
    return (
        dquery.transpose(0, 3, 1, 2, 4).reshape(shape),
        dkey.transpose(0, 3, 1, 2).astype(key.dtype),
        dvalue.transpose(0, 3, 1, 2).astype(value.dtype),
    )


attend.defvjp(_forward, _backward)


class _Block(NamedTuple):
    """Queries start .. end - 1, which see keys among first .. last - 1."""

    start: int
    end: int
    first: int
    last: int


def _blocks(length: int, mask: masks.Mask) -> list[_Block]:
    number = _BLOCKS
    while number > 1 and (length % number or length // number < _SMALLEST):
        number //= 2
    size = length // number
    borders = ((at, at + size) for at in range(0, length, size))
    return [_Block(start, end, *mask.span(start, end, length)) for start, end in borders]


def _halves(x: jax.Array, halve: bool) -> list[jax.Array]:
    return jnp.split(x, 2) if halve and x.shape[0] % 2 == 0 else [x]


def _dot(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _block_forward(
    query: jax.Array, key: jax.Array, value: jax.Array, block: _Block, mask: masks.Mask
) -> tuple[jax.Array, jax.Array]:
    keys = slice(block.first, block.last)
    att = _dot('bgslk,bgmk->bgslm', query[:, :, :, block.start : block.end], key[:, :, keys])
    seen = mask.seen(
        np.arange(block.start, block.end)[:, None], np.arange(block.first, block.last)[None]
    )
    att = jnp.where(seen[None, None, None], att, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(att, axis=-1).astype(value.dtype)
    out = _dot('bgslm,bgmk->bgslk', weights, value[:, :, keys])
    return weights, out.astype(query.dtype)


def _block_backward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    cotangent: jax.Array,
    delta: jax.Array,
    weights: jax.Array,
    block: _Block,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    queries, keys = slice(block.start, block.end), slice(block.first, block.last)
    query, cotangent, delta = (x[:, :, :, queries] for x in (query, cotangent, delta))
    dweights = _dot('bgslk,bgmk->bgslm', cotangent, value[:, :, keys])
    datt = (weights.astype(jnp.float32) * (dweights - delta)).astype(query.dtype)
    dquery = _dot('bgslm,bgmk->bgslk', datt, key[:, :, keys]).astype(query.dtype)
    dkey = _dot('bgskl,bgslm->bgkm', query.swapaxes(3, 4), datt)
    dvalue = _dot('bgskl,bgslm->bgkm', cotangent.swapaxes(3, 4), weights)
    padding = ((0, 0), (0, 0), (0, 0), (block.first, key.shape[2] - block.last))
    return dquery, jnp.pad(dkey, padding), jnp.pad(dvalue, padding)
