# SPDX-License-Identifier: Apache-2.0
"""Adam (Kingma and Ba 2015, algorithm 1), its moments in the dtypes of the config.

The decay that makes it AdamW is decoupled, and follows in training/optim.py.
"""

from typing import Any

import jax
import optax

from gptjax.training import parameters


def make(
    config: Any, described: parameters.Described, options: None
) -> optax.GradientTransformation:
    """Sums are made in float32, whatever the moments are stored in.

    Args:
      config: training.optim.Config.
    """
    del described, options
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=config.mu_dtype)

    def stored(state: optax.ScaleByAdamState, dtype: str) -> optax.ScaleByAdamState:
        return state._replace(nu=jax.tree.map(lambda x: x.astype(dtype), state.nu))

    def init(params: Any) -> optax.ScaleByAdamState:
        return stored(adam.init(params), config.nu_dtype)

    def update(updates: Any, state: optax.ScaleByAdamState, params: Any = None) -> tuple:
        updates, state = adam.update(updates, stored(state, 'float32'), params)
        return updates, stored(state, config.nu_dtype)

    return optax.GradientTransformation(init, update)
