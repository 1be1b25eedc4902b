# SPDX-License-Identifier: Apache-2.0
"""Pretrains a language model on token shards; run again, it goes on where it stopped.

Laptop:
  python -m gptjax.train --config=experiments/quickstart.py --workdir=runs/quickstart
TPU VM, on every host of a v5e-16, the workdir on a disk that all of them mount:
  python -m gptjax.train --config=experiments/gpt2/pretrain.py:size=small --workdir=/shared/run \
      --config.mesh.fsdp=16 --config.mesh.data=1 --config.model.n_vocab=50304 \
      --config.batch.accum_steps=8 --config.model.remat=full --distributed
"""

import functools
import json
import logging
import pathlib
import time
from typing import Any

import jax
import ml_collections

from gptjax.configs import cli, errors
from gptjax.data import inputs, loader, tokens
from gptjax.evals import during, perplexity, suite
from gptjax.models import heads, pretrained
from gptjax.runtime import checkpoint, clock, inventory, metrics, program, progress, saver
from gptjax.runtime import mesh as mesh_lib
from gptjax.text import files
from gptjax.text import tokenizer as tokenizer_lib
from gptjax.training import loop, losses, optim
from gptjax.training import step as step_lib

RESULTS = 'results.json'
# What may differ when a run goes on; everything else makes it another run.
# (tokens and tokenizer are compared by hash; accumulation changes dropout's draws, nothing else).
_FREE = (
    'corpus', 'tokenizer', 'tokens', 'checkpoint', 'data_dir', 'decode', 'evaluate', 'mesh',
    'suite', 'batch.accum_steps', 'train.log_every_steps', 'train.eval_every_steps',
    'train.on_spike', 'train.spike_sigmas', 'train.rollback_steps', 'train.layer_norms',
    'train.profile_at_step', 'train.profile_steps', 'train.wandb_project', 'optim.offload',
    'model.remat', 'model.scan_layers', 'data.sets', 'data.eval_set', 'data.prefetch_steps',
    'data.stage_dir',
)  # fmt: skip
_MOST_ROLLBACKS = 10  # of one process: then it is not the batches
_log = logging.getLogger('gptjax')


def main(args: cli.Args) -> None:
    """Trains to the end of the config, then writes WORKDIR/results.json."""
    config, workdir = args.config, pathlib.Path(args.workdir)
    began = time.monotonic()
    sections = Sections(config)
    with program.only_one(workdir):
        mesh = mesh_lib.Mesh(mesh_lib.Config(**config.mesh))
        with progress.Progress('open tokens', None, ' tokens staged') as bar:
            sets, held_out = inputs.open_all(
                sections.data, workdir / config.tokenizer.dir, workdir,
                workdir / pretrained.TOKENIZER, program.is_first(), bar.advance,
            )  # fmt: skip
        inputs.check_vocabulary(sections.model.n_vocab, sets)
        perplexity.check(held_out, sections.scored_ctx, sections.evaluate)
        with mesh.scope():
            run = _Run(config, sections, workdir, mesh, sets, held_out)
            until_step = 2**62
            while True:  # once, and once more after every spike that is gone back from
                try:
                    results = run.train(until_step)
                    break
                except loop.Spike as e:
                    until_step = run.go_back(e)
    if results is None:
        _log.info('training in %s is done already', workdir)
        return
    if program.is_first():
        files.replace(workdir / RESULTS, json.dumps(results, indent=1) + '\n')
    _log.info('done in %.0f s: %s', time.monotonic() - began, json.dumps(results))


class _Run:
    """A run in its workdir: from its newest checkpoint, or a beginning, to its end."""

    def __init__(self, config, sections, workdir, mesh, sets, held_out) -> None:
        self._config, self._sections, self._workdir = config, sections, workdir
        self._mesh, self._sets, self._held_out = mesh, sets, held_out
        self._total_tokens = _total_tokens(sections.train, sets)
        self._plan = _plan(sections, mesh)
        self._total_steps = self._plan.steps(self._total_tokens)
        self._model = heads.LanguageModel(sections.model)
        self._optimizer = optim.make(
            sections.optim, self._total_tokens, self._plan, sections.model.rate_scale
        )
        self._options = step_lib.Options(
            accum_steps=sections.batch.accum_steps,
            ema_decay=sections.optim.ema_decay,
            spike_sigmas=sections.train.spike_sigmas,
            skip_spikes=sections.train.on_spike == 'skip',
            layer_norms=sections.train.layer_norms,
            offload=sections.optim.offload,
        )
        self._target = step_lib.abstract(
            self._model.init_params, self._optimizer, mesh.shardings, self._options
        )
        loss = losses.next_token(self._model.apply, dropout=True)
        self._train_step = step_lib.make_train_step(
            loss, self._optimizer, config.seed, self._options, self._target
        )
        self._eval_step = step_lib.make_eval_step(losses.next_token(self._model.apply))
        asked = (sections.suite, config.data_dir, workdir / pretrained.TOKENIZER)
        self._tasks = during.scorer(self._model, *asked, mesh.rows())
        self._provenance, self._spikes = '', 0

    def train(self, until_step: int) -> dict[str, Any] | None:
        """Goes on from the newest checkpoint up to `until_step`; None where all is done already."""
        config, sections, plan = self._config, self._sections, self._plan
        state, found = self._begin(until_step)
        if int(state.step) >= self._total_steps and (self._workdir / RESULTS).exists():
            return None
        n_params = sum(x.size for x in jax.tree.leaves(state.params))
        per_token = sections.model.flops_per_token(n_params)
        watch = clock.Clock(per_token)
        if found:
            watch.restore(found[1]['clock'])
        rows = metrics.read(self._workdir)
        watch.lost(max((row.get('perf/total_secs', 0.0) for row in rows), default=0.0))
        checkpoints = checkpoint.Checkpoints(self._workdir, sections.checkpoint.keep)
        writer = (
            metrics.Writer(self._workdir, int(state.step), per_token, sections.train.wandb_project)
            if program.is_first()
            else metrics.Silent()
        )
        profiler = clock.Profiler(
            self._workdir, sections.train.profile_at_step, sections.train.profile_steps
        )
        saves = saver.Saver(checkpoints)
        try:
            state, evaluation = loop.fit(
                state,
                loader.batches(
                    self._sets, sections.data, sections.model.n_ctx, config.seed, plan.windows,
                    lambda n: self._mesh.region(n, sections.model.n_ctx),
                    int(state.step), self._total_steps,
                ),
                loop.Parts(
                    train_step=self._train_step,
                    put=lambda batch, n: self._mesh.put(batch, n, sections.model.n_ctx),
                    learning_rate=lambda t: float(
                        optim.learning_rate(sections.optim, self._total_tokens, float(t))
                    ),
                    evaluate=self._evaluate,
                    save=functools.partial(self._save, saves),
                    save_due=saves.due,
                ),
                plan, self._total_steps, sections.train, sections.checkpoint, writer, watch,
                profiler,
            )  # fmt: skip
        finally:
            try:
                profiler.close()
                checkpoints.close()
            except checkpoint.SaveError as e:
                _log.warning('%s', e)  # an earlier save; the last one is waited for
            finally:
                writer.close()
        evaluation = evaluation or self._evaluate(state)
        results = {'steps': self._total_steps, 'tokens': plan.tokens(self._total_steps)}
        results |= {'parameters': n_params, 'train_secs': round(watch.totals()['train_secs'], 1)}
        return (
            results
            | evaluation
            | ({'initialised_from': self._provenance} if self._provenance else {})
        )

    def go_back(self, spike: loop.Spike) -> int:
        """Prepares to train on without the batches before a spike.

        Goes back to the newest checkpoint that is rollback_steps old, to the oldest where none is,
        to the beginning where there is no checkpoint.

        Returns:
          the step to go on from.

        Raises:
          InputError: spikes end the run, or will not end.
        """
        config = self._sections.train
        self._spikes += 1
        if config.on_spike != 'rollback' or self._spikes > _MOST_ROLLBACKS:
            raise errors.InputError(
                f'{spike}; nothing of it was saved. Lower --config.optim.peak_lr or clip_norm, in '
                'a new workdir; or let --config.train.on_spike=skip or rollback leave its batches '
                'out: the same command then goes on from the last checkpoint'
            ) from spike
        step = program.first_says(
            checkpoint.step_before(self._workdir, spike.step - config.rollback_steps)
        )
        self._plan.skip(step, spike.step)
        _log.warning('%s: going back to step %d, without the batches since', spike, step)
        closing = checkpoint.Checkpoints(self._workdir, self._sections.checkpoint.keep)
        closing.drop_after(step)
        closing.close()
        return program.first_says(step)  # not before they are dropped

    def _begin(self, until_step: int) -> tuple[step_lib.State, tuple | None]:
        """The state to train from, and the checkpoint it was read from.

        In this order: 1. the run's own newest whole checkpoint, 2. the weights of init_from, 3. a
        fresh initialisation from the seed.
        """
        config = self._config
        found = checkpoint.latest(self._workdir, until_step=until_step)
        _claim(self._workdir, config, found)
        if not self._spikes:
            self._describe()
        if found:
            self._provenance = found[1].get('provenance', '')
            state = self._restore(*found)
            _log.info('going on from step %d', int(state.step))
        elif config.init_from:
            self._provenance = pretrained.provenance(config.init_from)
            params = _initial(config.init_from, self._sections.model, self._sets[0], self._mesh)
            state = step_lib.init_from(params, self._optimizer, self._target, self._options)
        else:
            state = step_lib.init(
                self._model.init_params, self._optimizer, config.seed, self._target, self._options
            )
        return state, found

    def _restore(self, folder: pathlib.Path, meta: dict) -> step_lib.State:
        if meta['data']['sets'] != [token_set.digest for token_set in self._sets]:
            raise errors.InputError(
                f'{folder} was trained on other token shards than those in data.sets now; put the '
                'old ones back, or use another --workdir'
            )
        items = checkpoint.restore(folder, meta, **_items(self._target))
        state = step_lib.State(
            params=items['params'], average=items.get('average'), **items['rest']
        )
        if not self._spikes:
            self._plan.skipped[:] = [tuple(pair) for pair in meta['data']['skipped']]
        windows = self._plan.windows(meta['step'])[0]
        if not self._spikes and meta['data']['windows'] != windows:
            raise errors.InputError(
                f'{folder} had consumed {meta["data"]["windows"]} windows, this batch plan '
                f'{windows} by step {meta["step"]}; use the version of gptjax that made it'
            )
        return state

    def _save(
        self, saves: saver.Saver, step: int, state: step_lib.State, totals: dict, wait: bool
    ) -> None:
        meta = {
            'config': json.loads(self._config.to_json()),
            'data': {
                'windows': self._plan.windows(step)[0],
                'skipped': self._plan.skipped,
                'sets': [token_set.digest for token_set in self._sets],
            },
            'tokenizer': self._sets[0].fingerprint,
            'provenance': self._provenance,
            'clock': totals,
        }
        (saves.insist if wait else saves.save)(step, _items(state), meta)

    def _evaluate(self, state: step_lib.State) -> dict[str, float]:
        """Scores of the weights, and of their average where one is kept."""
        scores = {}
        for prefix, params in (('eval', state.params), ('eval_average', state.average)):
            if params is not None:
                found = perplexity.score(
                    self._eval_step, params, self._held_out, self._sections.scored_ctx,
                    self._sections.evaluate, self._mesh,
                ).named(self._config.data.eval_set) | self._tasks(params)  # fmt: skip
                scores |= {prefix + name.removeprefix('eval'): v for name, v in found.items()}
        return scores

    def _describe(self) -> None:
        """What is about to be trained, and what it takes of every device."""
        table, n_params, n_bytes = inventory.table(self._target.params)
        if program.is_first():
            files.replace(self._workdir / 'parameters.txt', table)
        _log.info(
            '%s parameters, %s steps of up to %s tokens, on %d %s device(s)', f'{n_params:,}',
            f'{self._total_steps:,}', f'{self._config.batch.batch_tokens:,}', jax.device_count(),
            jax.devices()[0].platform,
        )  # fmt: skip
        _log.info(
            'of a device: parameters %s, with the optimizer %s%s; every parameter in %s',
            inventory.size(n_bytes), inventory.size(inventory.per_device(self._target)),
            inventory.memory(), self._workdir / 'parameters.txt',
        )  # fmt: skip
        if getattr(self._sections.model, 'attention_dropout', 0):
            _log.info(
                'dropout of attention weights: the plain form of attention, which holds them all; '
                'model.attention_dropout = 0 uses the kernel for this platform'
            )


def _items(state: step_lib.State) -> dict[str, Any]:
    """A state as the items of a checkpoint."""
    rest = {'step': state.step, 'opt_state': state.opt_state, 'guard': state.guard}
    items = {'params': state.params, 'rest': rest}
    return items if state.average is None else items | {'average': state.average}


class Sections:
    """The sections of a config as their owners' dataclasses: every mistake is found here."""

    def __init__(self, config: ml_collections.ConfigDict) -> None:
        self.model = heads.configure(config.model)
        errors.require(
            config.model.family != 'ngram',
            'an n-gram model is counted, not trained: python -m gptjax.count_ngrams',
        )
        self.optim = optim.Config(**config.optim)
        self.batch = optim.Batch(**config.batch)
        self.train = loop.Config(**config.train)
        self.data = loader.Config(**config.data)
        self.evaluate = perplexity.Config(**config.evaluate)
        self.suite = suite.Config(**config.suite)
        self.checkpoint = checkpoint.Config(**config.checkpoint)
        self.scored_ctx = self.evaluate.n_ctx or self.model.n_ctx  # tokens of a held-out window


def _total_tokens(config: loop.Config, sets: list[tokens.TokenSet]) -> int:
    return config.total_tokens or max(1, round(config.total_epochs * sum(map(len, sets))))


def _plan(sections: Sections, mesh: mesh_lib.Mesh) -> optim.Plan:
    n_ctx, accum_steps = sections.model.n_ctx, sections.batch.accum_steps
    plan = optim.Plan(sections.batch, n_ctx)
    for windows in plan.sizes():
        mesh.check_batch(windows, n_ctx, accum_steps)
    mesh.check_batch(sections.evaluate.batch_windows, sections.scored_ctx)
    return plan


def _claim(workdir: pathlib.Path, config: ml_collections.ConfigDict, found: tuple | None) -> None:
    """Makes the workdir this config's. Raises InputError where it holds a run of another."""
    flat = _flat(config)
    if found and 'data' not in found[1]:
        raise errors.InputError(
            f'{workdir} holds converted weights, not a run; start from them in another --workdir, '
            f'with --config.init_from={workdir}'
        )
    if found:
        other = _flat(ml_collections.ConfigDict(found[1]['config']))
        differing = [
            f'{name} = {other.get(name)} there, {flat.get(name)} here'
            for name in sorted(flat.keys() | other.keys())
            if flat.get(name) != other.get(name)
        ]
        if differing:
            raise errors.InputError(
                f'{workdir} holds a run of another config ({"; ".join(differing)}); use another '
                '--workdir, or the config it was begun with'
            )
    if program.is_first():
        files.replace(workdir / 'config.json', config.to_json(indent=1) + '\n')


def _flat(config: ml_collections.ConfigDict) -> dict:
    """The fields that make a run what it is, by dotted name."""
    found = {}
    for name, value in json.loads(config.to_json()).items():
        if name in _FREE:
            continue
        if isinstance(value, dict):
            found |= {f'{name}.{field}': v for field, v in value.items()}
        else:
            found[name] = value
    return {name: value for name, value in found.items() if name not in _FREE}


def _initial(
    path: str, model: heads.Config, token_set: tokens.TokenSet, mesh: mesh_lib.Mesh
) -> Any:
    """The parameters of init_from, which must fit the model and the tokens."""
    with progress.Progress('read', None, ' parameters') as bar:
        found = pretrained.load(path, model.param_dtype, mesh.shardings, bar.advance)
    other = found.model.config
    fields = heads.differing(model, other)
    if fields:
        said = ', '.join(
            f'{f} = {getattr(other, f, None)} there, {getattr(model, f, None)} here' for f in fields
        )
        raise errors.InputError(
            f'{path} holds another model ({said}); set --config.model.<field> to what is there'
        )
    tokenizer = found.tokenizer
    if tokenizer and tokenizer_lib.fingerprint(tokenizer) != token_set.fingerprint:
        raise errors.InputError(
            f'the tokens in {token_set.folder} were made with another tokenizer than that of '
            f'{path}; prepare them with the latter: --config.tokenizer.kind=file '
            '--config.tokenizer.path=<its folder> (of a .gguf file: convert it first)'
        )
    return found.params


if __name__ == '__main__':
    program.run(main, __doc__)
