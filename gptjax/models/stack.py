# SPDX-License-Identifier: Apache-2.0
"""Runs a stack of layers, scanned or unrolled, keeping of it what the remat policy says.

What the backward pass keeps of the forward pass, by name; it computes the rest again:
none     everything is kept
dots     products with weights
blocks   the borders of the layers
full     the border of every second layer (every one where their number is odd), or of every repeat
         of a longer attention pattern: less memory than 'blocks', for an eighth more work with two
         layers a repeat, at most a quarter with more
offload  the borders of the layers, in the host's memory; for accelerators
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

# Collection -> name -> value: what a layer says beside its output (models/layers.py).
Sown = dict[str, dict[str, jax.Array]]
Remat = Literal['none', 'dots', 'blocks', 'full', 'offload']
_BORDER = 'border'


class _Policy(NamedTuple):
    """How to wrap functions of activations: one layer, and one step of the scan over layers."""

    layer: Callable[[Callable], Callable]
    step: Callable[[Callable], Callable]


def run(
    layer: Callable[[Any, Any, int, Any], tuple[Any, Sown]],
    x: Any,
    stacks: Sequence[Any],
    scan: bool,
    remat: Remat,
) -> tuple[Any, Sown]:
    """Applies all layers.

    Args:
      layer: (x, parameters, place in the pattern, number of the layer) -> (x, what it sows).
      x: what goes from layer to layer: an array, or a tree of them.
      stacks: for every place of the pattern, its parameters with a leading axis of R repeats.

    Returns:
      x behind the last layer, and what the layers have sown, one value a layer that does.
    """
    taken_apart = isinstance(stacks[0], tuple)
    pattern = len(stacks)
    repeats = len(stacks[0]) if taken_apart else jax.tree.leaves(stacks)[0].shape[0]
    policy = _POLICIES[remat]
    size = 2 if remat == 'full' and pattern == 1 and repeats % 2 == 0 else 1  # repeats a step

    def one(x: Any, params: Any, place: int, number: Any) -> tuple[Any, Sown]:
        @policy.layer
        def apply(x: Any, params: Any, number: Any) -> tuple[Any, Sown]:
            x = jax.tree.map(lambda part: checkpoint_name(part, _BORDER), x)
            return layer(x, params, place, number)

        return apply(x, params, number)

    @policy.step
    def step(x: Any, group: list, indices: list) -> tuple[Any, list[Sown]]:
        sown = []
        for repeat, index in zip(group, indices, strict=True):
            for place, params in enumerate(repeat):
                x, more = one(x, params, place, index * pattern + place)
                sown.append(more)
        return x, sown

    if not scan or taken_apart:
        apart, found = unstacked(stacks), []
        for start in range(0, repeats, size):
            x, sown = step(x, apart[start : start + size], list(range(start, start + size)))
            found += sown
        return x, _gathered(found)

    def body(x: Any, scanned: tuple) -> tuple[Any, list[Sown]]:
        group, indices = scanned
        if size == 1:
            return step(x, [group], [indices])
        return step(x, unstacked(group), list(indices))

    scanned = (stacks, jnp.arange(repeats))
    if size > 1:
        scanned = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), scanned)
    x, sown = jax.lax.scan(body, x, scanned)
    return x, _gathered(sown)


def unstacked(stacks: Any) -> list:
    """Stacked parameters -> one tree a repeat; the gradient is one concatenation.

    Those that decoding has taken apart before (models/quantize.py) are tuples of trees.
    """
    if isinstance(stacks[0], tuple):
        return [list(repeat) for repeat in zip(*stacks, strict=True)]
    leaves, tree = jax.tree.flatten(stacks)
    repeats = leaves[0].shape[0]
    split = [jax.lax.split(leaf, (1,) * repeats) for leaf in leaves]
    return [tree.unflatten([parts[r].squeeze(0) for parts in split]) for r in range(repeats)]


def _gathered(sown: Sequence[Sown]) -> Sown:
    """What several layers sowed, or stacks of layers, by name: one value a layer."""
    found: dict[str, dict[str, list[jax.Array]]] = {}
    for some in sown:
        for kind, named in some.items():
            for name, value in named.items():
                found.setdefault(kind, {}).setdefault(name, []).append(jnp.ravel(value))
    return {
        kind: {name: jnp.concatenate(values) for name, values in named.items()}
        for kind, named in found.items()
    }


def _unchanged(f: Callable) -> Callable:
    return f


def _keep_nothing(f: Callable) -> Callable:
    return jax.checkpoint(f, policy=jax.checkpoint_policies.nothing_saveable)


def _keep_dots(f: Callable) -> Callable:
    return jax.checkpoint(f, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)


def _offload_border(f: Callable) -> Callable:
    policy = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=(),
        names_which_can_be_offloaded=(_BORDER,),
        offload_src='device',
        offload_dst='pinned_host',
    )
    return jax.checkpoint(f, policy=policy)


_POLICIES = {
    'none': _Policy(_unchanged, _unchanged),
    'dots': _Policy(_keep_dots, _unchanged),
    'blocks': _Policy(_keep_nothing, _unchanged),
    'full': _Policy(_keep_nothing, _keep_nothing),
    'offload': _Policy(_offload_border, _unchanged),
}
REMAT = tuple(_POLICIES)
