# SPDX-License-Identifier: Apache-2.0
"""The feed-forward net of a block, by name: a module of gptjax.models.mlps.

Such a module has apply(module, config, options, x_BxLxD) -> y_BxLxD, called where the block is
built (inside its compact method), so that layers made there are the block's; `module` is the block,
for parameters of its own and for layers.sow_loss. Its options are the fields of its dataclass
Options.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
from flax import linen as nn
from jaxtyping import Array, Float

from gptjax.configs import errors, lookup

_PACKAGE = 'gptjax.models.mlps'
ACTIVATIONS = {
    'gelu_tanh': functools.partial(jax.nn.gelu, approximate=True),  # all of OpenAI's released code
    'gelu': functools.partial(jax.nn.gelu, approximate=False),
    'relu': jax.nn.relu,
    'silu': jax.nn.silu,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What gpt.Config says of feed-forward nets; explained in configs/sections/models.py."""

    mlp: str
    d_ff: int
    activation: Literal['gelu_tanh', 'gelu', 'relu', 'silu']
    gated_mlp: bool
    mlp_bias: bool

    def __post_init__(self) -> None:
        errors.require_positive(self, 'd_ff')
        errors.require_choice(self, 'activation', tuple(ACTIVATIONS))
        lookup.plug_in(_PACKAGE, self.mlp)


def feed_forward(
    module: nn.Module, config: Any, x_BxLxD: Float[Array, 'B L D']
) -> Float[Array, 'B L D']:
    """Applies the net that `config` (gpt.Config) names, inside a compact method of `module`."""
    found, options = lookup.plug_in(_PACKAGE, config.mlp)
    return found.apply(module, config, options, x_BxLxD)
