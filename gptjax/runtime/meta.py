# SPDX-License-Identifier: Apache-2.0
"""What is said of a checkpoint beside its arrays: meta.json."""

from collections.abc import Mapping
from typing import Any

import jax
import ml_collections

from gptjax.configs import base, errors
from gptjax.runtime import program
from gptjax.storage import buckets

NAME = 'meta.json'


def of(
    config: ml_collections.ConfigDict,
    head: str,
    tokenizer: str,
    provenance: str = '',
    **more: Any,
) -> dict[str, Any]:
    """What every checkpoint says.

    Args:
      config: the whole one.
      head: of models.heads.HEADS.
      tokenizer: its fingerprint; '' = there is none.
      provenance: of the weights, where they were not trained from nothing.
      more: of a run also 'data', its position, and 'clock'.
    """
    said = {'config': base.plain(config), 'head': head, 'tokenizer': tokenizer}
    return said | {'provenance': provenance, 'commit': program.commit(), **more}


def has(said: Mapping[str, Any], *path: str) -> bool:
    """Whether a checkpoint holds the array at a path: an item, as 'average', and names in it."""
    return key(*path) in said['shapes']


def key(*names: str) -> str:
    """How a path in a tree of items begins where it is written out."""
    return ''.join(f"['{name}']" for name in names)


def shapes(tree: Any) -> dict[str, list]:
    """Path -> [shape, dtype] of every array, as it stands in the meta."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p): [list(x.shape), str(x.dtype)] for p, x in leaves}


def check(checkpoint: buckets.Anywhere, saved: dict, wanted: dict, items: tuple) -> None:
    """Raises InputError where what is saved of some items is not what is wanted."""
    saved = {k: v for k, v in saved.items() if k.startswith(tuple(key(i) for i in items))}
    for name in sorted(saved.keys() | wanted.keys()):
        if saved.get(name) != wanted.get(name):
            raise errors.InputError(
                f'checkpoint {checkpoint} does not fit this config: {name} is '
                f'{_said(saved.get(name))} there and {_said(wanted.get(name))} here; use the '
                'config that made it, or another workdir'
            )


def _said(shape: list | None) -> str:
    return 'absent' if shape is None else f'{tuple(shape[0])} {shape[1]}'
