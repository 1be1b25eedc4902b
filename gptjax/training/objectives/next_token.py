# SPDX-License-Identifier: Apache-2.0
"""What GPTs are pre-trained on: every next token (GPT-1 paper, equation 1)."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

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
