# SPDX-License-Identifier: Apache-2.0
"""Parameters as decoding reads them: layers apart, outputs first, int8 or int4 by choice.

Weight-only quantisation, rounding to nearest: int8 is symmetric with one scale an output channel
(LLM.int8(), Dettmers et al. 2022, section 2.1); int4 runs from the least to the largest of a group
of inputs of an output channel (ZeroQuant, Yao et al. 2022, section 4.1). In int4, embeddings are
int8. Norms and biases stay as they are. What that costs in perplexity: docs/generate.md.
"""

import functools
import math
from collections.abc import Mapping
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
Described = Mapping[str, axes.Parameter]  # by path


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
        """Rows of some output channels: the vectors of tokens, where the weight is an embedding."""
        part = jax.tree.map(lambda x: x[index_BxL.ravel()], self)
        return part.matrix(dtype).reshape(*index_BxL.shape, -1)


def for_decoding(
    params: Any, described: Described, weights: Weights = '', consume: bool = False
) -> Any:
    """The parameters of a language model in the form that decodes fastest.

    Stacked layers are taken apart once, not at every token. On one CPU, weights are turned to
    outputs first: XLA multiplies few rows up to twice as fast then (LOG.md). What no layer can read
    turned (an n-gram model's tables, an RNN's recurrent weights) stays as it is.

    Args:
      described: axes.describe() of the boxed parameters, or heads.describe() of the model.
      weights: 'int8' or 'int4' quantises.
      consume: empties `params`, so that a stacked array is freed as soon as it is taken apart.

    Raises:
      UsageError: `weights` is unknown, or the model has no weights that can be quantised.
    """
    errors.require(weights in WEIGHTS, f'weights must be one of {WEIGHTS}, got {weights!r}')
    errors.require(
        not weights or any(about.turns for about in described.values()),
        f'weights = {weights!r} is for GPTs; this model has no weights that can be quantised',
    )
    turned = bool(weights) or (axes.platform() == 'cpu' and axes.n_devices() == 1)
    network = params['network'] if consume else dict(params['network'])
    for name in list(network):
        path = f'network/{name}'
        if path not in described:  # a stack of layers
            network[name] = _apart(network.pop(name), path, described, weights, turned)
        elif turned and described[path].turns:
            network[name] = _turn(network[name], described[path], weights)
    return {**params, 'network': network}


def _apart(stacked: Any, above: str, described: Described, weights: Weights, turned: bool) -> Any:
    """One tree a layer; a branch that is not stacked stays as it is."""
    flat = traverse_util.flatten_dict(stacked, sep='/')
    if not all(described[f'{above}/{name}'].stacked for name in flat):
        return stacked
    del stacked
    repeats = next(iter(flat.values())).shape[0]
    layers: list[dict] = [{} for _ in range(repeats)]
    for name in sorted(flat):
        array, about = flat.pop(name), described[f'{above}/{name}'].unstack()
        for r in range(repeats):
            part = array[r]
            if turned and about.turns:
                part = _turn(part, about, weights)
            layers[r][name] = part
    return tuple(traverse_util.unflatten_dict(layer, sep='/') for layer in layers)


def _turn(weight: jax.Array, about: axes.Parameter, weights: Weights) -> ByOutput:
    """Tables are int8 in int4, too."""
    if about.kind == 'table' and weights:
        weights = 'int8'
    return turn(weight, about.inputs, about.outputs, weights)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def turn(
    weight: jax.Array, inputs: tuple[int, ...], outputs: tuple[int, ...], weights: Weights
) -> ByOutput:
    """A weight by its output channels, rounded where `weights` asks for it.

    Args:
      inputs: the axes that are summed over. outputs: the others.
    """
    n_outputs = math.prod(weight.shape[axis] for axis in outputs)
    weight_NxK = weight.transpose(*outputs, *inputs).reshape(n_outputs, -1)
    if not weights:
        return ByOutput(weight_NxK, None, None, weight.shape)
    weight_NxK = weight_NxK.astype(jnp.float32)
    if weights == 'int8':
        scale_Nx1 = jnp.maximum(jnp.abs(weight_NxK).max(axis=1, keepdims=True) / 127, _TINY)
        return ByOutput(
            jnp.round(weight_NxK / scale_Nx1).astype(jnp.int8), scale_Nx1, None, weight.shape
        )
    n_inputs = weight_NxK.shape[1]
    errors.require(n_inputs % 2 == 0, f'int4 needs an even number of inputs, got {n_inputs}')
    size = _GROUP if n_inputs % _GROUP == 0 else n_inputs
    grouped_NxGxI = weight_NxK.reshape(n_outputs, -1, size)
    least_NxG = grouped_NxGxI.min(axis=-1)
    scale_NxG = jnp.maximum((grouped_NxGxI.max(axis=-1) - least_NxG) / _LEVELS, _TINY)
    grouped_NxGxI = jnp.round((grouped_NxGxI - least_NxG[..., None]) / scale_NxG[..., None])
    integers_NxK = grouped_NxGxI.astype(jnp.uint8).reshape(weight_NxK.shape)
    low_NxJ, high_NxJ = jnp.split(integers_NxK, 2, axis=1)
    return ByOutput(low_NxJ | (high_NxJ << 4), scale_NxG, least_NxG, weight.shape)
