# SPDX-License-Identifier: Apache-2.0
"""A run: what every program that trains shares, from claiming its workdir to its results.

with run.Run(config, workdir, READS, train, checkpoints) as this:
    state = this.begin(recipe, fresh)
    for step, batch in ...:
        state, metrics = train_step(state, batch)
        this.after(step + 1, state, metrics)
    this.finish(state)
"""

import contextlib
import json
import logging
import math
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ml_collections

from gptjax.configs import base, errors
from gptjax.runtime import (
    alike,
    arrays,
    checkpoint,
    clock,
    compiled,
    hang,
    hosts,
    inventory,
    metrics,
    peers,
    profiler,
    program,
    progress,
    saver,
)
from gptjax.runtime import meta as meta_lib
from gptjax.runtime import results as results_lib
from gptjax.runtime import signals as signals_lib
from gptjax.storage import documents, files
from gptjax.training import branch, claim, section
from gptjax.training import reader as reader_lib
from gptjax.training import recipe as recipe_lib
from gptjax.training import step as step_lib

Spike = reader_lib.Spike
_MOST_ROLLBACKS = 10  # of one process: then it is not the batches
_UNSAVED = 'the steps since the last checkpoint'
_log = logging.getLogger(__name__)


class Run:
    """A run in its workdir: from its newest checkpoint, or a beginning, to its end."""

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        workdir: pathlib.Path,
        reads: Sequence[str],
        train: section.Config,
        checkpoints: checkpoint.Config,
    ) -> None:
        """Args: reads: sections and top-level fields of the config that the program reads."""
        self._config, self._workdir, self._reads = config, workdir, reads
        self._said = base.plain(config)
        self._train, self._kept = train, checkpoints
        self._claimed, self._open = contextlib.ExitStack(), contextlib.ExitStack()
        self._spikes, self._limit = 0, 2**62  # the step that a rollback goes back to
        self._provenance, self._began = '', time.monotonic()
        self._scores: dict[str, float] = {}
        program.commit()  # of the code that trains, not of what the checkout holds later

    def __enter__(self) -> 'Run':
        """Claims the workdir: no other process is at work in it meanwhile."""
        self._claimed.enter_context(program.only_one(self._workdir))
        compiled.keep_with(self._workdir)
        return self

    def __exit__(self, *raised: object) -> None:
        with self._claimed:
            self._open.close()

    def begin(
        self, recipe: recipe_lib.Recipe, fresh: Callable[[], tuple[step_lib.State, str]]
    ) -> step_lib.State | None:
        """The state to train from: of the newest whole checkpoint, else fresh().

        Args:
          fresh: gives the state to begin with, and the provenance of its weights, '' = none.

        Returns:
          None where all is done already.

        Raises:
          InputError: the workdir holds another run.
          Spike: the evaluation that a stop has cost gives a score that is not finite.
        """
        self._open.close()
        self._recipe, self._plan = recipe, recipe.plan
        self._check_best()
        alike.check_same(config=self._said, data=dict(recipe.data))
        found = checkpoint.latest(self._workdir, until_step=self._limit)
        self._claim(found[1] if found else None)
        whole = hosts.first_says(results_lib.is_whole(self._workdir))
        if found and found[1]['step'] >= self.total_steps and whole:
            _log.info('training in %s is done already', self._workdir)
            return None
        if not self._spikes and hosts.is_first():
            for name in (
                results_lib.NAME,
                results_lib.DIVERGED,
            ):  # of a shorter run, or another end
                (self._workdir / name).unlink(missing_ok=True)
            params = step_lib.items(recipe.target)['params']
            frozen = recipe.options.frozen
            table = inventory.describe(recipe.target, params, frozen, self.total_steps)
            files.replace(self._workdir / 'parameters.txt', table)
        if found:
            wanted = step_lib.items(recipe.target)
            items = checkpoint.restore(*found, may_lack={'rest': step_lib.LATER}, **wanted)
            state = step_lib.from_items(items, recipe.options, recipe.target)
            self._provenance = found[1]['provenance']
            _log.info('going on from step %d', int(state.step))
        else:
            state, self._provenance = fresh()
            arrays.compile_ahead(step_lib.items(recipe.target))
        self._prepare(int(state.step), found[1] if found else {})
        self._clock.pause()
        if self._plan.begins and not found:  # from now on it needs the other run no more
            self._save(int(state.step), state, wait=False)
        self._catch_up(state)
        self._clock.go_on()
        self._mark = time.monotonic()
        return state

    @property
    def total_steps(self) -> int:
        """When the run is done."""
        return self._plan.total_steps

    @contextlib.contextmanager
    def fetching(self, step: int) -> Iterator[None]:
        """While a step's batch is waited for: the time is counted, and told of where it is long."""
        began = time.monotonic()
        self._profiler.before(step, program.profile_requested())
        with self._watchdog:
            yield
        self._clock.waited(time.monotonic() - began)

    def after(self, step: int, state: step_lib.State, found: Mapping[str, Any]) -> None:
        """What is due once a step was dispatched: log, save, evaluate, stop.

        The metrics of step n - 1 are fetched after step n was dispatched, so the device never waits
        for a log; before a save or an evaluation step n's are read too, so no NaN is ever saved.

        Args:
          step: the number of updates, this one included.
          found: its metrics.

        Raises:
          Spike: the loss is not finite, or a spike, and steps are not skipped for it.
          program.Preempted: a signal came; the state was saved.
        """
        note = self._reader.push(step, found)
        tokens = self._plan.tokens(step) - self._plan.tokens(step - 1)
        self._clock.trained(tokens, time.monotonic() - self._mark)
        signals_lib.unsaved(_UNSAVED)
        self._bar.advance(tokens, note)
        last = step == self._plan.total_steps
        happens = self._happens(step)
        self._saver.end_if('end' in happens)
        stop = 'stop' in happens
        evaluating = (last or self._eval_due(step)) and not stop
        saving = 'save' in happens or stop or last
        if saving or evaluating:
            self._reader.read()
            self._clock.pause()
            if saving:
                self._save(step, state, wait=stop or last, stopping=stop)
            if evaluating:
                self._evaluate(step, state, saved=saving)
            self._clock.go_on()
        self._mark = time.monotonic()
        if stop:  # of the last step, too: its evaluation is caught up with
            raise program.Preempted

    def go_back(self, spike: Spike) -> None:
        """Prepares to begin again without the batches before a spike.

        Goes back to the newest checkpoint that is rollback_steps old, to the oldest of the newest
        `keep` where none is, to the beginning where there is no checkpoint.

        Raises:
          InputError: spikes end the run, or will not end.
          program.Preempted: a signal came meanwhile.
        """
        self._spikes += 1
        if self._train.on_spike != 'rollback' or self._spikes > _MOST_ROLLBACKS:
            if hosts.is_first():
                said = {'step': spike.step, 'why': str(spike)}
                documents.write(self._workdir / results_lib.DIVERGED, said)
            raise errors.InputError(
                f'{spike}; nothing of it was saved. {reader_lib.advice(self._train.on_spike)}'
            ) from spike
        self._open.close()  # a save under way ends, and counts
        wanted = spike.step - self._train.rollback_steps
        kept = self._kept.keep
        found = hosts.first_says(checkpoint.step_before(self._workdir, wanted, kept))
        step = max(found, self._plan.begins)  # what another run has done stays
        self._plan.skip(step, spike.step)
        _log.warning('%s: going back to step %d, without the batches since', spike, step)
        closing = self._checkpointing()
        closing.drop_after(step)
        closing.close()
        self._limit = hosts.first_says(step)  # not before they are dropped
        if hosts.agreed(program.stop_requested())[0]:
            raise program.Preempted  # the spike came in the step that was to be the last

    def finish(self, state: step_lib.State) -> dict[str, Any]:
        """Ends the run: writes WORKDIR/results.json, and gives what is in it."""
        self._open.close()
        steps = self._plan.total_steps
        results: dict[str, Any] = {'steps': steps, 'tokens': self._plan.tokens(steps)}
        results['parameters'] = step_lib.n_params(state)
        results['train_secs'] = round(self._clock.totals()['train_secs'], 1)
        results |= self._scores | {'commit': program.commit()}
        if self._recipe.evaluation.notes:
            results['notes'] = dict(self._recipe.evaluation.notes)
        if branched := self._recipe.data.get(branch.NAME):
            results['branched_from'] = branched['origin']
        if self._provenance:
            results['initialised_from'] = self._provenance
        if hosts.is_first():
            results_lib.write(self._workdir, results)
        _log.info('done in %.0f s: %s', time.monotonic() - self._began, json.dumps(results))
        return results

    def _happens(self, step: int) -> set[str]:
        """What happens after a step on every host, of what any wishes: 'save', 'stop', 'end'."""
        due = hosts.is_first() and self._secs_due(step)
        wishes = {
            'save': due or self._saver.due(),
            'stop': program.stop_requested(),
            'end': self._saver.over(),
        }
        for what, wished in wishes.items():
            if wished:
                peers.here().want(what)
        always = self._steps_due(step) or step in self._kept.keep_steps
        return peers.here().after(step) | ({'save'} if always else set())

    def _claim(self, meta: Mapping[str, Any] | None) -> None:
        """Makes the workdir this run's. Raises InputError where it holds another."""
        if meta:
            config = self._said
            longer = claim.goes_on(meta, config, self._recipe.rate_of, self.total_steps)
            may_differ = claim.LENGTH if longer else ()
            claim.check(self._workdir, meta, config, self._reads, self._recipe.data, may_differ)
            if not self._spikes:
                self._plan.restore(meta['step'], meta['data'])
        if hosts.is_first():
            if meta is None:
                results_lib.begin(self._workdir)
            documents.write(self._workdir / base.OF_RUN, self._said)

    def _prepare(self, step: int, meta: Mapping[str, Any]) -> None:
        """Opens what a run writes to, and what watches it. meta: of its checkpoint, if any."""
        train, plan, flops = self._train, self._plan, self._recipe.flops_per_token
        self._clock = clock.Clock(flops, self._open.enter_context(hang.Hang(train.end_if_hung)))
        if meta:
            self._clock.restore(meta['clock'])
        before = metrics.past(self._workdir, step)
        self._clock.lost(before.total_secs)
        row = before.row if before.row.get('step') == step else {}
        names = self._recipe.evaluation.names
        self._scores = {name: value for name, value in row.items() if name in names}
        peers.here().begin(step)
        self._steps_due = clock.Due(self._kept.every_steps)
        self._secs_due = clock.Due(0, self._kept.every_secs)
        self._eval_due = clock.Due(train.eval_every_steps)
        self._writer = metrics.Silent()
        if hosts.is_first():
            self._writer = metrics.Writer(self._workdir, before, flops, train.wandb_project)
        self._open.callback(self._writer.close)
        self._checkpoints = self._checkpointing()
        self._open.callback(self._close_checkpoints)
        self._saver = saver.Saver(
            self._checkpoints, self._kept.give_up_minutes, step if meta else 0
        )
        profiled = train.profile_at_step, train.profile_steps, train.profile_hosts
        self._profiler = profiler.Profiler(self._workdir, *profiled)
        self._open.callback(self._profiler.close)
        self._reader = reader_lib.Reader(
            train.log_every_steps, train.on_spike == 'skip', plan, self._writer, self._clock
        )
        self._reader.restore(meta.get('since_row', {}))
        ahead = (plan.tokens(plan.total_steps), ' tokens', plan.tokens(step))
        self._bar = self._open.enter_context(progress.Progress('train', *ahead, 'compiling ...'))
        self._watchdog = clock.Watchdog('the next batch: the data pipeline is slow, or dead')
        self._open.callback(self._watchdog.close)
        self._open.enter_context(program.graceful_stop())

    def _checkpointing(self) -> checkpoint.Checkpoints:
        kept = self._kept
        return checkpoint.Checkpoints(self._workdir, kept.keep, kept.keep_steps, kept.rule)

    def _close_checkpoints(self) -> None:
        try:
            self._checkpoints.close()
        except checkpoint.SaveError as e:
            _log.warning('%s', e)  # an earlier save; the last one is waited for

    def _catch_up(self, state: step_lib.State) -> None:
        """Makes the evaluation that a stop behind its checkpoint has cost."""
        step = int(state.step)
        due = step == self._plan.total_steps or self._eval_due(step)
        if hosts.first_says(bool(self._scores)):
            self._checkpoints.scored(step, self._scores)
        elif step and due and self._recipe.evaluation.names:
            self._evaluate(step, state, saved=True)

    def _save(self, step: int, state: step_lib.State, wait: bool, stopping: bool = False) -> None:
        self._writer.flush()
        self._secs_due.done()
        meta = meta_lib.of(
            self._config,
            self._recipe.head,
            self._recipe.tokenizer,
            self._provenance,
            data={**self._plan.saved(step), **self._recipe.data},
            clock=self._clock.totals(),
            since_row=self._reader.since_row(),
        )
        if wait:
            self._saver.insist(step, step_lib.items(state), meta, stopping)
        else:
            self._saver.save(step, step_lib.items(state), meta)
        signals_lib.unsaved('' if wait else _UNSAVED)

    def _evaluate(self, step: int, state: step_lib.State, saved: bool) -> None:
        """Scores a state; a mistake costs no step, and nothing that is not finite is kept.

        Raises:
          program.Preempted: a signal came meanwhile; the state was saved.
        """
        try:
            with program.stoppable() as check:
                found = self._recipe.evaluation.scores(state, check)
        except program.Preempted:
            if not self._saver.has(step):
                self._save(step, state, wait=True, stopping=True)
            raise
        except Exception:
            if not saved and hosts.is_alone():  # hosts save together, and the others do not fail
                self._save(step, state, wait=True)
            raise
        self._scores = {name: value for name, value in found.items() if value is not None}
        for name, value in self._scores.items():
            if not math.isfinite(value):
                self._checkpoints.drop_after(step - 1)
                raise Spike(step, f'{name} is {value}')
        self._writer.write(step, self._plan.tokens(step), self._scores)
        self._reader.evaluated(self._scores)
        if self._checkpoints.is_best(self._scores) and not saved:
            self._save(step, state, wait=False)
        self._checkpoints.scored(step, self._scores)

    def _check_best(self) -> None:
        name = self._kept.keep_best
        errors.require(
            not name or name in self._recipe.evaluation.names,
            f'checkpoint.keep_best = {name!r} is no score of this run; there are: '
            f'{", ".join(self._recipe.evaluation.names) or "none"}',
        )
