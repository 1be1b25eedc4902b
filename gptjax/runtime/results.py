# SPDX-License-Identifier: Apache-2.0
"""When a run began, WORKDIR/began.json, and what it ended with, results.json.

diverged.json stands there where its loss blew up.
"""

import datetime
import pathlib
from collections.abc import Mapping
from typing import Any

from gptjax.storage import buckets, documents

NAME, DIVERGED, BEGAN = 'results.json', 'diverged.json', 'began.json'
_NEEDS = ('steps', 'tokens', 'parameters', 'train_secs')


def write(workdir: pathlib.Path, found: Mapping[str, Any]) -> None:
    """Writes it, with the scores beside what is always there."""
    documents.write(workdir / NAME, found)


def read(workdir: buckets.Anywhere) -> dict[str, Any]:
    """What stands there. Raises Damaged where it is not what was written, or not there."""
    return documents.read(workdir / NAME, dict, 'run the same command again', _NEEDS)


def found(workdir: buckets.Anywhere) -> dict[str, Any]:
    """What stands there; {} where read() would raise."""
    try:
        return read(workdir)
    except documents.Damaged:
        return {}


def is_whole(workdir: pathlib.Path) -> bool:
    """Whether it is there as it was written."""
    return bool(found(workdir))


def begin(workdir: pathlib.Path) -> None:
    """Writes down that a run begins now, unless it has begun before."""
    if not began(workdir):
        documents.write(workdir / BEGAN, {'began': now()})


def began(workdir: buckets.Anywhere) -> str:
    """When a run began, as now() says it; '' = it has not, or began in earlier days."""
    try:
        return documents.read(workdir / BEGAN, dict, '', ('began',))['began']
    except documents.Damaged:
        return ''


def now() -> str:
    """The date and time (UTC), to the second, as it is written."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')


def diverged(workdir: buckets.Anywhere) -> dict[str, Any]:
    """The step and the cause, where a spike of the loss has ended the run; else {}."""
    try:
        return documents.read(workdir / DIVERGED, dict, '', ('step', 'why'))
    except documents.Damaged:
        return {}
