# SPDX-License-Identifier: Apache-2.0
"""Causal attention over a length that is split across devices (Liu et al. 2023, Ring Attention).

Keys and values travel round the devices while each keeps its queries; what the softmax needs is
carried along (Milakov and Gimelshein 2018), so no device ever holds more than its share of the
length: activation memory falls as 1 / devices. The backward pass sends the gradients of keys and
values round with them. A device skips the hops whose keys lie after its queries, and a banded layer
makes only the hops that its band reaches. Runs inside shard_map; scores live one tile at a time.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.models import masks

_TILE = 512  # queries and keys of a tile, at most


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def attend(
    query_BxLxHxK: jax.Array,
    key_BxLxGxK: jax.Array,
    value_BxLxGxK: jax.Array,
    mask: masks.Mask,
    axis: str,
    size: int,
) -> jax.Array:
    """Attention of this device's scaled queries, as flash.attend.

    Args:
      mask: that does not see ahead.
      axis: the mesh axis over which the length is split, in order.
      size: how many devices it has.
    """
    return _forward(query_BxLxHxK, key_BxLxGxK, value_BxLxGxK, mask, axis, size)[0]


def _forward(
    query_BxLxHxK: jax.Array,
    key_BxLxGxK: jax.Array,
    value_BxLxGxK: jax.Array,
    mask: masks.Mask,
    axis: str,
    size: int,
) -> Any:
    shape = query_BxLxHxK.shape
    query = _grouped(query_BxLxHxK, key_BxLxGxK.shape[2])

    def hop(soft: tuple, pair: tuple, offset: Any) -> Any:
        keys_at = jax.lax.axis_index(axis) * shape[1] - offset
        return _merge(soft, _attend_tiles(query, *pair, offset, keys_at, mask))

    start = (
        jnp.full(query.shape[:-1], -jnp.inf, jnp.float32),
        jnp.zeros(query.shape[:-1], jnp.float32),
        jnp.zeros(query.shape, jnp.float32),
    )
    pair = (key_BxLxGxK, value_BxLxGxK)
    (highest, total, out), _ = _round(hop, start, pair, shape[1], mask, axis, size)
    out = (out / total[..., None]).astype(query.dtype)
    return out.reshape(shape), (query, *pair, out, highest + jnp.log(total))


def _backward(
    mask: masks.Mask, axis: str, size: int, kept: tuple, cotangent_BxLxHxK: jax.Array
) -> Any:
    query, key, value, out, log_total = kept
    shape = cotangent_BxLxHxK.shape
    cotangent = _grouped(cotangent_BxLxHxK, key.shape[2])
    delta = (cotangent.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    rows = (query, cotangent, delta, log_total)

    def hop(dquery: jax.Array, travelling: tuple, offset: Any) -> Any:
        k, v, dk, dv = travelling
        keys_at = jax.lax.axis_index(axis) * shape[1] - offset
        found = _differentiate_tiles(rows, k, v, offset, keys_at, mask)
        return dquery + found[0], (k, v, dk + found[1], dv + found[2])

    zeros = jnp.zeros(key.shape, jnp.float32)
    start = jnp.zeros(query.shape, jnp.float32)
    travelling = (key, value, zeros, zeros)
    dquery, (_, _, dkey, dvalue) = _round(
        hop, start, travelling, shape[1], mask, axis, size, carries=True
    )
    # After h hops they are h - 1 devices away from home.
    hops = _hops(shape[1], mask, size)
    home = [(i, (i - hops + 1) % size) for i in range(size)]
    dkey, dvalue = (jax.lax.ppermute(x, axis, home) for x in (dkey, dvalue))
    return (
        dquery.reshape(shape).astype(query.dtype),
        dkey.astype(key.dtype),
        dvalue.astype(value.dtype),
    )


attend.defvjp(_forward, _backward)


def _hops(length: int, mask: masks.Mask, size: int) -> int:
    """How many devices' keys some query of a device may see, its own included."""
    return min(size, 1 + -(-(mask.window - 1) // length)) if mask.window else size


def _round(
    hop: Callable,
    carry: Any,
    travelling: tuple,
    length: int,
    mask: masks.Mask,
    axis: str,
    size: int,
    carries: bool = False,
) -> Any:
    """Hop h meets the keys of the device h before this one, if there is one.

    `hop(carry, travelling, offset)` gives the new carry; with `carries` what travels, too.
    """
    index = jax.lax.axis_index(axis)
    onwards = [(i, (i + 1) % size) for i in range(size)]

    def meet(state: tuple, h: Any) -> Any:
        def yes(state: tuple) -> Any:
            found = hop(*state, h * length)
            return found if carries else (found, state[1])

        return jax.lax.cond(index >= h, yes, lambda state: state, state)

    def move_and_meet(h: Any, state: tuple) -> Any:
        carry, travelling = state
        travelling = tuple(jax.lax.ppermute(x, axis, onwards) for x in travelling)
        return meet((carry, travelling), h)

    state = meet((carry, travelling), 0)
    return jax.lax.fori_loop(1, _hops(length, mask, size), move_and_meet, state)


def _grouped(x_BxLxHxK: jax.Array, n_kv_heads: int) -> jax.Array:
    return x_BxLxHxK.reshape(*x_BxLxHxK.shape[:2], n_kv_heads, -1, x_BxLxHxK.shape[3])


def _scores(
    query: jax.Array, key: jax.Array, query_start: Any, key_start: Any, mask: masks.Mask
) -> jax.Array:
    """Scores of a tile (B, L, G, S, M) in float32; -inf where a query may not look."""
    att = jnp.einsum('blgsk,bmgk->blgsm', query, key, preferred_element_type=jnp.float32)
    seen = mask.seen(
        (query_start + jnp.arange(query.shape[1]))[:, None],
        (key_start + jnp.arange(key.shape[1]))[None],
    )
    return jnp.where(seen[None, :, None, None], att, -jnp.inf)


def _merge(one: tuple, other: tuple) -> Any:
    """Two softmax accumulations (highest score, sum of exponents, weighted values) as one."""
    highest = jnp.maximum(one[0], other[0])
    safe = jnp.where(jnp.isfinite(highest), highest, 0.0)
    a, b = jnp.exp(one[0] - safe), jnp.exp(other[0] - safe)
    out = a[..., None] * one[2] + b[..., None] * other[2]
    return highest, a * one[1] + b * other[1], out


def _attend_tiles(
    query: jax.Array, key: jax.Array, value: jax.Array, offset: Any, keys_at: Any, mask: masks.Mask
) -> Any:
    """The softmax accumulation of local queries, `offset` places after the keys at hand.

    Those are at positions from `keys_at` on.
    """
    size = _tile(query.shape[1])

    def rows(start: Any) -> Any:
        q = jax.lax.dynamic_slice_in_dim(query, start, size, 1)

        def meet(index: Any, soft: tuple) -> Any:
            k, v = (jax.lax.dynamic_slice_in_dim(x, index * size, size, 1) for x in (key, value))
            att = _scores(q, k, keys_at + start + offset, keys_at + index * size, mask)
            highest = att.max(-1)
            safe = jnp.where(jnp.isfinite(highest), highest, 0.0)
            weights = jnp.exp(att - safe[..., None])
            out = jnp.einsum(
                'blgsm,bmgk->blgsk', weights.astype(v.dtype), v, preferred_element_type=jnp.float32
            )
            return _merge(soft, (highest, weights.sum(-1), out))

        empty = (
            jnp.full(q.shape[:-1], -jnp.inf, jnp.float32),
            jnp.zeros(q.shape[:-1], jnp.float32),
            jnp.zeros(q.shape, jnp.float32),
        )
        first, last = _reach(start + offset, size, key.shape[1], mask)
        return jax.lax.fori_loop(first, last, meet, empty)

    found = jax.lax.map(rows, jnp.arange(0, query.shape[1], size))
    return tuple(_joined(x) for x in found)


def _differentiate_tiles(
    rows: tuple, key: jax.Array, value: jax.Array, offset: Any, keys_at: Any, mask: masks.Mask
) -> Any:
    """Gradients (queries, keys, values) in float32 of local queries against the keys at hand."""
    size = _tile(key.shape[1])

    def block(carry: Any, start: Any) -> Any:
        q, cot, delta, log_total = (jax.lax.dynamic_slice_in_dim(x, start, size, 1) for x in rows)

        def meet(index: Any, grads: tuple) -> Any:
            dq, dkey, dvalue = grads
            k, v, dk, dv = (
                jax.lax.dynamic_slice_in_dim(x, index * size, size, 1)
                for x in (key, value, dkey, dvalue)
            )
            att = _scores(q, k, keys_at + start + offset, keys_at + index * size, mask)
            weights = jnp.exp(att - log_total[..., None])
            dweights = jnp.einsum('blgsk,bmgk->blgsm', cot, v, preferred_element_type=jnp.float32)
            datt = (weights * (dweights - delta[..., None])).astype(q.dtype)
            weights = weights.astype(q.dtype)
            dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
            dq += dot('blgsm,bmgk->blgsk', datt, k)
            dk += dot('blgsm,blgsk->bmgk', datt, q)
            dv += dot('blgsm,blgsk->bmgk', weights, cot)
            dkey = jax.lax.dynamic_update_slice_in_dim(dkey, dk, index * size, 1)
            dvalue = jax.lax.dynamic_update_slice_in_dim(dvalue, dv, index * size, 1)
            return dq, dkey, dvalue

        first, last = _reach(start + offset, size, key.shape[1], mask)
        dq, *carry = jax.lax.fori_loop(first, last, meet, (jnp.zeros(q.shape, jnp.float32), *carry))
        return tuple(carry), dq

    zeros = jnp.zeros(key.shape, jnp.float32)
    (dkey, dvalue), dquery = jax.lax.scan(
        block, (zeros, zeros), jnp.arange(0, rows[0].shape[1], size)
    )
    return _joined(dquery), dkey, dvalue


def _reach(start: Any, size: int, length: int, mask: masks.Mask) -> tuple:
    """The tiles of keys [first, last) that queries from `start` on may see."""
    last = jnp.minimum((start + size - 1) // size + 1, length // size)
    first = jnp.maximum(0, (start - mask.window + 1) // size) if mask.window else 0
    return jnp.minimum(first, last), last


def _tile(length: int) -> int:
    return max(size for size in range(1, min(_TILE, length) + 1) if length % size == 0)


def _joined(tiles: jax.Array) -> jax.Array:
    """(tiles, B, size, ...) -> (B, L, ...)."""
    return tiles.swapaxes(0, 1).reshape(tiles.shape[1], -1, *tiles.shape[3:])
