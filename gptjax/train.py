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
from gptjax.evals import perplexity
from gptjax.models import heads, pretrained
from gptjax.runtime import checkpoint, clock, metrics, program, progress
from gptjax.runtime import mesh as mesh_lib
from gptjax.text import files
from gptjax.text import tokenizer as tokenizer_lib
from gptjax.training import loop, losses, optim
from gptjax.training import step as step_lib

RESULTS = 'results.json'
# What may differ when a run goes on; everything else makes it another run.
# (tokens and tokenizer are compared by hash; accumulation changes dropout's draws, nothing else).
_FREE = (
    'corpus', 'tokenizer', 'tokens', 'checkpoint', 'decode', 'evaluate', 'mesh',
    'batch.accum_steps', 'train.log_every_steps', 'train.eval_every_steps', 'data.sets',
    'data.eval_set', 'data.prefetch_steps', 'data.stage_dir',
)  # fmt: skip
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
        total_tokens = _total_tokens(sections.train, sets)
        plan = _plan(sections, mesh)
        total_steps = plan.steps(total_tokens)
        model = heads.LanguageModel(sections.model)
        optimizer = optim.make(sections.optim, total_tokens, plan)
        with mesh.scope():
            target = step_lib.abstract(model.init_params, optimizer, mesh.shardings)
            # Where the state comes from, in this order: 1. the run's own newest whole checkpoint,
            # 2. the weights of init_from, 3. a fresh initialisation from the seed.
            found = checkpoint.latest(workdir)
            _claim(workdir, config, found)
            provenance = found[1].get('provenance', '') if found else ''
            if found:
                state = _restore(found, target, plan, sets)
                _log.info('going on from step %d', int(state.step))
            elif config.init_from:
                state = step_lib.init_from(
                    _initial(config.init_from, sections.model, sets[0], mesh), optimizer, target
                )
                provenance = pretrained.provenance(config.init_from)
            else:
                state = step_lib.init(model.init_params, optimizer, config.seed, target)
            n_params = sum(x.size for x in jax.tree.leaves(state.params))
            per_token = sections.model.flops_per_token(n_params)
            watch = clock.Clock(per_token)
            if found:
                watch.restore(found[1]['clock'])
            _log.info(
                '%s parameters, %s steps of up to %s tokens, on %d %s device(s)', f'{n_params:,}',
                f'{total_steps:,}', f'{config.batch.batch_tokens:,}', jax.device_count(),
                jax.devices()[0].platform,
            )  # fmt: skip

            eval_step = step_lib.make_eval_step(losses.next_token(model.apply))
            evaluate = functools.partial(
                _evaluate, eval_step, held_out, sections, mesh, config.data.eval_set
            )
            if int(state.step) >= total_steps and (workdir / RESULTS).exists():
                _log.info('training in %s is done already', workdir)
                return
            checkpoints = checkpoint.Checkpoints(workdir, sections.checkpoint.keep)
            writer = (
                metrics.Writer(workdir, int(state.step), per_token)
                if program.is_first()
                else metrics.Silent()
            )
            try:
                state, evaluation = loop.fit(
                    state,
                    loader.batches(
                        sets, sections.data, sections.model.n_ctx, config.seed, plan.position,
                        lambda n: mesh.region(n, sections.model.n_ctx),
                        int(state.step), total_steps,
                    ),
                    loop.Parts(
                        train_step=step_lib.make_train_step(
                            losses.next_token(model.apply, dropout=True), optimizer, config.seed,
                            sections.batch.accum_steps,
                        ),
                        put=lambda batch, n: mesh.put(batch, n, sections.model.n_ctx),
                        learning_rate=lambda t: float(
                            optim.learning_rate(sections.optim, total_tokens, float(t))
                        ),
                        evaluate=evaluate,
                        save=functools.partial(_save, checkpoints, config, plan, sets, provenance),
                    ),
                    plan,
                    total_steps,
                    sections.train,
                    sections.checkpoint,
                    writer,
                    watch,
                )  # fmt: skip
            except metrics.NotFinite as e:
                raise errors.InputError(
                    f'{e}; nothing of it was saved. Lower --config.optim.peak_lr or clip_norm, in '
                    'a new workdir; the same command goes on from the last checkpoint'
                ) from e
            finally:
                try:
                    checkpoints.close()
                finally:
                    writer.close()
            evaluation = evaluation or evaluate(state.params)
    results = {'steps': total_steps, 'tokens': plan.tokens(total_steps), 'parameters': n_params}
    results |= {'train_secs': round(watch.totals()['train_secs'], 1)} | evaluation
    results |= {'initialised_from': provenance} if provenance else {}
    if program.is_first():
        files.replace(workdir / RESULTS, json.dumps(results, indent=1) + '\n')
    _log.info('done in %.0f s: %s', time.monotonic() - began, json.dumps(results))


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


def _restore(
    found: tuple, target: step_lib.State, plan: optim.Plan, sets: list[tokens.TokenSet]
) -> step_lib.State:
    folder, meta = found
    if meta['data']['sets'] != [token_set.digest for token_set in sets]:
        raise errors.InputError(
            f'{folder} was trained on other token shards than those in data.sets now; put the old '
            'ones back, or use another --workdir'
        )
    rest = {'step': target.step, 'opt_state': target.opt_state}
    items = checkpoint.restore(folder, meta, params=target.params, rest=rest)
    state = step_lib.State(items['rest']['step'], items['params'], items['rest']['opt_state'])
    windows = plan.position(int(state.step))[0]
    if meta['data']['windows'] != windows:
        raise errors.InputError(
            f'{folder} had consumed {meta["data"]["windows"]} windows, this batch plan '
            f'{windows} by step {meta["step"]}; use the version of gptjax that made it'
        )
    return state


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


def _save(
    checkpoints: checkpoint.Checkpoints,
    config: ml_collections.ConfigDict,
    plan: optim.Plan,
    sets: list[tokens.TokenSet],
    provenance: str,
    step: int,
    state: step_lib.State,
    totals: dict,
) -> None:
    meta = {
        'config': json.loads(config.to_json()),
        'data': {
            'windows': plan.position(step)[0],
            'sets': [token_set.digest for token_set in sets],
        },
        'tokenizer': sets[0].fingerprint,
        'provenance': provenance,
        'clock': totals,
    }
    checkpoints.save(step, state.params, {'step': state.step, 'opt_state': state.opt_state}, meta)


def _evaluate(eval_step, held_out, sections, mesh, name, params) -> dict[str, float]:
    found = perplexity.score(
        eval_step, params, held_out, sections.scored_ctx, sections.evaluate, mesh
    )
    return found.named(name)


if __name__ == '__main__':
    program.run(main, __doc__)
