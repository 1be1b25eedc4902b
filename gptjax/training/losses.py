# SPDX-License-Identifier: Apache-2.0
"""Losses: pure functions that return sums, divided once by the caller.

A Loss is (parameters, batch, dropout key) -> (objective, Sums): the sum whose gradient is followed,
and named sums with 'weight' among them. Objective and every other name are summed over microbatches
and hosts, divided by the weight, and logged: 'accuracy' as train/accuracy. The key is that of the
whole batch: what is drawn for a row depends on its number, which batch['rows'] says.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gptjax.configs import errors

Sums = dict[str, jax.Array]
Loss = Callable[[Any, Mapping[str, jax.Array], jax.Array], tuple[jax.Array, Sums]]
ROWS = 'rows'  # of a batch: the numbers of its rows, (B,)
_SOWN = ('losses', 'measures')  # of layers: to the objective, and to the log alone


def next_token(
    apply: Callable[..., Any],
    params: Any,
    tokens_BxL: Int[Array, 'B L'],
    targets_BxL: Int[Array, 'B L'],
    weights_BxL: Float[Array, 'B L'],
    rng: jax.Array,
) -> tuple[jax.Array, Sums]:
    """Next-token cross-entropy (GPT-1 paper, equation 1).

    Args:
      apply: a language model's; its method 'nats' sums over a batch without holding the logits.
      weights_BxL: 0 leaves a position out.
      rng: for dropout.
    """
    arrays = (tokens_BxL, targets_BxL, weights_BxL)
    nats = apply({'params': params}, *arrays, rngs={'dropout': rng}, method='nats')
    return nats, {'weight': jnp.sum(weights_BxL)}


def with_sown(
    make: Callable[[Callable[..., Any], Any], Loss],
    apply: Callable[..., Any],
    options: Any,
    z_loss: float = 0.0,
) -> Loss:
    """The loss that an objective makes, and what layers sow in it (models/layers.py).

    Their losses are added to the objective, their losses and measures to the sums; where the
    objective calls `apply` several times, as means over the calls. So it must not be called inside
    of a scan.

    Args:
      make: of a module of gptjax.training.objectives.
      apply: a model's.
      options: of the objective.
      z_loss: of each sum of nats that it takes, as LanguageModel.nats() says.

    Raises:
      UsageError: by the loss, that it takes no such sum.
    """

    def loss(params: Any, batch: Mapping[str, jax.Array], rng: jax.Array) -> tuple[jax.Array, Sums]:
        calls: list[Mapping[str, Any]] = []
        taken = []  # of nats
        told = {'rows': {'numbers': batch[ROWS]}} if ROWS in batch else {}

        def collecting(variables: Any, *args: Any, **kwargs: Any) -> Any:
            if z_loss and kwargs.get('method') == 'nats':
                kwargs |= {'z_loss': z_loss}
                taken.append(True)
            out, sown = apply({**variables, **told}, *args, **kwargs, mutable=_SOWN)
            calls.append(sown)
            return out

        objective, sums = make(collecting, options)(params, batch, rng)
        errors.require(
            not z_loss or bool(taken),
            "train.z_loss is of the nats that the model's method 'nats' sums, and this objective "
            "never calls apply(..., method='nats'): leave it at 0, or call that",
        )
        added: Sums = {}
        for sown in calls:
            for kind in _SOWN:
                for path, mean in jax.tree_util.tree_leaves_with_path(sown.get(kind, {})):
                    share = mean * sums['weight'] / len(calls)
                    added[path[-1].key] = added.get(path[-1].key, 0.0) + share
                    objective += share if kind == 'losses' else 0.0
        twice = ', '.join(added.keys() & sums.keys())
        errors.require(not twice, f'a layer and the objective both report {twice}; rename one')
        return objective, sums | added

    return loss


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
