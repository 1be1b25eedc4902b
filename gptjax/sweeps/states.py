# SPDX-License-Identifier: Apache-2.0
"""How far the points of a sweep are, as their workdirs tell, wherever these are."""

import contextlib
import json
import math
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from gptjax.runtime import jobs, metrics, results
from gptjax.storage import buckets, documents, leases
from gptjax.sweeps import points as points_lib

DIVERGED, STOPPED = 'diverged', 'stopped'
_TAIL_BYTES = 2**16  # of the metrics: some lines


class Look(NamedTuple):
    """A point at a moment.

    Attributes:
      state: waiting, running, stopped, done, diverged, failed or blocked.
      tokens: trained.
      loss: of training, nats a token, or held out where it is done; nan = none yet.
      speed: tokens/s of training; 0 = not known.
      why: it failed or diverged.
    """

    state: str
    tokens: int
    loss: float
    speed: float
    why: str = ''


def look(root: buckets.Anywhere, name: str, wanted: Mapping[str, Any]) -> Look:
    """A point as it is in its workdir.

    Args:
      wanted: what sweep.json says of it.
    """
    return look_at(points_lib.folder(root, name), failure(root, name), wanted['least'])


def look_at(workdir: buckets.Anywhere, failed: str, least: int) -> Look:
    """A run as it is in its workdir.

    Args:
      failed: why it did when it was last run; '' = it did not.
      least: tokens that make it done.
    """
    row = _last_row(workdir / metrics.FILE)
    tokens = int(row.get('tokens', 0))
    loss, speed = row.get('train/loss', math.nan), row.get('perf/tokens_per_sec', 0.0)
    found = results.found(workdir)
    if found and found['tokens'] >= least:
        nats = (v for k, v in found.items() if k.endswith('/nats_per_token'))
        speed = found['tokens'] / max(found['train_secs'], 1e-9)
        return Look(jobs.DONE, found['tokens'], next(nats, loss), speed)
    if leases.is_held(workdir):
        return Look(jobs.RUNNING, tokens, loss, speed)
    if ended := results.diverged(workdir):
        return Look(DIVERGED, tokens, loss, speed, ended['why'])
    if failed:
        return Look(jobs.FAILED, tokens, loss, speed, failed)
    return Look(STOPPED if row else jobs.WAITING, tokens, loss, speed)


def failure(root: buckets.Anywhere, name: str) -> str:
    """Why a point failed when it was last run; '' = it did not."""
    with contextlib.suppress(documents.Damaged):
        return documents.read(_failed(root, name), dict, '', ('why',))['why']
    return ''


def note_failure(root: buckets.Anywhere, name: str, why: str) -> None:
    """Keeps why a point failed; '' = it did not."""
    path = _failed(root, name)
    if why:
        path.parent.mkdir(parents=True, exist_ok=True)
        documents.write(path, {'why': why})
    else:
        path.unlink(missing_ok=True)


def _failed(root: buckets.Anywhere, name: str) -> Any:
    return root / 'failed' / f'{name}.json'


def _last_row(path: buckets.Anywhere) -> dict[str, Any]:
    """The newest row with a loss of training; {} = there is none."""
    try:
        with path.open('rb') as f:
            f.seek(max(0, f.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = f.read().splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if 'train/loss' in row:
                return row
    return {}
