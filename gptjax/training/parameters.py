# SPDX-License-Identifier: Apache-2.0
"""Trees of parameters by the paths of their leaves, as 'network/block_0/up/kernel'."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
from flax import traverse_util
from flax.core import meta


@runtime_checkable
class Parameter(Protocol):
    """What the layer that makes a parameter says of it; models/axes.py has the class.

    Attributes:
      names: of its axes, the stack of layers included.
      inputs: the axes that are summed over where it multiplies; () of what is added or looked up.
      outputs: the axes that then remain.
      stacked: whether the first axis is of layers.
      decays: whether weight decay shrinks it.
      rate: what multiplies its learning rate.
    """

    names: tuple[str, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    stacked: bool
    decays: bool
    rate: float


Described = Mapping[str, Parameter]  # by path


def by_path(of: Callable[[str], Any], tree: Any) -> Any:
    """A tree of of(path) for every leaf."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: of('/'.join(key.key for key in path)),
        tree,
        is_leaf=lambda x: isinstance(x, meta.AxisMetadata),
    )


def split(tree: Mapping[str, Any], paths: Collection[str]) -> tuple[dict, dict]:
    """(the leaves that are not at these paths, those that are), each a tree of its own."""
    flat = traverse_util.flatten_dict(tree, sep='/')
    parts = ({k: v for k, v in flat.items() if (k in paths) == inside} for inside in (False, True))
    first, second = (traverse_util.unflatten_dict(part, sep='/') for part in parts)
    return first, second


def merge(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict:
    """The tree of which split() made two."""
    merged = dict(one)
    for name, branch in other.items():
        merged[name] = merge(merged[name], branch) if name in merged else branch
    return merged


def paths(tree: Any) -> list[str]:
    """The paths of all leaves."""
    return jax.tree.leaves(by_path(lambda path: path, tree))
