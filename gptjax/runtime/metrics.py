# SPDX-License-Identifier: Apache-2.0
"""Metrics of a run: one JSON line a reading in metrics.jsonl, TensorBoard, Weights & Biases."""

import contextlib
import errno
import hashlib
import logging
import os
import pathlib
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gptjax.configs import errors
from gptjax.storage import buckets, documents, files, scratch

FILE = 'metrics.jsonl'
_MOST_NAMED = 20  # lines
_BOARD_BYTES = 2**20  # less free than this is a full disk
_log = logging.getLogger(__name__)


class Past(NamedTuple):
    """What metrics.jsonl holds of the steps up to one.

    Attributes:
      step: that one.
      row: the last; {} = there is none.
      begins, end: bytes of the file before that row, and up to and with it.
      total_secs: the highest perf/total_secs of all rows, later ones too.
      is_clean: whether nothing but rows with checksums stands in the file.
    """

    step: int
    row: dict[str, Any]
    begins: int
    end: int
    total_secs: float
    is_clean: bool


def past(workdir: pathlib.Path, step: int) -> Past:
    """Looks through metrics.jsonl, a row at a time."""
    path = scratch.need(workdir / FILE)
    found = Past(step, {}, 0, 0, 0.0, not path.is_symlink())
    if path.is_dir():
        return found
    for line in _each_line(path):
        if line.row is None:
            found = found._replace(is_clean=found.is_clean and line.is_cut)
            continue
        longest = max(found.total_secs, line.row.get('perf/total_secs', 0.0))
        found = found._replace(total_secs=longest)
        if line.row['step'] <= step:
            found = found._replace(row=line.row, begins=line.end - len(line.raw), end=line.end)
    return found if documents.is_sealed(path) else found._replace(is_clean=False)


class Writer:
    """Appends rows that carry step, tokens and FLOPs; never holds a step twice after a resume.

    What a full disk does not take is kept and written later; training never stops for it.
    """

    def __init__(
        self, workdir: pathlib.Path, before: Past, flops_per_token: float, wandb: str = ''
    ) -> None:
        """Rows of later steps than before.step, left by an interrupted run, are dropped.

        Args:
          before: past() of that workdir.
          wandb: a Weights & Biases project to log to as well; '' = none.

        Raises:
          UsageError: wandb is asked for and not installed.
        """
        self._wandb = _wandb(wandb, workdir) if wandb else None
        self._flops_per_token = flops_per_token
        self._row: dict[str, float] = {}
        self._waiting: list[dict[str, float]] = []
        self._path = workdir / FILE
        if self._path.is_dir():
            _put_aside(self._path)
        if not before.is_clean:
            _clean(self._path, before.step)
            before = past(workdir, before.step)
        self._size = before.end
        if self._path.exists() and self._path.stat().st_size > before.end:
            with files.open_(self._path, 'r+b') as f:
                f.truncate(before.end)
                os.fsync(f.fileno())
        self._last: tuple[dict, int] = (before.row, before.begins)  # and where it begins
        self._board = _Board(workdir, before.step)

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


def rows(workdir: buckets.Anywhere) -> Iterator[dict[str, Any]]:
    """The rows of a run, one at a time.

    Lines that are damaged are said and left out, as is one cut by a crash.
    """
    bad = []
    for line in _each_line(workdir / FILE):
        if line.row is not None:
            yield line.row
        elif not line.is_cut:
            bad.append(line.number)
    if bad:
        said = ', '.join(map(str, bad[:_MOST_NAMED])) + ', ...' * (len(bad) > _MOST_NAMED)
        _log.warning('%s: damaged lines are left out: %s', workdir / FILE, said)


def read(workdir: buckets.Anywhere) -> list[dict[str, Any]]:
    """rows(), all at once."""
    return list(rows(workdir))


def _each_line(path: buckets.Anywhere) -> Iterator[documents.Line]:
    """The lines of a file, those of which are rows that hold numbers, of rising steps."""
    last = -1
    for line in documents.each_line(path, ('step',)):
        row = line.row
        if row is not None:
            numbers = all(type(x) in (int, float) for x in row.values())
            if type(row['step']) is int and row['step'] > last and numbers:
                last = row['step']
            else:
                line = line._replace(row=None)
        yield line


def _clean(path: pathlib.Path, step: int) -> None:
    """Leaves rows up to a step in a file, each with a checksum; what is none is set aside."""
    aside = path.with_name(f'{FILE}.bad')
    with contextlib.ExitStack() as open_:
        kept, bad = open_.enter_context(files.replacing(path)), None
        for line in _each_line(path):
            if line.row is None and not line.is_cut:
                bad = bad or open_.enter_context(files.open_(aside, 'a'))
                files.appended(bad, line.text + '\n', aside)
            elif line.row is not None and line.row['step'] <= step:
                kept.write(documents.line(line.row).encode())
    if bad:
        _log.warning('%s: damaged lines are set aside in %s', path, aside.name)
