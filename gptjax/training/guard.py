# SPDX-License-Identifier: Apache-2.0
"""Knows a loss spike: how losses have been lately, and whether the newest is far above them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

_HORIZON = 100  # steps that are remembered, about
_WARM_UP = 50  # steps before anything finite counts as a spike


class Guard(NamedTuple):
    """Running moments of the loss over steps that were no spikes; part of the train state."""

    count: jax.Array
    mean: jax.Array
    variance: jax.Array


def empty() -> Guard:
    """The guard of a run that begins: nothing was seen yet."""
    return Guard(jnp.zeros((), jnp.int32), jnp.zeros(()), jnp.zeros(()))


def look(
    guard: Guard, loss: jax.Array, grad_norm: jax.Array, sigmas: float
) -> tuple[Guard, jax.Array]:
    """The guard after a step, and whether the step was a spike.

    Args:
      loss: mean nats of the step.
      grad_norm: before clipping.
      sigmas: standard deviations above the mean that make a spike, 0 = only what is not finite.
    """
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    spike = ~finite
    if sigmas:
        limit = guard.mean + sigmas * jnp.sqrt(guard.variance)
        spike |= (guard.count >= _WARM_UP) & (loss > limit)
    count = guard.count + 1
    rate = 1.0 / jnp.minimum(count, _HORIZON)
    difference = loss - guard.mean
    new = Guard(
        count,
        guard.mean + rate * difference,
        (1 - rate) * (guard.variance + rate * jnp.square(difference)),
    )
    return jax.tree.map(lambda old, new: jnp.where(spike, old, new), guard, new), spike
