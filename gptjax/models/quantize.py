# SPDX-License-Identifier: Apache-2.0
"""Parameters as decoding reads them: layers apart, weights as int8 or int4 by choice.

Weight-only quantisation, symmetric, rounding to nearest (LLM.int8(), Dettmers et al. 2022, section
2.1): int8 with one scale an output channel, int4 with one a group of inputs of an output channel.
Norms and biases stay as they are. What that costs in perplexity: docs/generate.md.
"""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct, traverse_util
from jaxtyping import Array, Float, Integer

from gptjax.configs import errors

Weights = Literal['', 'int8', 'int4']
WEIGHTS = ('', 'int8', 'int4')
_GROUP = 32  # inputs that share a scale in int4
_TABLES = ('token_embedding', 'unembedding')  # (vocab, embed): one output channel a row


@struct.dataclass
class Quantized:
    """A weight of N output channels by K inputs: integers times scales.

    In int4 a byte holds two: the low halves are the first K / 2 inputs, the high ones the others.
    """

    values_NxJ: Integer[Array, 'N J']
    scale_NxG: Float[Array, 'N G']
    shape: tuple[int, ...] = struct.field(pytree_node=False)  # before it was quantised

    @property
    def is_int8(self) -> bool:
        return self.values_NxJ.dtype == jnp.int8

    def matrix(self, dtype: Any) -> Float[Array, 'N K']:
        """The weight again, rounded, outputs first."""
        return _scaled(self._integers(), self.scale_NxG).astype(dtype)

    def rows(self, index_BxL: jax.Array, dtype: Any) -> Float[Array, 'B L K']:
        """Of some output channels: the vectors of tokens, where the weight is an embedding."""
        part = Quantized(
            self.values_NxJ[index_BxL.ravel()], self.scale_NxG[index_BxL.ravel()], self.shape
        )
        return part.matrix(dtype).reshape(*index_BxL.shape, -1)

    def _integers(self) -> jax.Array:
        if self.is_int8:
            return self.values_NxJ
        low_NxJ = (self.values_NxJ & 15).astype(jnp.int8) - 8
        high_NxJ = (self.values_NxJ >> 4).astype(jnp.int8) - 8
        return jnp.concatenate([low_NxJ, high_NxJ], axis=1)


def for_decoding(params: Any, weights: Weights = '') -> Any:
    """The parameters of a language model in the form that decodes fastest.

    Stacked layers are taken apart once, not at every token. An n-gram model's tables and an RNN's
    recurrent weights stay as they are.

    Raises:
      UsageError: `weights` is unknown, or the model has no weights that can be quantised.
    """
    errors.require(weights in WEIGHTS, f'weights must be one of {WEIGHTS}, got {weights!r}')
    network = dict(params['network'])
    blocks = [name for name in network if name.startswith('block_')]
    errors.require(
        not weights or bool(blocks), f'weights = {weights!r} is for GPTs; this model has no blocks'
    )
    for name in blocks:
        network[name] = _apart(network[name], weights)
    for name in _TABLES:
        if weights and name in network:
            network[name] = jax.jit(_quantize, static_argnums=(1, 2))(network[name], 1, weights)
    return {**params, 'network': network}


def _apart(stacked: Any, weights: Weights) -> tuple:
    """One tree a layer; every stacked array is dropped as soon as it is taken apart."""
    flat = traverse_util.flatten_dict(stacked, sep='/')
    repeats = next(iter(flat.values())).shape[0]
    layers: list[dict] = [{} for _ in range(repeats)]
    quantized = jax.jit(_quantize, static_argnums=(1, 2))
    for name in sorted(flat):
        array = flat.pop(name)
        for r in range(repeats):
            part = array[r]
            if weights and name.endswith('kernel'):
                summed = part.ndim - 1 if name.endswith('attention/out/kernel') else 1
                part = quantized(part, -summed, weights)
            layers[r][name] = part
    return tuple(traverse_util.unflatten_dict(layer, sep='/') for layer in layers)


def _quantize(weight: jax.Array, axes: int, weights: Weights) -> Quantized:
    """axes: how many trailing axes of a table are inputs, or, negative, leading ones of a kernel."""
    if axes > 0:
        weight_NxK = weight.reshape(-1, weight.shape[-1])
    else:
        weight_NxK = weight.reshape(math.prod(weight.shape[:-axes]), -1).T
    weight_NxK = weight_NxK.astype(jnp.float32)
    n_inputs = weight_NxK.shape[1]
    if weights == 'int8':
        groups, most = 1, 127
    else:
        size = _GROUP if n_inputs % _GROUP == 0 else n_inputs
        groups, most = n_inputs // size, 7
        errors.require(n_inputs % 2 == 0, f'int4 needs an even number of inputs, got {n_inputs}')
    grouped_NxGxI = weight_NxK.reshape(-1, groups, n_inputs // groups)
    scale_NxG = jnp.maximum(jnp.abs(grouped_NxGxI).max(axis=-1) / most, 1e-30)
    integers_NxK = jnp.round(grouped_NxGxI / scale_NxG[..., None]).reshape(-1, n_inputs)
    if weights == 'int8':
        return Quantized(integers_NxK.astype(jnp.int8), scale_NxG, weight.shape)
    low_NxJ, high_NxJ = jnp.split((integers_NxK + 8).astype(jnp.uint8), 2, axis=1)
    return Quantized(low_NxJ | (high_NxJ << 4), scale_NxG, weight.shape)


def _scaled(integers_NxK: jax.Array, scale_NxG: jax.Array) -> jax.Array:
    grouped_NxGxI = integers_NxK.reshape(*scale_NxG.shape, -1).astype(jnp.float32)
    return (grouped_NxGxI * scale_NxG[..., None]).reshape(integers_NxK.shape)
