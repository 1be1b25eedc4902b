# SPDX-License-Identifier: Apache-2.0
"""Losses: pure functions that return a sum of nats and its weight, divided once by the caller."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def next_token(apply: Callable[..., Any], dropout: bool = False) -> Callable[..., tuple]:
    """The loss of a batch of tokens, targets and weights: GPT-1 paper, equation 1.

    Args:
      apply: a language model's; its method 'nats' sums over a batch without holding the logits.
      dropout: whether the random key of the step is for it.
    """

    def loss(params: Any, batch: dict, rng: jax.Array | None = None) -> tuple:
        rngs = {'dropout': rng} if dropout else {}
        arrays = (batch['tokens'], batch['targets'], batch['weights'])
        nats = apply({'params': params}, *arrays, rngs=rngs, method='nats')
        return nats, jnp.sum(batch['weights'])

    return loss


def lm(
    logits_BxLxV: Float[Array, 'B L V'],
    targets_BxL: Int[Array, 'B L'],
    weights_BxL: Float[Array, 'B L'],
) -> tuple[Float[Array, ''], Float[Array, '']]:
    """Next-token cross-entropy (GPT-1 paper, equation 1).

    Args:
      logits_BxLxV: unnormalised scores.
      targets_BxL: the tokens that came.
      weights_BxL: 0 leaves a position out.

    Returns:
      the weighted sum of nats, and the sum of weights; both float32.
    """
    nats_BxL = token_nats(logits_BxLxV, targets_BxL)
    return jnp.sum(nats_BxL * weights_BxL), jnp.sum(weights_BxL)


def token_nats(
    logits_BxLxV: Float[Array, 'B L V'], targets_BxL: Int[Array, 'B L']
) -> Float[Array, 'B L']:
    """-log p of every target, in nats, float32."""
    logits_BxLxV = logits_BxLxV.astype(jnp.float32)
    chosen_BxL = jnp.take_along_axis(logits_BxLxV, targets_BxL[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BxLxV, axis=-1) - chosen_BxL
