# SPDX-License-Identifier: Apache-2.0
"""The layers every model of the line is made of; each weight is declared once."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec

from gptjax.models import axes, quantize
from gptjax.models.kernels import dots


def weight(module: nn.Module, name: str, init: Callable, *args: Any) -> Any:
    """module.param, which also takes what decoding made of a parameter (models/quantize.py)."""
    if module.has_variable('params', name):
        found = module.get_variable('params', name)
        if isinstance(found, (tuple, quantize.ByOutput)):
            return found
    return module.param(name, init, *args)


class Linear(nn.Module):
    """An einsum with one weight, as 'BLD,DHK->BLHK'; the bias spans the output's new axes.

    Attributes:
      spec: input starting with BL, then weight, then output.
      shape: of the weight.
      names: logical axes of the weight.
      init_std: standard deviation of the normal initialisation; biases start at 0.
    """

    spec: str
    shape: tuple[int, ...]
    names: tuple[str, ...]
    init_std: float
    use_bias: bool
    param_dtype: str
    compute_dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        inputs, output = self.spec.split('->')
        letters = inputs.split(',')[1]
        param_dtype = jnp.dtype(self.param_dtype)
        summed = tuple(i for i, letter in enumerate(letters) if letter in inputs.split(',')[0])
        init = axes.matrix(
            nn.initializers.normal(self.init_std), *self.names, inputs=summed, turns=True
        )
        kernel = weight(self, 'kernel', init, self.shape, param_dtype)
        bias = None
        if self.use_bias:
            new = [letters.index(letter) for letter in output[2:]]
            init = axes.vector(nn.initializers.zeros, *(self.names[i] for i in new))
            bias = self.param('bias', init, tuple(self.shape[i] for i in new), param_dtype)
        return dots.linear(self.spec, x.astype(jnp.dtype(self.compute_dtype)), kernel, bias)


class Norm(nn.Module):
    """Normalisation over the last axis, computed in float32; of any rank.

    Attributes:
      kind: a key of NORMS.
      eps: added to the variance.
      axis: logical name of the last axis.
    """

    kind: str
    eps: float
    use_bias: bool
    param_dtype: str
    axis: str = 'embed'

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def weight(name: str, init: axes.Initializer) -> jax.Array:
            init = axes.vector(init, self.axis)
            found = self.param(name, init, x.shape[-1:], jnp.dtype(self.param_dtype))
            return found.astype(jnp.float32).reshape(*(1,) * (x.ndim - 1), -1)

        y = NORMS[self.kind](x.astype(jnp.float32), self.eps)
        y *= weight('scale', nn.initializers.ones)
        if self.use_bias:
            y += weight('bias', nn.initializers.zeros)
        return y.astype(x.dtype)


class Dropout(nn.Module):
    """Zeroes a share of a batch's values, where a 'dropout' rng is given (Srivastava et al. 2014).

    What becomes of a row depends on its number in the batch alone, if variables('rows') say it:
    neither on how rows are spread over devices, nor on how they are cut into microbatches.

    Attributes:
      rate: the share.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if not self.rate or not self.has_rng('dropout'):
            return x
        numbers = rows(self).get('numbers', jnp.arange(len(x)))
        each = len(x) // len(numbers)  # of several, where an example of the batch is several rows
        numbers = jnp.repeat(numbers, each) * each + jnp.tile(jnp.arange(each), len(numbers))
        kept = _drawn(self.make_rng('dropout'), numbers, 1 - self.rate, x.shape[1:])
        return jnp.where(kept, x / (1 - self.rate), 0)


def _drawn(key: jax.Array, numbers: jax.Array, share: float, shape: tuple[int, ...]) -> jax.Array:
    """Booleans (B, *shape), a share of them true, of which each row's depend on its number."""

    def row(key: jax.Array, number: jax.Array) -> jax.Array:
        return jax.random.bernoulli(jax.random.fold_in(key, number), share, shape)

    if 'rbg' not in str(jax.random.key_impl(key)):
        return jax.vmap(row, (None, 0))(key, numbers)

    # Under vmap, and over devices, what XLA's own generator draws would depend on who draws it.
    def draw(key: jax.Array, numbers: jax.Array) -> jax.Array:
        return jax.lax.map(functools.partial(row, key), numbers)

    if axes.n_devices() == 1:
        return draw(key, numbers)
    of_rows = axes.spec('batch')
    drawn = PartitionSpec(*of_rows, *(None,) * len(shape))
    return axes.shard_map(draw, (PartitionSpec(), of_rows), drawn)(key, numbers)


def rows(module: nn.Module) -> dict[str, jax.Array]:
    """What apply() was told of a batch's rows, as {'rows': {'numbers': ...}} beside the parameters.

    numbers: (B,), of the rows at hand in the whole batch.
    """
    return module.scope.root.variables().get('rows', {})


def _layer(x: jax.Array, eps: float) -> jax.Array:
    """LayerNorm (Ba et al. 2016)."""
    return _rms(x - x.mean(axis=-1, keepdims=True), eps)


def _rms(x: jax.Array, eps: float) -> jax.Array:
    """RMSNorm, which does not centre (Zhang and Sennrich 2019)."""
    return x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + eps)


NORMS = {'layer': _layer, 'rms': _rms}


def sow_loss(module: nn.Module, name: str, mean: jax.Array) -> None:
    """Adds to the training objective, and logs as train/<name>, the sum over the layers.

    What a part of a layer sows is logged as train/<part>/<name>.

    Args:
      mean: over the tokens of a batch, in nats a token.
    """
    module.sow('losses', name, mean, reduce_fn=jnp.add, init_fn=lambda: jnp.zeros(()))


def sow_measure(module: nn.Module, name: str, mean: jax.Array) -> None:
    """Logs as train/<name> the mean over the layers of what is a mean over tokens."""
    module.sow('measures', name, mean, reduce_fn=jnp.add, init_fn=lambda: jnp.zeros(()))


def logits(hidden_BxLxD: jax.Array, table_VxD: jax.Array | quantize.ByOutput) -> jax.Array:
    """float32 logits (B, L, V) of hidden states, through a table of one vector a token."""
    if isinstance(table_VxD, quantize.ByOutput):
        hidden_MxD = hidden_BxLxD.reshape(-1, hidden_BxLxD.shape[2])
        return dots.by_output(hidden_MxD, table_VxD).reshape(*hidden_BxLxD.shape[:2], -1)
    logits_BxLxV = jnp.einsum(
        'BLD,VD->BLV',
        hidden_BxLxD,
        table_VxD.astype(hidden_BxLxD.dtype),
        preferred_element_type=jnp.float32,
    )
    return axes.constrain(logits_BxLxV, 'batch', 'length', 'act_vocab')


def in_float32(function: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """An elementwise function computed in float32, of which only the argument is kept."""

    def apply(x: jax.Array) -> jax.Array:
        return function(x.astype(jnp.float32)).astype(x.dtype)

    return jax.checkpoint(apply, prevent_cse=False)
