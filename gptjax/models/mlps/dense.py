# SPDX-License-Identifier: Apache-2.0
"""One feed-forward net for all tokens, gated (Shazeer 2020) or not."""

from typing import Any

import jax
from flax import linen as nn
from jaxtyping import Array, Float

from gptjax.models import axes, layers, mlp


def apply(
    module: nn.Module, config: Any, options: None, x_BxLxD: Float[Array, 'B L D']
) -> Float[Array, 'B L D']:
    """activation(x W_up) W_down, or (activation(x W_gate) x W_up) W_down."""
    del module, options
    numerics = (config.mlp_bias, config.param_dtype, config.compute_dtype)

    def widen(name: str) -> jax.Array:
        std = config.hidden_std(config.init_std)
        shape = (config.d_model, config.d_ff)
        linear = layers.Linear('BLD,DF->BLF', shape, ('embed', 'mlp'), std, *numerics, name=name)
        return axes.constrain(linear(x_BxLxD), 'batch', 'length', 'act_mlp')

    act = layers.in_float32(mlp.ACTIVATIONS[config.activation])
    y_BxLxF = act(widen('gate')) * widen('up') if config.gated_mlp else act(widen('up'))
    std = config.hidden_std(config.residual_init_std)
    shape = (config.d_ff, config.d_model)
    down = layers.Linear('BLF,FD->BLD', shape, ('mlp', 'embed'), std, *numerics, name='down')
    return axes.constrain(down(y_BxLxF), 'batch', 'length', 'act_embed')
