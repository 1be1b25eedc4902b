# SPDX-License-Identifier: Apache-2.0
"""Next-token cross-entropy of hidden states, a chunk at a time: no (B, L, V) logits are ever held.

The gradient is made in the forward pass, while a chunk's logits are there (as in Liger kernel, Hsu
et al. 2024, section 3.2), so nothing is computed twice. Every device sums the gradient of the table
over its own tokens; devices exchange it once, after the last chunk.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from gptjax.models import axes
from gptjax.models.kernels import dots

CHUNK_BYTES = 2**26  # of float32 logits, on one device


def nats(
    hidden_BxLxD: jax.Array,
    table_VxD: jax.Array,
    bias_V: jax.Array | None,
    targets_BxL: jax.Array,
    weights_BxL: jax.Array,
) -> jax.Array:
    """The weighted sum of -log p(target) in nats, float32, p = softmax(hidden . table + bias).

    Args:
      table_VxD, bias_V: in any dtype; products are made in that of the hidden states.
    """
    if bias_V is None:
        bias_V = jnp.zeros(table_VxD.shape[0], jnp.float32)
    return _nats(hidden_BxLxD, table_VxD, bias_V, targets_BxL, weights_BxL)


@jax.custom_vjp
def _nats(
    hidden: jax.Array, table: Any, bias: jax.Array | None, targets: jax.Array, weights: jax.Array
) -> Any:
    return _on_mesh(False, hidden, table, bias, targets, weights)[0]


def _forward(
    hidden: jax.Array, table: Any, bias: jax.Array | None, targets: jax.Array, weights: jax.Array
) -> Any:
    found, *grads = _on_mesh(True, hidden, table, bias, targets, weights)
    return found, (grads, targets, weights)


def _backward(kept: tuple, cotangent: jax.Array) -> Any:
    (dhidden, dtable, dbias), targets, weights = kept
    scaled = [(g * cotangent).astype(g.dtype) for g in (dhidden, dtable, dbias)]
    return *scaled, np.zeros(targets.shape, jax.dtypes.float0), jnp.zeros_like(weights)


_nats.defvjp(_forward, _backward)


def _on_mesh(differentiate: bool, *arrays: jax.Array) -> Any:
    """(nats,) or (nats, and the gradients of the first three arrays)."""
    if axes.n_devices() == 1:
        return _chunks(differentiate, (), None, None, *arrays)
    vocab, embed = axes.parameter_spec('vocab', 'embed')
    tokens = axes.spec('batch', 'length')
    hidden = axes.spec('batch', 'length', 'act_embed')
    split = axes.flat(tokens)  # the mesh axes that tokens are split over
    table, bias = PartitionSpec(vocab, embed), PartitionSpec(vocab)
    out_specs = (PartitionSpec(), hidden, table, bias) if differentiate else (PartitionSpec(),)
    return axes.shard_map(
        functools.partial(_chunks, differentiate, split, vocab, embed),
        (hidden, table, bias, tokens, tokens),
        out_specs,
    )(*arrays)


def _chunks(
    differentiate: bool,
    split: tuple[str, ...],
    vocab: Any,
    embed: Any,
    hidden: jax.Array,
    table: Any,
    bias: jax.Array | None,
    targets: jax.Array,
    weights: jax.Array,
) -> Any:
    """One device's share.

    Args:
      split: mesh axes over which the tokens are split.
      vocab, embed: mesh axes over which the table's two axes are, or None.
    """
    narrow = table.astype(hidden.dtype)
    if embed:
        narrow = jax.lax.all_gather(narrow, embed, axis=1, tiled=True)
    rows, length, width = hidden.shape
    size = _chunk(rows, length, table.shape[0])
    first = jax.lax.axis_index(vocab) * table.shape[0] if vocab else 0
    over_vocab = functools.partial(jax.lax.psum, axis_name=vocab) if vocab else lambda x: x

    def chunk(sums: tuple, start: Any) -> Any:
        h, t, w = (
            jax.lax.dynamic_slice_in_dim(x, start, size, 1).reshape(rows * size, *x.shape[2:])
            for x in (hidden, targets, weights)
        )
        logits = jnp.einsum('md,vd->mv', h, narrow, preferred_element_type=jnp.float32)
        logits += bias.astype(jnp.float32)[None]
        highest = jax.lax.stop_gradient(logits.max(-1))
        highest = jax.lax.pmax(highest, vocab) if vocab else highest
        exponents = jnp.exp(logits - highest[:, None])
        total = over_vocab(exponents.sum(-1))
        hit = (t - first)[:, None] == jnp.arange(table.shape[0])[None]
        chosen = over_vocab(jnp.where(hit, logits, 0.0).sum(-1))
        found = jnp.sum((jnp.log(total) + highest - chosen) * w)
        if not differentiate:
            return (sums[0] + found,), None
        dlogits = (exponents / total[:, None] - hit) * w[:, None]
        dbias = dlogits.sum(0)
        dlogits = dlogits.astype(hidden.dtype)
        dh = over_vocab(
            jnp.einsum('mv,vd->md', dlogits, narrow, preferred_element_type=jnp.float32)
        )
        new = (found, dots.outer(h, dlogits), dbias)
        return tuple(a + b for a, b in zip(sums, new, strict=True)), dh.astype(hidden.dtype)

    sums = (jnp.zeros(()),)
    if differentiate:
        sums += (jnp.zeros((width, table.shape[0])), jnp.zeros(bias.shape))
    starts = jnp.arange(0, length, size)
    if len(starts) == 1:
        sums, dhidden = chunk(sums, 0)
    else:
        sums, dhidden = jax.lax.scan(chunk, sums, starts)
    found = jax.lax.psum(sums[0], split) if split else sums[0]
    if not differentiate:
        return (found,)
    # (chunks, B * size, D) -> (B, L, D)
    dhidden = dhidden.reshape(-1, rows, size, width).swapaxes(0, 1).reshape(hidden.shape)
    dtable, dbias = sums[1].T, sums[2]
    if embed:  # summed over one of the axes and split over it again, in one go
        dtable = jax.lax.psum_scatter(dtable, embed, scatter_dimension=1, tiled=True)
    rest = tuple(axis for axis in split if axis != embed)
    dtable = jax.lax.psum(dtable, rest) if rest else dtable
    dbias = jax.lax.psum(dbias, split) if split else dbias
    return found, dhidden, dtable.astype(table.dtype), dbias.astype(bias.dtype)


def _chunk(rows: int, length: int, vocab: int) -> int:
    """Places of every row in a chunk: the most that fit, of those that divide the length."""
    fit = max(1, CHUNK_BYTES // (4 * rows * vocab))
    return max(size for size in range(1, length + 1) if length % size == 0 and size <= fit)
