# SPDX-License-Identifier: Apache-2.0
"""fit(): the loop that every kind of training shares."""

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

from gptjax.configs import errors
from gptjax.runtime import checkpoint, metrics, program, progress
from gptjax.runtime import clock as clock_lib
from gptjax.training import optim
from gptjax.training import step as step_lib

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Config:
    """The train section of configs/base.py."""

    total_tokens: int
    total_epochs: float
    log_every_steps: int
    eval_every_steps: int

    def __post_init__(self) -> None:
        errors.require_between(self, 0, 2**60, 'total_tokens', 'total_epochs', 'eval_every_steps')
        errors.require_positive(self, 'log_every_steps')
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
    evaluate: params -> metrics
    save: (step, state, clock totals) -> None; returns before the save is whole
    """

    train_step: Callable[[step_lib.State, Any], tuple[step_lib.State, dict]]
    put: Callable[[dict, int], dict]
    learning_rate: Callable[[int], float]
    evaluate: Callable[[Any], dict[str, float]]
    save: Callable[[int, step_lib.State, dict], None]


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
) -> tuple[step_lib.State, dict[str, float]]:
    """Trains from the state's step to `total_steps`; returns the state and the last evaluation.

    The metrics of step n - 1 are fetched after step n was dispatched, so the device never waits
    for a log; before a save or an evaluation step n's are read too, so no NaN is ever saved.

    Raises:
      metrics.NotFinite: the loss or the gradient norm is; nothing of it was saved.
      program.Preempted: a signal came; the state was saved.
    """
    start = int(state.step)
    total_tokens = plan.tokens(total_steps)
    save_due = clock_lib.Due(checkpoints.every_steps, checkpoints.every_secs)
    eval_due = clock_lib.Due(config.eval_every_steps)
    reader = _Reader(config, parts, plan, total_steps, writer, clock)
    evaluation: dict[str, float] = {}
    with (
        program.graceful_stop(),
        progress.Progress('train', total_tokens, ' tokens', plan.tokens(start)) as bar,
    ):
        for step in range(start, total_steps):
            began = time.monotonic()
            batch = next(batches)
            clock.waited(time.monotonic() - began)
            windows = plan.position(step)[1]
            state, found = parts.train_step(state, parts.put(batch, windows))
            note = reader.read_pending()
            reader.pending = (step + 1, found)
            clock.trained(windows * plan.n_ctx)
            bar.advance(windows * plan.n_ctx, note)

            done, last = step + 1, step + 1 == total_steps
            stop, saving = program.agreed(program.stop_requested(), save_due(done))
            evaluating = (last or eval_due(done)) and not stop
            saving = saving or stop or last
            if evaluating or saving:
                reader.read_pending()
                clock.pause()
                if evaluating:
                    evaluation = parts.evaluate(state.params)
                    metrics.check_finite(done, evaluation)
                    writer.write(done, plan.tokens(done), evaluation)
                    reader.note_evaluation(evaluation)
                if saving:
                    writer.flush()
                    parts.save(done, state, clock.totals())
                clock.go_on()
            if stop and not last:
                raise program.Preempted
    return state, evaluation


class _Reader:
    """Reads metrics off the device one step late, checks, averages and writes them."""

    def __init__(self, config, parts, plan, total_steps, writer, clock) -> None:
        self._config, self._parts, self._plan = config, parts, plan
        self._total_steps, self._writer, self._clock = total_steps, writer, clock
        self._losses: list[float] = []
        self._seen = False
        self._note = self._evaluation = ''
        self.pending: tuple[int, dict] | None = None

    def note_evaluation(self, evaluation: dict[str, float]) -> None:
        self._evaluation = ''.join(
            f', held-out {value:.3f} bits/byte'
            for name, value in evaluation.items()
            if name.endswith('bits_per_byte')
        )

    def read_pending(self) -> str:
        """What to show behind the progress bar."""
        if self.pending is None:
            return self._note
        step, found = self.pending
        self.pending = None
        values = {name: float(value) for name, value in found.items()}
        metrics.check_finite(step, values)
        if not self._seen:
            self._seen = True
            _log.info('first step done: step %d, loss %.4f', step, values['train/loss'])
        self._losses.append(values['train/loss'])
        if step % self._config.log_every_steps == 0 or step == self._total_steps:
            tokens = self._plan.tokens(step)
            perf = self._clock.read(self._plan.tokens(self._total_steps) - tokens)
            values['train/loss'] = sum(self._losses) / len(self._losses)
            values['opt/lr'] = self._parts.learning_rate(tokens)
            values['batch/windows'] = self._plan.position(step - 1)[1]
            self._writer.write(step, tokens, values | perf)
            self._losses.clear()
            self._note = (
                f'loss {values["train/loss"]:.3f}, {perf["perf/tokens_per_sec"]:,.0f} tokens/s'
            )
        return self._note + self._evaluation
