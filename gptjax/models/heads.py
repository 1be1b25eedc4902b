# SPDX-License-Identifier: Apache-2.0
"""What a decoder's hidden states are used for; for now, language modelling."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, ArrayLike, Float, Int

from gptjax.models import gpt


class LanguageModel(nn.Module):
    """Next-token logits through the tied embedding."""

    config: gpt.Config

    def setup(self) -> None:
        self.gpt = gpt.GPT(self.config)

    def __call__(
        self,
        tokens_BxL: Int[ArrayLike, 'B L'],
        positions_BxL: Int[ArrayLike, '#B L'] | None = None,
    ) -> Float[Array, 'B L V']:
        """float32 logits of the next token at every place; positions as in GPT."""
        return self.project(self.hidden(tokens_BxL, positions_BxL))

    def hidden(
        self,
        tokens_BxL: Int[ArrayLike, 'B L'],
        positions_BxL: Int[ArrayLike, '#B L'] | None = None,
    ) -> Float[Array, 'B L D']:
        """Hidden states, for losses that project a chunk at a time."""
        return self.gpt(tokens_BxL, positions_BxL)[0]

    def project(self, hidden_BxLxD: Float[Array, 'B L D']) -> Float[Array, 'B L V']:
        """float32 logits of hidden states."""
        return self.gpt.unembed(hidden_BxLxD)

    def extend(
        self,
        tokens_BxL: Int[ArrayLike, 'B L'],
        positions_BxL: Int[ArrayLike, 'B L'],
        cache: gpt.Cache,
    ) -> tuple[Float[Array, 'B 1 V'], gpt.Cache]:
        """Logits after the last of L tokens appended to a cache, and the longer cache."""
        hidden_BxLxD, cache = self.gpt(tokens_BxL, positions_BxL, cache)
        return self.project(hidden_BxLxD[:, -1:]), cache

    def init_params(self, rng: jax.Array) -> dict:
        """Boxed parameters, each with its logical axes; jit or eval_shape it."""
        return self.init(rng, jnp.zeros((1, 1), jnp.int32))['params']


def build(section: Mapping[str, Any]) -> LanguageModel:
    """The language model that a config's model section describes.

    Raises:
      UsageError: a field is unknown, missing or out of range.
    """
    return LanguageModel(gpt.Config(**section))
