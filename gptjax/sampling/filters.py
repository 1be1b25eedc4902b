# SPDX-License-Identifier: Apache-2.0
"""Which tokens are left to draw from: logits with minus infinity for the others."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_BITS = 32  # of a float's rank
_MOST_OF_TOP_H = 100  # tokens, as in transformers


def top_h(logits_BxV: Float[Array, 'B V'], h_B: Float[Array, ' B']) -> Float[Array, 'B V']:
    """Keeps the likeliest whose entropy terms stay within h of the whole (Potraghloo et al. 2025).

    As transformers', it looks at the 100 most likely tokens alone.
    """
    best_BxN = jax.lax.top_k(logits_BxV, min(_MOST_OF_TOP_H, logits_BxV.shape[1]))[0]
    sum_BxN = jnp.cumsum(_entropy_terms(best_BxN), axis=-1)
    kept_B = (sum_BxN <= h_B[:, None] * sum_BxN[:, -1:]).sum(axis=-1)
    return top_k(logits_BxV, jnp.maximum(kept_B, 1))


def top_k(logits_BxV: Float[Array, 'B V'], k_B: Int[Array, ' B']) -> Float[Array, 'B V']:
    """Keeps the k most likely tokens (Fan et al. 2018), and what ties with the last of them."""
    zero_B = jnp.zeros(k_B.shape)
    return _keep(logits_BxV, logits_BxV, jnp.zeros_like(logits_BxV), zero_B, k_B)


def top_p(
    logits_BxV: Float[Array, 'B V'], p_B: Float[Array, ' B'], keep_B: Int[Array, ' B']
) -> Float[Array, 'B V']:
    """Keeps the fewest tokens whose probabilities reach p (nucleus; Holtzman et al. 2020, 3.1)."""
    probs_BxV = jax.nn.softmax(logits_BxV, axis=-1)
    return _keep(logits_BxV, logits_BxV, probs_BxV, p_B, keep_B)


def min_p(
    logits_BxV: Float[Array, 'B V'], p_B: Float[Array, ' B'], keep_B: Int[Array, ' B']
) -> Float[Array, 'B V']:
    """Keeps the tokens at least p times as likely as the likeliest (Nguyen et al. 2024)."""
    most_B = jax.nn.softmax(logits_BxV, axis=-1).max(axis=-1)
    return _at_least(logits_BxV, p_B * most_B, keep_B)


def typical_p(
    logits_BxV: Float[Array, 'B V'], p_B: Float[Array, ' B'], keep_B: Int[Array, ' B']
) -> Float[Array, 'B V']:
    """Keeps the fewest tokens, the most typical first, that reach p (Meister et al. 2022)."""
    log_BxV = jax.nn.log_softmax(logits_BxV, axis=-1)
    probs_BxV = jnp.exp(log_BxV)
    entropy_Bx1 = _entropy_terms(logits_BxV).sum(axis=-1, keepdims=True)
    near_BxV = -jnp.abs(-log_BxV - entropy_Bx1)
    return _keep(logits_BxV, near_BxV, probs_BxV, p_B, keep_B)


def epsilon(
    logits_BxV: Float[Array, 'B V'], epsilon_B: Float[Array, ' B'], keep_B: Int[Array, ' B']
) -> Float[Array, 'B V']:
    """Keeps the tokens of at least this probability (Hewitt et al. 2022)."""
    return _at_least(logits_BxV, epsilon_B, keep_B)


def eta(
    logits_BxV: Float[Array, 'B V'], epsilon_B: Float[Array, ' B'], keep_B: Int[Array, ' B']
) -> Float[Array, 'B V']:
    """... or, where less is sure, of sqrt(epsilon) exp(-entropy) (the same paper)."""
    entropy_B = _entropy_terms(logits_BxV).sum(axis=-1)
    least_B = jnp.minimum(epsilon_B, jnp.sqrt(epsilon_B) * jnp.exp(-entropy_B))
    return _at_least(logits_BxV, least_B, keep_B)


def _at_least(logits_BxV: jax.Array, least_B: jax.Array, keep_B: jax.Array) -> jax.Array:
    """Keeps the tokens of at least a probability, and the keep_B most likely."""
    likely_BxV = jax.nn.softmax(logits_BxV, axis=-1) >= least_B[:, None]
    few_BxV = jnp.isfinite(top_k(logits_BxV, keep_B))
    return jnp.where(likely_BxV | few_BxV, logits_BxV, -jnp.inf)


def _entropy_terms(logits_BxN: jax.Array) -> jax.Array:
    """-p log p of every token."""
    log_BxN = jax.nn.log_softmax(logits_BxN, axis=-1)
    probs_BxN = jnp.exp(log_BxN)
    return -jnp.where(probs_BxN > 0, probs_BxN * log_BxN, 0)


def _keep(
    logits_BxV: jax.Array,
    score_BxV: jax.Array,
    weight_BxV: jax.Array,
    mass_B: jax.Array,
    count_B: jax.Array,
) -> jax.Array:
    """Keeps the best by score: the fewest whose weights reach a mass, at least so many.

    The score to keep from is found by halving, bit by bit of its rank among floats: exact, without
    sorting the vocabulary.
    """
    count_B = jnp.minimum(count_B, logits_BxV.shape[1])
    mass_B = jnp.minimum(mass_B, weight_BxV.sum(axis=-1) * (1 - 1e-6))  # p = 1 is reached, too
    rank_BxV = _rank(score_BxV)

    def narrow(i: Any, found_B: jax.Array) -> jax.Array:
        tried_B = found_B | (jnp.uint32(1) << (_BITS - 1 - i).astype(jnp.uint32))
        in_BxV = rank_BxV >= tried_B[:, None]
        enough_B = (jnp.where(in_BxV, weight_BxV, 0).sum(axis=-1) >= mass_B) & (
            in_BxV.sum(axis=-1) >= count_B
        )
        return jnp.where(enough_B, tried_B, found_B)

    first_B = jax.lax.fori_loop(0, _BITS, narrow, jnp.zeros(count_B.shape, jnp.uint32))
    return jnp.where(rank_BxV >= first_B[:, None], logits_BxV, -jnp.inf)


def _rank(x: jax.Array) -> jax.Array:
    """uint32 in the order of float32s."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))
