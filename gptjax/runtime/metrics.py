# SPDX-License-Identifier: Apache-2.0
"""Metrics of a run: one JSON line a reading in metrics.jsonl, and TensorBoard."""

import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from gptjax.text import files

FILE = 'metrics.jsonl'


class NotFinite(ArithmeticError):
    """A loss or a norm is NaN or infinite."""


class Writer:
    """Appends rows that carry step, tokens and FLOPs; never holds a step twice after a resume."""

    def __init__(self, workdir: pathlib.Path, start_step: int, flops_per_token: float) -> None:
        """Rows of later steps than `start_step`, left by an interrupted run, are dropped."""
        import tensorboardX  # a second of import, for training only

        self._flops_per_token = flops_per_token
        self._row: dict[str, float] = {}
        path = workdir / FILE
        kept = [row for row in read(workdir) if row['step'] <= start_step]
        files.replace(path, ''.join(json.dumps(row) + '\n' for row in kept))
        self._file = path.open('a', encoding='utf-8')
        self._board = tensorboardX.SummaryWriter(
            str(workdir / 'tensorboard'), purge_step=start_step + 1
        )

    def write(self, step: int, tokens: int, metrics: Mapping[str, float]) -> None:
        """Adds to the row of a step."""
        if step != self._row.get('step'):
            self._emit()
            flops = tokens * self._flops_per_token
            self._row = {'step': step, 'tokens': tokens, 'flops': flops}
        self._row |= metrics
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)

    def flush(self) -> None:
        """Makes sure that what was written survives a crash; called before a checkpoint."""
        self._emit()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._board.flush()

    def _emit(self) -> None:
        if self._row:
            self._file.write(json.dumps(self._row) + '\n')
            self._row = {}

    def close(self) -> None:
        self.flush()
        self._file.close()
        self._board.close()


class Silent:
    """Stands in for a Writer on hosts other than the first."""

    def write(self, step: int, tokens: int, metrics: Mapping[str, float]) -> None:
        del step, tokens, metrics

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


def check_finite(step: int, metrics: Mapping[str, float]) -> None:
    """Raises NotFinite where a value is NaN or infinite, so that no such state is ever saved."""
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise NotFinite(f'{name} is {value} at step {step}')
