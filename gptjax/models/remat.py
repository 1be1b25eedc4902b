# SPDX-License-Identifier: Apache-2.0
"""What the backward pass keeps of the forward pass, and what it computes again, by name.

none     everything is kept
dots     products with weights are kept
blocks   the borders of the layers are kept; every layer is computed again
full     the border of every second layer is kept, or of every repeat of the attention pattern:
         less memory than 'blocks', for up to an eighth more work
offload  as 'blocks', the borders in the host's memory; for accelerators
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name

Name = Literal['none', 'dots', 'blocks', 'full', 'offload']
_BORDER = 'border'


class Policy(NamedTuple):
    """How to wrap functions of activations: one layer, and one step of the scan over layers."""

    layer: Callable[[Callable], Callable]
    step: Callable[[Callable], Callable]


def border(x: jax.Array) -> jax.Array:
    """Marks what a layer is given."""
    return checkpoint_name(x, _BORDER)


def repeats_a_step(name: str, pattern: int, repeats: int) -> int:
    """How many repeats of a pattern of layers a step of the scan holds."""
    return 2 if name == 'full' and pattern == 1 and repeats % 2 == 0 else 1


def _unchanged(f: Callable) -> Callable:
    return f


def _keep_nothing(f: Callable) -> Callable:
    return jax.checkpoint(f, policy=jax.checkpoint_policies.nothing_saveable)


def _keep_dots(f: Callable) -> Callable:
    return jax.checkpoint(f, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)


def _offload_border(f: Callable) -> Callable:
    policy = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=(), names_which_can_be_offloaded=(_BORDER,),
        offload_src='device', offload_dst='pinned_host',
    )  # fmt: skip
    return jax.checkpoint(f, policy=policy)


POLICIES = {
    'none': Policy(_unchanged, _unchanged),
    'dots': Policy(_keep_dots, _unchanged),
    'blocks': Policy(_keep_nothing, _unchanged),
    'full': Policy(_keep_nothing, _keep_nothing),
    'offload': Policy(_offload_border, _unchanged),
}
