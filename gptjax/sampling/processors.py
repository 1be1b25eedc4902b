# SPDX-License-Identifier: Apache-2.0
"""Filters on next-token logits, in the order they apply: temperature, top-k, top-p.

Options are arrays, one value a row, so that the rows of a batch may differ without recompiling.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_NEVER = jnp.finfo(jnp.float32).min


def temperature(
    logits_BxV: Float[Array, 'B V'], temperature_B: Float[Array, ' B']
) -> Float[Array, 'B V']:
    """Logits over temperature; a temperature of 0 leaves only the most likely token."""
    scaled_BxV = logits_BxV / jnp.where(temperature_B > 0, temperature_B, 1.0)[:, None]
    best_BxV = jax.nn.one_hot(jnp.argmax(logits_BxV, axis=-1), logits_BxV.shape[-1], dtype=bool)
    greedy_BxV = jnp.where(best_BxV, 0.0, _NEVER)
    return jnp.where(temperature_B[:, None] > 0, scaled_BxV, greedy_BxV)


def top_k(logits_BxV: Float[Array, 'B V'], k_B: Int[Array, ' B']) -> Float[Array, 'B V']:
    """Keeps the k most likely tokens and all that tie with the last of them; 0 keeps all."""
    sorted_BxV = jnp.sort(logits_BxV, axis=-1, descending=True)
    last_B = jnp.clip(k_B, 1, logits_BxV.shape[-1]) - 1
    threshold_Bx1 = jnp.take_along_axis(sorted_BxV, last_B[:, None], axis=-1)
    keep_BxV = (logits_BxV >= threshold_Bx1) | (k_B[:, None] == 0)
    return jnp.where(keep_BxV, logits_BxV, _NEVER)


def top_p(logits_BxV: Float[Array, 'B V'], p_B: Float[Array, ' B']) -> Float[Array, 'B V']:
    """Keeps the fewest tokens whose probabilities reach p (nucleus; Holtzman et al. 2020, 3.1)."""
    order_BxV = jnp.argsort(logits_BxV, axis=-1, descending=True)
    sorted_BxV = jnp.take_along_axis(logits_BxV, order_BxV, axis=-1)
    probs_BxV = jax.nn.softmax(sorted_BxV, axis=-1)
    before_BxV = jnp.cumsum(probs_BxV, axis=-1) - probs_BxV
    keep_sorted_BxV = (before_BxV < p_B[:, None]) | (p_B[:, None] >= 1.0)
    keep_sorted_BxV = keep_sorted_BxV.at[:, 0].set(True)
    inverse_BxV = jnp.argsort(order_BxV, axis=-1)
    keep_BxV = jnp.take_along_axis(keep_sorted_BxV, inverse_BxV, axis=-1)
    return jnp.where(keep_BxV, logits_BxV, _NEVER)
