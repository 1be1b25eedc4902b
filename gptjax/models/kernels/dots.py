# SPDX-License-Identifier: Apache-2.0
"""Products with a weight: an einsum, or on one CPU the forms that XLA runs fast there.

XLA:CPU multiplies bfloat16 at full speed only where the result is float32 and the left operand is
not transposed: elsewhere it converts to float32 first, at less than half the speed.
"""

import functools
import math

import jax
import jax.numpy as jnp

from gptjax.models import axes

_PIECES = 2  # of a transposed operand; a whole one XLA would not transpose in memory


def linear(spec: str, x: jax.Array, weight: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """einsum(spec, x, weight) + bias in x's dtype, as 'BLD,DHK->BLHK'.

    Args:
      spec: the axes of x start with BL, those that are summed over come last in it and first in
        the weight; the result is BL and the weight's other axes.
      weight, bias: in any dtype; their gradients have that dtype, too.
    """
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
def _affine(x_MxK: jax.Array, weight_KxN: jax.Array, bias_N: jax.Array | None, dtypes: tuple):
    return _forward(x_MxK, weight_KxN, bias_N, dtypes)[0]


def _forward(x_MxK, weight_KxN, bias_N, dtypes):
    del dtypes
    weight_KxN = weight_KxN.astype(x_MxK.dtype)
    y_MxN = _dot('MK,KN->MN', x_MxK, weight_KxN)
    if bias_N is not None:
        y_MxN += bias_N.astype(jnp.float32)[None]
    return y_MxN.astype(x_MxK.dtype), (x_MxK, weight_KxN)


def _backward(dtypes, kept, dy_MxN):
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


def _dot(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)
