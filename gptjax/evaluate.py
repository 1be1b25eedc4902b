# SPDX-License-Identifier: Apache-2.0
"""Scores a model: on held-out text, on the papers' tasks, or on any task of lm-evaluation-harness.

Laptop, held-out text (nats per token, bits per byte, word perplexity):
  python -m gptjax.evaluate --config=experiments/quickstart.py --workdir=runs/quickstart
Tasks at zero, one and few shots; PATH is a workdir, a published folder or a .gguf file:
  python -m gptjax.evaluate --config=experiments/gpt3/eval.py:tasks=lambada+piqa,k=0+1+few \
      --config.init_from=PATH --config.data_dir=tasks --workdir=runs/scores
Any task of EleutherAI's harness (pip install 'gptjax[eval]'), with its own arguments:
  python -m gptjax.evaluate harness --model_args pretrained=PATH --tasks lambada_openai,piqa
TPU VM; batches are spread over --config.mesh.data devices (several hosts: --distributed):
  python -m gptjax.evaluate --config=experiments/gpt3/eval_few_shot.py --config.init_from=PATH \
      --config.suite.batch_tokens=65536 --workdir=/data/scores
"""

import contextlib
import logging
import math
import pathlib
import sys
from typing import Any

import jax

from gptjax.configs import base, cli, errors
from gptjax.data import inputs, loader, tokens
from gptjax.evals import contamination, fewshot, perplexity, report, suite
from gptjax.models import pretrained, sources, weights
from gptjax.runtime import alike, hosts, program, progress
from gptjax.runtime import mesh as mesh_lib
from gptjax.sampling import loaded as loaded_lib
from gptjax.storage import documents, files, scratch
from gptjax.text import tokenizer as tokenizer_lib
from gptjax.training import step as step_lib

READS = ('init_from', 'data_dir', 'data', 'evaluate', 'suite', 'mesh')
EVALUATION = 'evaluation.json'
_log = logging.getLogger('gptjax')


def main(args: cli.Args) -> None:
    """Scores held-out text, or the tasks of the suite section where it names any."""
    (_suite if args.config.suite.tasks else _held_out)(args)


def _opened(args: cli.Args) -> tuple[weights.Source, pathlib.Path]:
    """The weights, and the workdir, which can be written."""
    source = sources.open(args.config.init_from or args.workdir)
    workdir = pathlib.Path(args.workdir)
    if hosts.is_first():
        files.check_writable(workdir)
    return source, workdir


def _suite(args: cli.Args) -> None:
    """Writes WORKDIR/results.jsonl and results.md after every task, items as they are scored."""
    config = args.section('suite', suite.Config)
    source, workdir = _opened(args)
    mesh = mesh_lib.Mesh(args.section('mesh', mesh_lib.Config))
    others = [scratch.small(scratch.here(other)) for other in config.beside]
    for other in others:
        errors.require(bool(report.read(other)), f'{other} holds no results.jsonl')
    jobs, absent = _at_hand(config, args.config.data_dir)
    alike.check_same(config=base.plain(args.config), tasks=[job.label for job in jobs])
    with mesh.scope(), program.only_one(workdir):  # items are kept as they are scored
        with progress.Progress('read', None, ' parameters') as bar:
            loaded = loaded_lib.load(source, mesh=mesh, progress=bar.advance, raw=True)
        respondent = suite.respondent(config, loaded, mesh.rows())
        about = _about(loaded, source)
        identity = {'weights': about['weights'], 'state': source.identity()}
        rows, overlaps = [], _overlaps(jobs, respondent, config, args.config.data_dir)
        for number, job in enumerate(jobs, 1):
            bar = _Bar(f'{number} of {len(jobs)}: {job.name}, {job.k} shots, seed {job.seed}')
            try:
                asked = _asked(job, respondent, config, args.config.data_dir)
                kept = workdir / suite.ITEMS
                how = (kept, identity, bar.advance, bar.begin, overlaps)
                found = suite.run(job, asked, respondent, config, *how)
            except suite.Unscorable as e:
                _log.warning('%s, %d shots is not scored: %s', job.name, job.k, e)
                absent[_named(job)] = str(e)
                continue
            finally:
                bar.close()
            rows += [row | about for row in found]
            _log.info('%s, %d shots: %s', job.name, job.k, _said(found))
            if hosts.is_first():
                left = {_named(job): 'not yet' for job in jobs[number:]}
                report.write(workdir, rows, absent | left, ())
        if not rows:
            raise errors.InputError('none of the tasks is scored: ' + '; '.join(absent.values()))
        if not hosts.is_first():
            return
        comparisons = [c for other in others for c in suite.compared(workdir, other, jobs)]
        beside = [report.read(other) for other in others]
        written = report.write(workdir, rows, absent, comparisons)
        for path in written + report.draw(workdir, rows, beside):
            _log.info('wrote %s', path)
    print((workdir / report.TABLE).read_text(encoding='utf-8'))


def _asked(job: suite.Job, respondent: Any, config: suite.Config, data_dir: str) -> fewshot.Prompts:
    """What a job asks, the same on all hosts. Raises as suite.load()."""
    try:
        found, why = suite.load(job, respondent, config, data_dir), None
    except suite.Unscorable as e:
        found, why = None, e
    alike.check_same(job={job.label: str(why) if why else suite.digest(found.prompts)})
    if why:
        raise why
    return found


def _overlaps(
    jobs: list[suite.Job], respondent: Any, config: suite.Config, data_dir: str
) -> contamination.Overlaps | None:
    """Of all tasks' items with the corpus of suite.clean_against, if any."""
    if not config.clean_against:
        return None
    texts = []
    for job in jobs:
        with contextlib.suppress(suite.Unscorable):  # which its turn will say
            texts.append(suite.texts_of(suite.load(job, respondent, config, data_dir)))
    return contamination.Overlaps(texts, config.clean_against)


def _at_hand(config: suite.Config, data_dir: str) -> tuple[list[suite.Job], dict[str, str]]:
    """The jobs whose data is at hand, and the others -> why not; before any weight is read.

    Raises:
      InputError: there is none, or data is damaged.
    """
    why, jobs = suite.absent(config, data_dir), suite.jobs(config)
    if len(why) == len(set(config.tasks)):
        raise errors.InputError('none of the tasks has data at hand: ' + '; '.join(why.values()))
    for name, said in why.items():
        _log.warning('%s is not scored: %s', name, said)
    absent = {_named(job): why[job.name] for job in jobs if job.name in why}
    return [job for job in jobs if job.name not in why], absent


def _named(job: suite.Job) -> str:
    return f'{job.name}, {job.k} shots'


def _about(loaded: loaded_lib.Loaded, source: weights.Source) -> dict[str, Any]:
    """What a result says of the model: weights, parameters, training, commit of this code."""
    config = loaded.decoder.model.config
    shapes = jax.eval_shape(loaded.decoder.model.init_params, jax.random.key(0))
    n_params = sum(x.size for x in jax.tree.leaves(shapes))
    about = {'weights': source.said, 'parameters': n_params, 'commit': program.commit()}
    if source.train_tokens:
        about['train_flops'] = source.train_tokens * config.flops_per_token(n_params)
    return about


def _said(rows: list[dict[str, Any]]) -> str:
    return ', '.join(
        f'{row["metric"]} {row["value"]:.2f}' for row in rows if row['value'] is not None
    )


class _Bar:
    """A progress bar that is begun once the number of items is known."""

    def __init__(self, what: str) -> None:
        self._what, self._bar = what, None

    def begin(self, total: int, done: int) -> None:
        self._bar = progress.Progress(self._what, total, ' items', done).__enter__()

    def advance(self, items: int) -> None:
        self._bar.advance(items)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)


def _held_out(args: cli.Args) -> None:
    """Scores the held-out splits of config.data.eval_sets; writes WORKDIR/evaluation.json."""
    config = args.section('evaluate', perplexity.Config)
    data = loader.configure(args.config.data)
    errors.require(bool(data.eval_sets), 'data.eval_sets names no held-out set')
    source, workdir = _opened(args)
    mesh = mesh_lib.Mesh(args.section('mesh', mesh_lib.Config))
    found = {}
    with mesh.scope():
        with progress.Progress('open tokens', None, ' tokens checked') as bar:
            held_out = inputs.open_held_out(data, workdir, bar.advance)
        with progress.Progress('read', None, ' parameters') as bar:
            loaded = pretrained.load(source, shardings=mesh.shardings, progress=bar.advance)
        n_ctx = config.n_ctx or loaded.model.config.n_ctx
        for token_set in held_out.values():
            _check(token_set, loaded, source)
            perplexity.check(token_set, n_ctx, config)
        mesh.check_batch(config.batch_windows, n_ctx)
        measure = perplexity.measure(loaded.model.apply, config, source.objective)
        step = step_lib.make_eval_step(measure)
        for label, token_set in held_out.items():
            total = perplexity.n_windows(token_set, n_ctx, config)
            with progress.Progress(f'evaluate {label}', total, ' windows') as bar:
                score = perplexity.score(
                    step, loaded.params, token_set, n_ctx, config, mesh, bar.advance
                )
            if not math.isfinite(score.nats):
                raise errors.InputError(
                    f'{source.path} gives {token_set.folder} a loss of {score.nats}: its weights '
                    'make numbers that are none; take other weights'
                )
            found[label] = {'folder': args.config.data.eval_sets[label], **score.report()}
    written = {'weights': source.said, 'commit': program.commit(), 'sets': found}
    if hosts.is_first():
        documents.write(workdir / EVALUATION, written)
    print(f'{"weights":18} {source.said}')
    for one in found.values():
        for name, value in one.items():
            print(f'{name:18} {value:,.4f}' if isinstance(value, float) else f'{name:18} {value}')
    _log.info('wrote %s', workdir / EVALUATION)


def _check(
    token_set: tokens.TokenSet, loaded: pretrained.Pretrained, source: weights.Source
) -> None:
    """Raises InputError where the tokens are not those of the model."""
    if loaded.tokenizer is None:
        _log.warning('%s has no tokenizer to compare with that of the tokens', source.path)
    elif tokenizer_lib.fingerprint(loaded.tokenizer) != token_set.fingerprint:
        raise errors.InputError(
            f'the tokens in {token_set.folder} were made with another tokenizer than that of '
            f'{source.path}; prepare them with the latter (--config.tokenizer.kind=file; of a '
            '.gguf file, python -m gptjax.convert makes a folder that has it)'
        )
    else:
        token_set.check_ids(loaded.tokenizer)
    n_vocab = loaded.model.config.n_vocab
    errors.require(
        token_set.n_vocab <= n_vocab,
        f'the tokens in {token_set.folder} have {token_set.n_vocab} ids, the model of '
        f'{source.path} {n_vocab}; prepare them with its tokenizer',
    )


if __name__ == '__main__':
    if sys.argv[1:2] == ['harness']:
        try:
            from gptjax.evals import harness
        except errors.InputError as e:
            sys.exit(f'error: {e}')
        sys.exit(harness.main(sys.argv[2:]))
    program.run(main, __doc__, READS, default_config=base.OF_RUN)
