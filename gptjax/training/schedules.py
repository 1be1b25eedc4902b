# SPDX-License-Identifier: Apache-2.0
"""What the learning rate does from the end of the warm-up on, by name.

A schedule is a function of how far training is and of a Span, all in one unit, to the share of the
peak rate. To add one: a function, and a line in SCHEDULES.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Span(NamedTuple):
    """What a schedule knows of training, in its unit."""

    warmup: float
    end: float  # of the decay, warm-up included
    cooldown: float
    final: float  # share of the peak rate at the end


class Schedule(NamedTuple):
    """A schedule, and the durations that it wants above 0: 'warmup', 'cooldown'."""

    share: Callable[[jax.Array, Span], jax.Array]
    wants: tuple[str, ...] = ()


def _done(at: jax.Array, begin: float, end: float) -> jax.Array:
    """How much of the way from `begin` to `end` lies behind, from 0 to 1."""
    return jnp.clip((at - begin) / ((end - begin) or 1.0), 0.0, 1.0)


def _cosine(at: jax.Array, span: Span) -> jax.Array:
    done = _done(at, span.warmup, span.end)
    return span.final + (1 - span.final) * 0.5 * (1 + jnp.cos(jnp.pi * done))


def _linear(at: jax.Array, span: Span) -> jax.Array:
    return 1 - (1 - span.final) * _done(at, span.warmup, span.end)


def _constant(at: jax.Array, span: Span) -> jax.Array:
    del span
    return jnp.ones_like(at)


def _wsd(at: jax.Array, span: Span) -> jax.Array:
    """Stable, then a linear decay in the cool-down (Hu et al. 2024, MiniCPM, section 4.2)."""
    return 1 - (1 - span.final) * _done(at, span.end - span.cooldown, span.end)


def _inverse_sqrt(at: jax.Array, span: Span) -> jax.Array:
    """The root of warm-up / time (Vaswani et al. 2017, section 5.3)."""
    return jnp.sqrt(span.warmup / jnp.maximum(at, span.warmup))


SCHEDULES = {
    'cosine': Schedule(_cosine),
    'linear': Schedule(_linear),
    'constant': Schedule(_constant),
    'wsd': Schedule(_wsd, wants=('cooldown',)),
    'inverse_sqrt': Schedule(_inverse_sqrt, wants=('warmup',)),
}
