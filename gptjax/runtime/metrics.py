# SPDX-License-Identifier: Apache-2.0
"""Metrics of a run: one JSON line a reading in metrics.jsonl, TensorBoard, Weights & Biases."""

import contextlib
import errno
import hashlib
import json
import logging
import os
import pathlib
import shutil
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gptjax.configs import errors
from gptjax.storage import documents, files, scratch

FILE = 'metrics.jsonl'
_BOARD_BYTES = 2**20  # less free than this is a full disk
_log = logging.getLogger(__name__)


class Writer:
    """Appends rows that carry step, tokens and FLOPs; never holds a step twice after a resume.

    What a full disk does not take is kept and written later; training never stops for it.
    """

    def __init__(
        self, workdir: pathlib.Path, start_step: int, flops_per_token: float, wandb: str = ''
    ) -> None:
        """Rows of later steps than `start_step`, left by an interrupted run, are dropped.

        Args:
          wandb: a Weights & Biases project to log to as well; '' = none.

        Raises:
          UsageError: wandb is asked for and not installed.
        """
        self._wandb = _wandb(wandb, workdir) if wandb else None
        self._flops_per_token = flops_per_token
        self._row: dict[str, float] = {}
        self._waiting: list[dict[str, float]] = []
        self._path = scratch.need(workdir / FILE)
        if self._path.is_dir():
            _put_aside(self._path)
        rows, bad = _read(self._path)
        if bad:
            aside = self._path.with_name(f'{FILE}.bad')
            with files.open_(aside, 'a') as f:
                files.appended(f, ''.join(f'{line}\n' for line in bad.values()), aside)
            _log.warning('%s: damaged lines are set aside in %s', self._path, aside.name)
        kept = [row for row in rows if row['step'] <= start_step]
        lines = [documents.line(row).encode() for row in kept]
        files.replace(self._path, b''.join(lines))
        self._size = sum(map(len, lines))
        self._last: tuple[dict, int] = ({}, 0)  # the row written last, and where it begins
        if kept:
            self._last = kept[-1], self._size - len(lines[-1])
        self._board = _Board(workdir, start_step)

    def write(self, step: int, tokens: int, metrics: Mapping[str, float]) -> None:
        """Adds to the row of a step, also to the last one that was flushed."""
        if step != self._row.get('step'):
            self._emit()
            flops = tokens * self._flops_per_token
            self._row = {'step': step, 'tokens': tokens, 'flops': flops}
            last, begins = self._last
            if last.get('step') == step and not self._waiting:
                self._row, self._size = dict(last), begins
        self._row |= metrics
        self._board.scalars(step, metrics)
        if self._wandb:
            self._wandb.log({'step': step, **metrics})

    def histogram(self, step: int, name: str, values: Sequence[float]) -> None:
        """A distribution, for TensorBoard."""
        self._board.histogram(step, name, values)

    def flush(self) -> None:
        """Makes sure that what was written survives a crash; called before a checkpoint."""
        self._emit()
        self._board.flush()

    def _emit(self) -> None:
        if self._row:
            self._waiting.append(self._row)
            self._row = {}
        if not self._waiting:
            return
        lines = [documents.line(row).encode() for row in self._waiting]
        data = b''.join(lines)
        try:
            begun = 'r+b' if self._path.exists() else 'xb'
            with files.open_(self._path, begun, buffering=0) as f:
                self._size = min(self._size, f.seek(0, os.SEEK_END))
                f.seek(self._size)
                if f.write(data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                f.truncate()  # what a line that was cut short has left
                os.fsync(f.fileno())
        except OSError as e:
            _log.warning('%d rows of %s wait to be written: %s', len(self._waiting), FILE, e)
            return
        self._size += len(data)
        self._last = self._waiting[-1], self._size - len(lines[-1])
        self._waiting.clear()

    def close(self) -> None:
        self.flush()
        self._board.close()
        if self._wandb:
            self._wandb.finish()


class _Board:
    """TensorBoard, left alone while the disk is full: its thread would die and block training."""

    def __init__(self, workdir: pathlib.Path, start_step: int) -> None:
        import tensorboardX  # a second of import, for training only

        self._folder = workdir / 'tensorboard'
        if not self._folder.is_dir() and (self._folder.exists() or self._folder.is_symlink()):
            _put_aside(self._folder)
        self._writer = tensorboardX.SummaryWriter(str(self._folder), purge_step=start_step + 1)

    def scalars(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._has_room():
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, step)

    def histogram(self, step: int, name: str, values: Sequence[float]) -> None:
        if self._has_room() and len(values):
            self._writer.add_histogram(name, np.asarray(values), step)

    def flush(self) -> None:
        if self._has_room():
            with contextlib.suppress(OSError):  # of a disk that is full all the same
                self._writer.flush()

    def close(self) -> None:
        if self._has_room():
            with contextlib.suppress(OSError):
                self._writer.close()

    def _has_room(self) -> bool:
        try:
            return shutil.disk_usage(self._folder).free > _BOARD_BYTES
        except OSError:  # it was taken away
            return False


def _put_aside(path: pathlib.Path) -> None:
    """What stands in a log's place stops no run."""
    aside = path.with_name(f'{path.name}.{time.time_ns()}')
    path.rename(aside)
    _log.warning('%s is none of ours: put aside as %s', path, aside.name)


def _wandb(project: str, workdir: pathlib.Path) -> Any:
    try:
        import wandb
    except ImportError as e:
        raise errors.UsageError(
            'train.wandb_project wants Weights & Biases: pip install wandb, or leave it empty'
        ) from e
    # One W&B run a workdir, whatever interrupts it.
    name = hashlib.sha256(scratch.told(str(workdir.absolute())).encode()).hexdigest()[:16]
    run = wandb.init(project=project, id=name, name=workdir.name, resume='allow')
    # Against our step: W&B's own would drop what a run that went back logs again.
    run.define_metric('*', step_metric='step')
    return run


class Silent:
    """Stands in for a Writer on hosts other than the first."""

    def write(self, step: int, tokens: int, metrics: Mapping[str, float]) -> None:
        del step, tokens, metrics

    def histogram(self, step: int, name: str, values: Sequence[float]) -> None:
        del step, name, values

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def read(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a run; lines that are damaged are said and left out, as is one cut by a crash."""
    rows, bad = _read(workdir / FILE)
    if bad:
        said = ', '.join(map(str, bad))
        _log.warning('%s: damaged lines are left out: %s', workdir / FILE, said)
    return rows


def _read(path: pathlib.Path) -> tuple[list[dict[str, Any]], dict[int, str]]:
    """Rows of rising steps and numbers, and by number what is none."""
    found = documents.read_lines(path, ('step',))
    rows, bad, last = [], dict(found.bad), -1
    for number, row in found.numbered.items():
        numbers = all(type(x) in (int, float) for x in row.values())
        if type(row['step']) is int and row['step'] > last and numbers:
            rows.append(row)
            last = row['step']
        else:
            bad[number] = json.dumps(row)
    return rows, dict(sorted(bad.items()))
