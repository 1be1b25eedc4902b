# SPDX-License-Identifier: Apache-2.0
"""Reads a step's metrics off the device one step late: knows spikes, averages, writes."""

import logging
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from gptjax.runtime import by_host, compiled
from gptjax.runtime import clock as clock_lib
from gptjax.runtime import metrics as metrics_lib
from gptjax.training import noise
from gptjax.training import plan as plan_lib

MOST_SKIPS = 20  # in a row: then the weights are lost, not the batches
_log = logging.getLogger(__name__)


class Spike(Exception):
    """A loss that is not finite, or far above the usual; nothing of it was saved."""

    def __init__(self, step: int, what: str) -> None:
        super().__init__(f'{what} at step {step}')
        self.step = step


class Reader:
    """Metrics on their way from the device to the log."""

    def __init__(
        self,
        log_every_steps: int,
        skips_spikes: bool,
        plan: plan_lib.Plan,
        writer: metrics_lib.Writer | metrics_lib.Silent,
        clock: clock_lib.Clock,
    ) -> None:
        self._every, self._skips_spikes, self._plan = log_every_steps, skips_spikes, plan
        self._writer, self._clock = writer, clock
        self._pending: tuple[int, dict[str, Any]] | None = None
        self._means: dict[str, list[float]] = {}  # of the steps since the last row
        self._seen = False
        self._skipped = self._in_a_row = 0
        self._note = self._evaluation = ''

    def since_row(self) -> dict[str, Any]:
        """What the next row says of steps that were read: to be kept with a checkpoint."""
        counts = {'skipped': self._skipped, 'in_a_row': self._in_a_row}
        return {'means': {name: list(some) for name, some in self._means.items()}, **counts}

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Goes on from since_row(); from nothing where a checkpoint is older than that."""
        self._means = {name: list(some) for name, some in kept.get('means', {}).items()}
        self._skipped, self._in_a_row = kept.get('skipped', 0), kept.get('in_a_row', 0)

    def push(self, step: int, found: Mapping[str, Any]) -> str:
        """Takes a step's metrics, reads those of the step before; what to show behind a bar.

        Raises:
          Spike: the step before was one, and its update was not skipped, or too many were.
        """
        note = self.read()
        self._pending = (step, dict(found))
        return note

    def read(self) -> str:
        """Reads what was pushed last. Returns and raises as push()."""
        if self._pending is None:
            return self._note + self._evaluation
        step, found = self._pending
        self._pending = None
        norms = {name: found.pop(name) for name in list(found) if name.startswith('norm/')}
        values = {name: float(value) for name, value in found.items()}
        if values.pop('train/spike'):
            self._spike(step, values)
        else:
            self._in_a_row = 0
            for name in (name for name in values if name.startswith('train/')):
                self._means.setdefault(name, []).append(values[name])
        if not self._seen:
            self._seen = True
            what = f'step {step}, loss {values["train/loss"]:.4f}; {compiled.said()}'
            _log.info('first step done: %s', what)
        if step % self._every == 0 or step == self._plan.total_steps:
            self._write(step, values, norms)
        return self._note + self._evaluation

    def evaluated(self, scores: Mapping[str, float]) -> None:
        """Takes note of an evaluation."""
        found = [
            f'{value:.3f}'
            for name, value in scores.items()
            if name.startswith('eval/') and name.endswith('bits_per_byte')
        ]
        self._evaluation = f', held-out {", ".join(found)} bits/byte' if found else ''

    def _spike(self, step: int, values: Mapping[str, float]) -> None:
        what = f'loss {values["train/loss"]:.4g}, gradient norm {values["opt/grad_norm"]:.4g}'
        self._skipped += 1
        self._in_a_row += 1
        if not self._skips_spikes or self._in_a_row >= MOST_SKIPS:
            raise Spike(step, what)
        _log.warning('%s at step %d: its update is skipped', what, step)

    def _write(self, step: int, values: dict[str, float], norms: Mapping[str, Any]) -> None:
        tokens = self._plan.tokens(step)
        self._writer.histogram(step, 'perf/step_secs', self._clock.step_secs())
        perf = self._clock.read(self._plan.tokens(self._plan.total_steps) - tokens)
        perf |= by_host.compared(perf)
        row = {'opt/lr': values['opt/lr'], 'batch/windows': self._plan.size(step - 1)}
        row['train/skipped_steps'] = self._skipped
        if self._means:  # nothing but spikes: no number is better than one of them
            means = {name: sum(some) / len(some) for name, some in self._means.items()}
            row |= values | means | noise.scale(means)
        row |= _flat(norms)
        row = {name: value for name, value in row.items() if math.isfinite(value)}
        self._writer.write(step, tokens, row | perf)
        self._note = f'{perf["perf/tokens_per_sec"]:,.0f} tokens/s'
        if 'train/loss' in row:
            self._note = f'loss {row["train/loss"]:.3f}, ' + self._note
        self._means.clear()


def _flat(norms: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """{'norm/grad': {'network/up': (layers,)}} -> {'norm/grad/network/up/0': ...}."""
    found = {}
    for kind, tree in norms.items():
        for name, value in tree.items():
            values = np.asarray(value)
            if values.ndim == 0:
                found[f'{kind}/{name}'] = float(values)
            else:
                found |= {f'{kind}/{name}/{i}': float(v) for i, v in enumerate(values)}
    return found


def advice(on_spike: str) -> str:
    """What to do about a spike that ends a run. Args: on_spike: of the config."""
    calmer = 'Lower --config.optim.peak_lr or clip_norm, in a new workdir'
    if on_spike == 'stop':
        return (
            f'{calmer}; or let --config.train.on_spike=skip or rollback leave its batches out: '
            'the same command then goes on from the last checkpoint'
        )
    if on_spike == 'skip':
        return f'Leaving out updates does not help: no batch is at fault. {calmer}'
    return f'Going back does not help any more. {calmer}'
