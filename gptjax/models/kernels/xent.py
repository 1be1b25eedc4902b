# SPDX-License-Identifier: Apache-2.0
"""Next-token cross-entropy of hidden states, a chunk at a time: no (B, L, V) logits are ever held.

The gradient is made in the forward pass, while a chunk's logits are there (as in Liger kernel, Hsu
et al. 2024, section 3.2), so nothing is computed twice. Every device sums the gradient of the table
over its own tokens; devices exchange it once, after the last chunk.

A chunk reads the table twice, and reads and writes the sum of its gradients: 12 bytes of memory for
6 FLOPs a token and entry of it. So chunks are as large as makes that little beside the products.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from gptjax.models import axes
from gptjax.models.kernels import dots
from gptjax.scaling import devices

CHUNK_BYTES = 2**26  # of float32 logits, on a device that is not known: what caches like
_TABLE_SHARE = 1 / 8  # of the time of a chunk's products, for the table's way through memory
_MEMORY_SHARE = 1 / 32  # of a device's, for a chunk's logits


def nats(
    hidden_BxLxD: jax.Array,
    table_VxD: jax.Array,
    bias_V: jax.Array | None,
    targets_BxL: jax.Array,
    weights_BxL: jax.Array,
    z_loss: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """The weighted sum of -log p(target) in nats, float32, p = softmax(hidden . table + bias).

    Args:
      table_VxD, bias_V: in any dtype; products are made in that of the hidden states.
      weights_BxL: of each target, any numbers; they may depend on parameters.
      z_loss: what log^2 of a softmax's denominator is multiplied with and added to every -log p
        (Chowdhery et al. 2022, PaLM, section 5).

    Returns:
      the sum, what was added included, and what was added alone, through which no gradient goes.
    """
    if bias_V is None:
        bias_V = jnp.zeros(table_VxD.shape[0], jnp.float32)
    return _nats(z_loss, hidden_BxLxD, table_VxD, bias_V, targets_BxL, weights_BxL)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _nats(z_loss: float, *arrays: jax.Array) -> Any:
    return _on_mesh(False, z_loss, *arrays)


def _forward(z_loss: float, *arrays: jax.Array) -> Any:
    found, added, *kept = _on_mesh(True, z_loss, *arrays)
    return (found, added), kept


def _backward(z_loss: float, kept: list[jax.Array], cotangents: tuple[jax.Array, Any]) -> Any:
    del z_loss
    dhidden, dtable, dbias, dweights = ((g * cotangents[0]).astype(g.dtype) for g in kept)
    return dhidden, dtable, dbias, np.zeros(dweights.shape, jax.dtypes.float0), dweights


_nats.defvjp(_forward, _backward)


def _on_mesh(differentiate: bool, z_loss: float, *arrays: jax.Array) -> Any:
    """The two sums of nats(); and the gradients of hidden, table, bias and weights, if asked."""
    if axes.n_devices() == 1:
        return _chunks(differentiate, z_loss, (), None, None, *arrays)
    vocab, embed = axes.parameter_spec('vocab', 'embed')
    tokens = axes.spec('batch', 'length')
    hidden = axes.spec('batch', 'length', 'act_embed')
    split = axes.flat(tokens)  # the mesh axes that tokens are split over
    table, bias = PartitionSpec(vocab, embed), PartitionSpec(vocab)
    out_specs = (PartitionSpec(), PartitionSpec())
    if differentiate:
        out_specs += (hidden, table, bias, tokens)
    return axes.shard_map(
        functools.partial(_chunks, differentiate, z_loss, split, vocab, embed),
        (hidden, table, bias, tokens, tokens),
        out_specs,
    )(*arrays)


def _chunks(
    differentiate: bool,
    z_loss: float,
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
        log_total = jnp.log(total) + highest
        z = z_loss * jnp.square(log_total)
        each = log_total - chosen + z
        found = jnp.stack([jnp.sum(each * w), jnp.sum(z * w)])
        if not differentiate:
            return (sums[0] + found,), None
        slope = (1 + 2 * z_loss * log_total) / total
        dlogits = (exponents * slope[:, None] - hit) * w[:, None]
        dbias = dlogits.sum(0)
        dlogits = dlogits.astype(hidden.dtype)
        dh = over_vocab(
            jnp.einsum('mv,vd->md', dlogits, narrow, preferred_element_type=jnp.float32)
        )
        new = (found, dots.outer(h, dlogits), dbias)
        sums = tuple(a + b for a, b in zip(sums, new, strict=True))
        return sums, (dh.astype(hidden.dtype), each.astype(weights.dtype))

    sums = (jnp.zeros(2),)
    if differentiate:
        sums += (jnp.zeros((width, table.shape[0])), jnp.zeros(bias.shape))
    starts = jnp.arange(0, length, size)
    if len(starts) == 1:
        sums, by_token = chunk(sums, 0)
    else:
        sums, by_token = jax.lax.scan(chunk, sums, starts)
    found = tuple(jax.lax.psum(sums[0], split) if split else sums[0])
    if not differentiate:
        return found
    # (chunks, B * size, ...) -> (B, L, ...)
    dhidden, dweights = (
        x.reshape(-1, rows, size, *shape[2:]).swapaxes(0, 1).reshape(shape)
        for x, shape in zip(by_token, (hidden.shape, weights.shape), strict=True)
    )
    dtable, dbias = sums[1].T, sums[2]
    if embed:  # summed over one of the axes and split over it again, in one go
        dtable = jax.lax.psum_scatter(dtable, embed, scatter_dimension=1, tiled=True)
    rest = tuple(axis for axis in split if axis != embed)
    dtable = jax.lax.psum(dtable, rest) if rest else dtable
    dbias = jax.lax.psum(dbias, split) if split else dbias
    return *found, dhidden, dtable.astype(table.dtype), dbias.astype(bias.dtype), dweights


def _chunk(rows: int, length: int, vocab: int) -> int:
    """Places of every row in a chunk: the most that fit, of those that divide the length."""
    device, fit = devices.of(axes.device_kind()), CHUNK_BYTES / (4 * vocab)
    if device:
        wanted = 2 * device.ridge / _TABLE_SHARE
        fit = min(wanted, device.memory * _MEMORY_SHARE / (4 * vocab))
    fit = max(1, int(fit) // rows)
    return max(size for size in range(1, length + 1) if length % size == 0 and size <= fit)
