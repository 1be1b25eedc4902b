# SPDX-License-Identifier: Apache-2.0
"""Products with a weight: an einsum, or on one CPU the forms that XLA runs fast there.

XLA:CPU multiplies bfloat16 at full speed only where the result is float32 and the left operand is
not transposed: elsewhere it converts to float32 first, at less than half the speed.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.models import axes, quantize

_FEW = 8  # rows up to which integers are multiplied as integers
_PIECES = 2  # of a transposed operand; a whole one XLA would not transpose in memory


def linear(
    spec: str, x: jax.Array, weight: jax.Array | quantize.ByOutput, bias: jax.Array | None = None
) -> jax.Array:
    """einsum(spec, x, weight) + bias in x's dtype, as 'BLD,DHK->BLHK'.

    Args:
      spec: the axes of x start with BL, those that are summed over come last in it and first in
        the weight; the result is BL and the weight's other axes.
      weight, bias: in any dtype; their gradients have that dtype, too.
    """
    if isinstance(weight, quantize.ByOutput):
        x_MxK = x.reshape(-1, math.prod(x.shape[2:]))
        shape = x.shape[:2] + weight.shape[len(spec.split(',')[0]) - 2 :]
        y = by_output(x_MxK, weight).astype(x.dtype).reshape(shape)
        return y if bias is None else y + bias.astype(x.dtype)[None, None]
    if axes.platform() != 'cpu' or axes.n_devices() > 1:
        y = jnp.einsum(spec, x, weight.astype(x.dtype))
        return y if bias is None else y + bias.astype(x.dtype)[None, None]
    summed = len(spec.split(',')[0]) - 2
    shape = x.shape[:2] + weight.shape[summed:]
    x_MxK = x.reshape(-1, math.prod(x.shape[2:]))
    weight_KxN = weight.reshape(x_MxK.shape[1], -1)
    bias_N = None if bias is None else bias.reshape(-1)
    dtypes = (weight.dtype, None if bias is None else bias.dtype)
    return _affine(x_MxK, weight_KxN, bias_N, dtypes).reshape(shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _affine(
    x_MxK: jax.Array, weight_KxN: jax.Array, bias_N: jax.Array | None, dtypes: tuple
) -> jax.Array:
    return _forward(x_MxK, weight_KxN, bias_N, dtypes)[0]


def _forward(
    x_MxK: jax.Array, weight_KxN: jax.Array, bias_N: jax.Array | None, dtypes: tuple
) -> tuple:
    del dtypes
    weight_KxN = weight_KxN.astype(x_MxK.dtype)
    y_MxN = _dot('MK,KN->MN', x_MxK, weight_KxN)
    if bias_N is not None:
        y_MxN += bias_N.astype(jnp.float32)[None]
    return y_MxN.astype(x_MxK.dtype), (x_MxK, weight_KxN)


def _backward(dtypes: tuple, kept: tuple, dy_MxN: jax.Array) -> tuple:
    x_MxK, weight_KxN = kept
    dx_MxK = _dot('MN,KN->MK', dy_MxN, weight_KxN).astype(x_MxK.dtype)
    dbias_N = None if dtypes[1] is None else dy_MxN.astype(jnp.float32).sum(0).astype(dtypes[1])
    return dx_MxK, outer(x_MxK, dy_MxN).astype(dtypes[0]), dbias_N


_affine.defvjp(_forward, _backward)


def outer(x_MxK: jax.Array, y_MxN: jax.Array) -> jax.Array:
    """float32 sums over M, of x's columns by y's."""
    if x_MxK.shape[1] > y_MxN.shape[1] and axes.platform() == 'cpu':
        return outer(y_MxN, x_MxK).T
    rows = x_MxK.shape[0]
    if x_MxK.dtype == jnp.float32 or rows % _PIECES or axes.platform() != 'cpu':
        return _dot('MK,MN->KN', x_MxK, y_MxN)
    x_KxM = jax.lax.optimization_barrier(x_MxK.T)
    pieces = zip(jnp.split(x_KxM, _PIECES, axis=1), jnp.split(y_MxN, _PIECES), strict=True)
    return sum(_dot('KM,MN->KN', *piece) for piece in pieces)


def by_output(x_MxK: jax.Array, weight: quantize.ByOutput) -> jax.Array:
    """float32 products (M, N) with a weight as decoding has it; quantised is the weight alone.

    XLA:CPU reads int8 fast only in products of integers, so there x goes in as two int8 parts, 16
    bits of the largest value of its row, where rows are few and reading weights is what takes time.
    """
    cpu = axes.platform() == 'cpu' and axes.n_devices() == 1
    if weight.is_int8 and cpu and x_MxK.shape[0] <= _FEW:
        high_MxK, low_MxK, scale_Mx1 = _parts(x_MxK.astype(jnp.float32))
        parts = jnp.concatenate([high_MxK, low_MxK])
        y_MxN = _weight_first(weight.values_NxJ, parts, jnp.int32).astype(jnp.float32)
        high_MxN, low_MxN = jnp.split(y_MxN, 2)
        return (high_MxN * 256 + low_MxN) * scale_Mx1 * weight.scale_NxG.T
    if weight.is_int8:
        return _dot('MK,NK->MN', x_MxK, weight.values_NxJ.astype(x_MxK.dtype)) * weight.scale_NxG.T
    if cpu:
        return _weight_first(weight.matrix(x_MxK.dtype), x_MxK, jnp.float32)
    return _dot('MK,NK->MN', x_MxK, weight.matrix(x_MxK.dtype))


def _weight_first(weight_NxK: jax.Array, x_MxK: jax.Array, dtype: Any) -> jax.Array:
    """Products (M, N), the weight as the left operand: up to twice as fast, M from 2 to 64."""
    y_NxM = jnp.einsum('NK,MK->NM', weight_NxK, x_MxK, preferred_element_type=dtype)
    return jax.lax.optimization_barrier(y_NxM).T  # else XLA would turn the product around


def _parts(x_MxK: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(high, low) in int8 and a scale: x is (256 high + low) scale."""
    scale_Mx1 = jnp.maximum(jnp.abs(x_MxK).max(axis=1, keepdims=True) / (127 * 256), 1e-30)
    whole_MxK = jnp.round(x_MxK / scale_Mx1).astype(jnp.int32)
    high_MxK = (whole_MxK + 128) >> 8
    return high_MxK.astype(jnp.int8), (whole_MxK - (high_MxK << 8)).astype(jnp.int8), scale_Mx1


def _dot(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)
