# SPDX-License-Identifier: Apache-2.0
"""What a run ended with: WORKDIR/results.json; diverged.json where its loss blew up."""

import pathlib
from collections.abc import Mapping
from typing import Any

from gptjax.storage import documents

NAME, DIVERGED = 'results.json', 'diverged.json'
_NEEDS = ('steps', 'tokens', 'parameters', 'train_secs')


def write(workdir: pathlib.Path, found: Mapping[str, Any]) -> None:
    """Writes it, with the scores beside what is always there."""
    documents.write(workdir / NAME, found)


def read(workdir: pathlib.Path) -> dict[str, Any]:
    """What stands there. Raises Damaged where it is not what was written, or not there."""
    return documents.read(workdir / NAME, dict, 'run the same command again', _NEEDS)


def is_whole(workdir: pathlib.Path) -> bool:
    """Whether it is there as it was written."""
    try:
        return bool(read(workdir))
    except documents.Damaged:
        return False


def diverged(workdir: pathlib.Path) -> dict[str, Any]:
    """The step and the cause, where a spike of the loss has ended the run; else {}."""
    try:
        return documents.read(workdir / DIVERGED, dict, '', ('step', 'why'))
    except documents.Damaged:
        return {}
