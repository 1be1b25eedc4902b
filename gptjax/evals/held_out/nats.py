# SPDX-License-Identifier: Apache-2.0
"""What every held-out score is made of: -log p of each token, in nats."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.training import losses

NAMES = ('nats',)


def make(
    apply: Callable[..., Any], options: None
) -> Callable[[Any, Mapping[str, jax.Array]], losses.Sums]:
    """(parameters, batch of 'tokens', 'targets', 'weights') -> sums; without dropout.

    Args:
      apply: a language model's; its method 'nats' sums over a batch without holding the logits.
    """
    del options

    def measure(params: Any, batch: Mapping[str, jax.Array]) -> losses.Sums:
        arrays = (batch['tokens'], batch['targets'], batch['weights'])
        nats = apply({'params': params}, *arrays, method='nats')
        return {'nats': nats, 'weight': jnp.sum(batch['weights'])}

    return measure
