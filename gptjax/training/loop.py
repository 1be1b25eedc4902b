# SPDX-License-Identifier: Apache-2.0
"""fit(): the loop that every kind of training shares."""

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np

from gptjax.configs import errors
from gptjax.runtime import checkpoint, metrics, program, progress
from gptjax.runtime import clock as clock_lib
from gptjax.training import optim
from gptjax.training import step as step_lib

_SKIPS = 20  # in a row: then the weights are lost, not the batches
_log = logging.getLogger(__name__)


class Spike(Exception):
    """A loss that is not finite, or far above the usual; nothing of it was saved."""

    def __init__(self, step: int, what: str) -> None:
        super().__init__(f'{what} at step {step}')
        self.step = step


@dataclasses.dataclass(frozen=True)
class Config:
    """The train section of configs/base.py."""

    total_tokens: int
    total_epochs: float
    log_every_steps: int
    eval_every_steps: int
    on_spike: Literal['stop', 'skip', 'rollback']
    spike_sigmas: float
    rollback_steps: int
    layer_norms: bool
    profile_at_step: int
    profile_steps: int
    wandb_project: str

    def __post_init__(self) -> None:
        errors.require_between(
            self, 0, 2**60, 'total_tokens', 'total_epochs', 'eval_every_steps', 'profile_at_step'
        )
        errors.require_positive(self, 'log_every_steps', 'rollback_steps', 'profile_steps')
        errors.require_choice(self, 'on_spike', ('stop', 'skip', 'rollback'))
        errors.require_between(self, 0.0, 1e6, 'spike_sigmas')
        errors.require(
            (self.total_tokens > 0) != (self.total_epochs > 0),
            'exactly one of train.total_tokens and train.total_epochs must be above 0, got '
            f'{self.total_tokens} and {self.total_epochs}',
        )


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a program hands to fit().

    train_step: (state, batch) -> (state, metrics)
    put: (host batch, windows) -> device batch
    learning_rate: tokens -> rate, for the log
    evaluate: state -> metrics
    save: (step, state, clock totals, whether to wait until it is whole) -> None
    save_due: whether a save that failed is to be tried again
    """

    train_step: Callable[[step_lib.State, Any], tuple[step_lib.State, dict]]
    put: Callable[[dict, int], dict]
    learning_rate: Callable[[int], float]
    evaluate: Callable[[step_lib.State], dict[str, float]]
    save: Callable[[int, step_lib.State, dict, bool], None]
    save_due: Callable[[], bool]


def fit(
    state: step_lib.State,
    batches: Iterator[dict],
    parts: Parts,
    plan: optim.Plan,
    total_steps: int,
    config: Config,
    checkpoints: checkpoint.Config,
    writer: metrics.Writer | metrics.Silent,
    clock: clock_lib.Clock,
    profiler: clock_lib.Profiler,
) -> tuple[step_lib.State, dict[str, float]]:
    """Trains from the state's step to `total_steps`; returns the state and its evaluation.

    The metrics of step n - 1 are fetched after step n was dispatched, so the device never waits
    for a log; before a save or an evaluation step n's are read too, so no NaN is ever saved.

    Raises:
      Spike: the loss is not finite, or a spike, and steps are not skipped for it.
      program.Preempted: a signal came; the state was saved.
    """
    start = int(state.step)
    save_due = clock_lib.Due(checkpoints.every_steps, checkpoints.every_secs)
    eval_due = clock_lib.Due(config.eval_every_steps)
    reader = _Reader(config, parts, plan, total_steps, writer, clock)
    evaluation: dict[str, float] = {}
    total_tokens = plan.tokens(total_steps)
    watchdog = clock_lib.Watchdog('the next batch: the data pipeline is slow, or dead')
    with (
        contextlib.closing(watchdog),
        program.graceful_stop(),
        progress.Progress('train', total_tokens, ' tokens', plan.tokens(start)) as bar,
    ):
        for step in range(start, total_steps):
            began = time.monotonic()
            profiler.before(step, program.profile_requested())
            with watchdog:
                batch = _next(batches, step)
            clock.waited(time.monotonic() - began)
            windows = plan.position(step)[1]
            state, found = parts.train_step(state, parts.put(batch, windows))
            note = reader.read_pending()
            reader.pending = (step + 1, found)
            clock.trained(windows * plan.n_ctx, time.monotonic() - began)
            bar.advance(windows * plan.n_ctx, note)

            done, last = step + 1, step + 1 == total_steps
            evaluation = {}
            stop, saving = program.agreed(
                program.stop_requested(), save_due(done) or parts.save_due()
            )
            evaluating = (last or eval_due(done)) and not stop
            saving = saving or stop or last
            if saving:
                save_due.done()
            if evaluating or saving:
                reader.read_pending()
                clock.pause()
                if evaluating:
                    evaluation = parts.evaluate(state)
                    for name, value in evaluation.items():
                        if not math.isfinite(value):
                            raise Spike(done, f'{name} is {value}')
                    writer.write(done, plan.tokens(done), evaluation)
                    reader.note_evaluation(evaluation)
                if saving:
                    writer.flush()
                    parts.save(done, state, clock.totals(), stop or last)
                clock.go_on()
            if stop and not last:
                raise program.Preempted
    return state, evaluation


def _next(batches: Iterator[dict], step: int) -> dict:
    try:
        return next(batches)
    except errors.InputError:
        raise
    except Exception as e:
        what = 'has no more batches' if isinstance(e, StopIteration) else f'died: {e}'
        raise errors.InputError(
            f'the data pipeline {what} (step {step}); mend that, and run the same command again'
        ) from e


class _Reader:
    """Reads metrics off the device one step late, checks, averages and writes them."""

    def __init__(self, config, parts, plan, total_steps, writer, clock) -> None:
        self._config, self._parts, self._plan = config, parts, plan
        self._total_steps, self._writer, self._clock = total_steps, writer, clock
        self._losses: list[float] = []
        self._seen = False
        self._skipped = self._in_a_row = 0
        self._note = self._evaluation = ''
        self.pending: tuple[int, dict] | None = None

    def note_evaluation(self, evaluation: dict[str, float]) -> None:
        self._evaluation = ''.join(
            f', held-out {value:.3f} bits/byte'
            for name, value in evaluation.items()
            if name.startswith('eval/') and name.endswith('bits_per_byte')
        )

    def read_pending(self) -> str:
        """What to show behind the progress bar."""
        if self.pending is None:
            return self._note
        step, found = self.pending
        self.pending = None
        norms = {name: found.pop(name) for name in list(found) if name.startswith('norm/')}
        values = {name: float(value) for name, value in found.items()}
        if values.pop('train/spike'):
            self._spike(step, values)
        else:
            self._in_a_row = 0
            self._losses.append(values['train/loss'])
        if not self._seen:
            self._seen = True
            _log.info('first step done: step %d, loss %.4f', step, values['train/loss'])
        if step % self._config.log_every_steps == 0 or step == self._total_steps:
            self._write(step, values, norms)
        return self._note + self._evaluation

    def _spike(self, step: int, values: dict[str, float]) -> None:
        what = f'loss {values["train/loss"]:.4g}, gradient norm {values["opt/grad_norm"]:.4g}'
        self._skipped += 1
        self._in_a_row += 1
        if self._config.on_spike != 'skip' or self._in_a_row >= _SKIPS:
            raise Spike(step, what)
        _log.warning('%s at step %d: its update is skipped', what, step)

    def _write(self, step: int, values: dict[str, float], norms: dict) -> None:
        tokens = self._plan.tokens(step)
        self._writer.histogram(step, 'perf/step_secs', self._clock.step_secs())
        perf = self._clock.read(self._plan.tokens(self._total_steps) - tokens)
        if not self._losses:  # nothing but spikes: no number is better than one of them
            values = {}
        else:
            values['train/loss'] = sum(self._losses) / len(self._losses)
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        values['opt/lr'] = self._parts.learning_rate(tokens)
        values['batch/windows'] = self._plan.position(step - 1)[1]
        values['train/skipped_steps'] = self._skipped
        flat = {name: value for name, value in _flat(norms).items() if math.isfinite(value)}
        self._writer.write(step, tokens, values | perf | flat)
        self._note = f'{perf["perf/tokens_per_sec"]:,.0f} tokens/s'
        if self._losses:
            self._note = f'loss {values["train/loss"]:.3f}, ' + self._note
        self._losses.clear()


def _flat(norms: dict[str, dict[str, Any]]) -> dict[str, float]:
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
