# SPDX-License-Identifier: Apache-2.0
"""Losses: pure functions that return sums, divided once by the caller.

A Loss is (parameters, batch, dropout key) -> (objective, Sums): the sum whose gradient is followed,
and named sums with 'weight' among them. Objective and every other name are summed over microbatches
and hosts, divided by the weight, and logged: 'accuracy' as train/accuracy.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Sums = dict[str, jax.Array]
Loss = Callable[[Any, Mapping[str, jax.Array], jax.Array], tuple[jax.Array, Sums]]
# What layers sow beside their output (models/layers.py): to the objective, and to the log alone.
_ADDED = ('losses', 'measures')


def next_token(
    apply: Callable[..., Any],
    params: Any,
    tokens_BxL: Int[Array, 'B L'],
    targets_BxL: Int[Array, 'B L'],
    weights_BxL: Float[Array, 'B L'],
    rng: jax.Array,
) -> tuple[jax.Array, Sums]:
    """Next-token cross-entropy (GPT-1 paper, equation 1), and what layers add to it.

    Args:
      apply: a language model's; its method 'nats' sums over a batch without holding the logits.
      weights_BxL: 0 leaves a position out.
      rng: for dropout.
    """
    nats, sown = apply(
        {'params': params},
        tokens_BxL,
        targets_BxL,
        weights_BxL,
        rngs={'dropout': rng},
        method='nats',
        mutable=_ADDED,
    )
    return with_sown(nats, {'weight': jnp.sum(weights_BxL)}, sown)


def with_sown(objective: jax.Array, sums: Sums, sown: Mapping[str, Any]) -> tuple[jax.Array, Sums]:
    """Adds what layers sowed, means over a batch, as sums that its weight divides again."""
    found = dict(sums)
    for kind in _ADDED:
        for name, mean in _leaves(sown.get(kind, {})):
            found[name] = mean * sums['weight']
            objective += found[name] if kind == 'losses' else 0.0
    return objective, found


def lm(
    logits_BxLxV: Float[Array, 'B L V'],
    targets_BxL: Int[Array, 'B L'],
    weights_BxL: Float[Array, 'B L'],
) -> tuple[Float[Array, ''], Sums]:
    """Next-token cross-entropy of logits that are at hand (GPT-1 paper, equation 1).

    Args:
      logits_BxLxV: unnormalised scores.
      targets_BxL: the tokens that came.
      weights_BxL: 0 leaves a position out.

    Returns:
      the weighted sum of nats, and the sum of weights; both float32.
    """
    nats_BxL = token_nats(logits_BxLxV, targets_BxL)
    return jnp.sum(nats_BxL * weights_BxL), {'weight': jnp.sum(weights_BxL)}


def token_nats(
    logits_BxLxV: Float[Array, 'B L V'], targets_BxL: Int[Array, 'B L']
) -> Float[Array, 'B L']:
    """-log p of every target, in nats, float32."""
    logits_BxLxV = logits_BxLxV.astype(jnp.float32)
    chosen_BxL = jnp.take_along_axis(logits_BxLxV, targets_BxL[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BxLxV, axis=-1) - chosen_BxL


def _leaves(tree: Mapping[str, Any]) -> list[tuple[str, jax.Array]]:
    """(name, value) of every leaf."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return [(path[-1].key, value) for path, value in paths]
