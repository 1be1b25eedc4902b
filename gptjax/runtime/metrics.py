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
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gptjax.configs import errors
from gptjax.storage import files

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
        self._waiting: list[str] = []
        self._path = workdir / FILE
        kept = [row for row in read(workdir) if row['step'] <= start_step]
        lines = [json.dumps(row) + '\n' for row in kept]
        files.replace(self._path, ''.join(lines))
        self._size = sum(map(len, lines))  # JSON is ASCII
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
            self._waiting.append(json.dumps(self._row) + '\n')
            self._row = {}
        if not self._waiting:
            return
        data = ''.join(self._waiting).encode()
        try:
            with self._path.open('r+b', buffering=0) as f:
                f.seek(self._size)
                if f.write(data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                f.truncate()  # what a line that was cut short has left
                os.fsync(f.fileno())
        except OSError as e:
            _log.warning('%d rows of %s wait to be written: %s', len(self._waiting), FILE, e)
            return
        self._size += len(data)
        self._last = json.loads(self._waiting[-1]), self._size - len(self._waiting[-1])
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
        return shutil.disk_usage(self._folder).free > _BOARD_BYTES


def _wandb(project: str, workdir: pathlib.Path) -> Any:
    try:
        import wandb
    except ImportError as e:
        raise errors.UsageError(
            'train.wandb_project wants Weights & Biases: pip install wandb, or leave it empty'
        ) from e
    # One W&B run a workdir, whatever interrupts it.
    name = hashlib.sha256(str(workdir.absolute()).encode()).hexdigest()[:16]
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
    """The rows of a run; a last line cut short by a crash is left out."""
    path = workdir / FILE
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding='utf-8').splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
