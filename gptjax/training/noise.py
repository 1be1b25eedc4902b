# SPDX-License-Identifier: Apache-2.0
"""The gradient noise scale: the batch from which on a larger one hardly helps.

McCandlish et al. 2018, An Empirical Model of Large-Batch Training: B = tr(S) / |G|^2 (equation
2.9), both estimated without bias from gradients of two sizes of batch (appendix A.1): of a step's
microbatches and of their mean.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

SQUARES, PIECES = 'noise_squares', 'noise_pieces'  # sums over microbatches, behind a loss's own
TRACE, SQUARE, SCALE = 'train/noise_trace', 'train/noise_square', 'train/noise_scale_tokens'


def of_piece(grads: Any, weight: jax.Array) -> dict[str, jax.Array]:
    """What a microbatch adds: the square of the norm of its mean gradient.

    Args:
      grads: summed over its tokens.
      weight: how many tokens count.
    """
    wide = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    square = jnp.square(optax.tree.norm(wide) / jnp.maximum(weight, 1.0))
    return {SQUARES: square, PIECES: jnp.ones((), jnp.float32)}


def measured(
    sums: Mapping[str, jax.Array], weight: jax.Array, grad_norm: jax.Array
) -> dict[str, jax.Array]:
    """tr(S), a token's, and |G|^2, of one step: each is right on average over steps.

    Their ratio is not: scale() takes it of means.

    Args:
      weight: of the whole batch. grad_norm: of its mean gradient.
    """
    large, small = weight, weight / sums[PIECES]
    of_small, of_large = sums[SQUARES] / sums[PIECES], jnp.square(grad_norm)
    return {
        TRACE: (of_small - of_large) / (1 / small - 1 / large),
        SQUARE: (large * of_large - small * of_small) / (large - small),
    }


def scale(means: Mapping[str, float]) -> dict[str, float]:
    """The noise scale in tokens, of means over steps; {} where they do not say."""
    if TRACE not in means or means[SQUARE] <= 0 or means[TRACE] <= 0:
        return {}
    return {SCALE: means[TRACE] / means[SQUARE]}
