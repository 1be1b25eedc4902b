# SPDX-License-Identifier: Apache-2.0
"""How uncertain a model is of the next token, in nats; equal to its loss where it is calibrated."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.training import losses

NAMES = ('entropy',)


def make(
    apply: Callable[..., Any], options: None
) -> Callable[[Any, Mapping[str, jax.Array]], losses.Sums]:
    """(parameters, batch of 'tokens', 'weights') -> sums of -sum p log p over scored places."""
    del options

    def measure(params: Any, batch: Mapping[str, jax.Array]) -> losses.Sums:
        log_probs_BxLxV = jax.nn.log_softmax(apply({'params': params}, batch['tokens']))
        entropy_BxL = -jnp.sum(jnp.exp(log_probs_BxLxV) * log_probs_BxLxV, axis=-1)
        weights_BxL = batch['weights']
        return {'entropy': jnp.sum(entropy_BxL * weights_BxL), 'weight': jnp.sum(weights_BxL)}

    return measure
