# SPDX-License-Identifier: Apache-2.0
"""Parameters as decoding reads them: layers apart, outputs first, int8 or int4 by choice.

Weight-only quantisation, rounding to nearest: int8 is symmetric with one scale an output channel
(LLM.int8(), Dettmers et al. 2022, section 2.1); int4 runs from the least to the largest of a group
of inputs of an output channel (ZeroQuant, Yao et al. 2022, section 4.1). In int4, embeddings are
int8. Norms and biases stay as they are. What that costs in perplexity: docs/generate.md.
"""

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct, traverse_util
from jaxtyping import Array, Float, Shaped

from gptjax.configs import errors
from gptjax.models import axes

Weights = Literal['', 'int8', 'int4']
WEIGHTS = ('', 'int8', 'int4')
_GROUP = 32  # inputs that share a scale in int4
_LEVELS = 15  # steps from the least to the largest of them
_TINY = 1e-30  # in place of the scale of zeros
_TABLES = ('token_embedding', 'unembedding')  # (vocab, embed): one output channel a row


@struct.dataclass
class ByOutput:
    """A weight of N output channels by K inputs, or integers and the scales that make it one.

    In int4 a byte holds two: the low halves are the first K / 2 inputs, the high ones the others.
    """

    values_NxJ: Shaped[Array, 'N J']
    scale_NxG: Float[Array, 'N G'] | None  # None = the values are the weight
    least_NxG: Float[Array, 'N G'] | None  # what an int4 of 0 stands for
    shape: tuple[int, ...] = struct.field(pytree_node=False)  # of the parameter that it was

    @property
    def is_int8(self) -> bool:
        return self.values_NxJ.dtype == jnp.int8

    def matrix(self, dtype: Any) -> Float[Array, 'N K']:
        """The weight, outputs first; rounded where it is quantised."""
        if self.scale_NxG is None:
            return self.values_NxJ.astype(dtype)
        if self.is_int8:
            return (self.values_NxJ * self.scale_NxG).astype(dtype)
        halves = [self.values_NxJ & 15, self.values_NxJ >> 4]
        integers_NxK = jnp.concatenate(halves, axis=1).astype(jnp.float32)
        grouped_NxGxI = integers_NxK.reshape(*self.scale_NxG.shape, -1)
        grouped_NxGxI = grouped_NxGxI * self.scale_NxG[..., None] + self.least_NxG[..., None]
        return grouped_NxGxI.reshape(integers_NxK.shape).astype(dtype)

    def rows(self, index_BxL: jax.Array, dtype: Any) -> Float[Array, 'B L K']:
        """Of some output channels: the vectors of tokens, where the weight is an embedding."""
        part = jax.tree.map(lambda x: x[index_BxL.ravel()], self)
        return part.matrix(dtype).reshape(*index_BxL.shape, -1)


def for_decoding(params: Any, weights: Weights = '', consume: bool = False) -> Any:
    """The parameters of a language model in the form that decodes fastest.

    Stacked layers are taken apart once, not at every token. On one CPU, weights are turned to
    outputs first: XLA multiplies few rows up to twice as fast then (LOG.md). An n-gram model's
    tables and an RNN's recurrent weights stay as they are.

    Args:
      weights: 'int8' or 'int4' quantises.
      consume: empties `params`, so that a stacked array is freed as soon as it is taken apart.

    Raises:
      UsageError: `weights` is unknown, or the model has no weights that can be quantised.
    """
    errors.require(weights in WEIGHTS, f'weights must be one of {WEIGHTS}, got {weights!r}')
    network = params['network'] if consume else dict(params['network'])
    blocks = [name for name in network if name.startswith('block_')]
    errors.require(
        not weights or bool(blocks), f'weights = {weights!r} is for GPTs; this model has no blocks'
    )
    turned = bool(weights) or (axes.platform() == 'cpu' and axes.n_devices() == 1)
    for name in blocks:
        network[name] = _apart(network.pop(name), weights, turned)
    for name in _TABLES if blocks and turned else ():
        if name in network:
            table = network[name]
            plain = ByOutput(table, None, None, table.shape)
            network[name] = _turn(table, -1, 'int8') if weights else plain
    return {**params, 'network': network}


def _apart(stacked: Any, weights: Weights, turned: bool) -> tuple:
    """One tree a layer."""
    flat = traverse_util.flatten_dict(stacked, sep='/')
    del stacked
    repeats = next(iter(flat.values())).shape[0]
    layers: list[dict] = [{} for _ in range(repeats)]
    for name in sorted(flat):
        array = flat.pop(name)
        for r in range(repeats):
            part = array[r]
            if turned and name.endswith('kernel'):
                inputs = part.ndim - 1 if name.endswith('attention/out/kernel') else 1
                part = _turn(part, inputs, weights)
            layers[r][name] = part
    return tuple(traverse_util.unflatten_dict(layer, sep='/') for layer in layers)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _turn(weight: jax.Array, inputs: int, weights: Weights) -> ByOutput:
    """inputs: how many leading axes are summed over; -1 = the last one is, as of a table."""
    weight_NxK = weight if inputs < 0 else weight.reshape(math.prod(weight.shape[:inputs]), -1).T
    if not weights:
        return ByOutput(weight_NxK, None, None, weight.shape)
    weight_NxK = weight_NxK.astype(jnp.float32)
    if weights == 'int8':
        scale_Nx1 = jnp.maximum(jnp.abs(weight_NxK).max(axis=1, keepdims=True) / 127, _TINY)
        return ByOutput(
            jnp.round(weight_NxK / scale_Nx1).astype(jnp.int8), scale_Nx1, None, weight.shape
        )
    n_outputs, n_inputs = weight_NxK.shape
    errors.require(n_inputs % 2 == 0, f'int4 needs an even number of inputs, got {n_inputs}')
    size = _GROUP if n_inputs % _GROUP == 0 else n_inputs
    grouped_NxGxI = weight_NxK.reshape(n_outputs, -1, size)
    least_NxG = grouped_NxGxI.min(axis=-1)
    scale_NxG = jnp.maximum((grouped_NxGxI.max(axis=-1) - least_NxG) / _LEVELS, _TINY)
    grouped_NxGxI = jnp.round((grouped_NxGxI - least_NxG[..., None]) / scale_NxG[..., None])
    integers_NxK = grouped_NxGxI.astype(jnp.uint8).reshape(weight_NxK.shape)
    low_NxJ, high_NxJ = jnp.split(integers_NxK, 2, axis=1)
    return ByOutput(low_NxJ | (high_NxJ << 4), scale_NxG, least_NxG, weight.shape)
