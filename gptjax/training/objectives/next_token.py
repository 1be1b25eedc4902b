# SPDX-License-Identifier: Apache-2.0
"""What GPTs are pre-trained on: every next token (GPT-1 paper, equation 1)."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.training import losses


def make(apply: Callable[..., Any], options: None) -> losses.Loss:
    """The loss of a batch of 'tokens', 'targets' and 'weights', each (B, L).

    Args:
      apply: a language model's.
    """
    del options

    def loss(
        params: Any, batch: Mapping[str, jax.Array], rng: jax.Array
    ) -> tuple[jax.Array, losses.Sums]:
        arrays = (batch['tokens'], batch['targets'], batch['weights'])
        return losses.next_token(apply, params, *arrays, rng)

    return loss


def held_out(
    apply: Callable[..., Any], options: Any
) -> Callable[[Any, Mapping[str, jax.Array]], losses.Sums]:
    """How held-out text is scored: (parameters, batch) -> sums of nats and weights, no dropout.

    So it is, too, under every objective that has no function of this name.
    """
    del options

    def sums(params: Any, batch: Mapping[str, jax.Array]) -> losses.Sums:
        arrays = (batch['tokens'], batch['targets'], batch['weights'])
        nats = apply({'params': params}, *arrays, method='nats')
        return {'nats': nats, 'weight': jnp.sum(batch['weights'])}

    return sums
