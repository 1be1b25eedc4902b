# SPDX-License-Identifier: Apache-2.0
"""Scores a model: on held-out text, on the papers' tasks, or on any task of lm-evaluation-harness.

Laptop, held-out text (nats per token, bits per byte, word perplexity):
  python -m gptjax.evaluate --config=experiments/quickstart.py --workdir=runs/quickstart
Tasks at zero, one and few shots; PATH is a workdir, a published folder or a .gguf file:
  python -m gptjax.evaluate --config=experiments/gpt3/eval.py:tasks=lambada+piqa,k=0+1+few \
      --config.init_from=PATH --config.data_dir=tasks --workdir=runs/scores
Any task of EleutherAI's harness (pip install 'gptjax[eval]'), with its own arguments:
  python -m gptjax.evaluate harness --model_args pretrained=PATH --tasks lambada_openai,piqa
TPU VM, one host; batches are spread over --config.mesh.data devices:
  python -m gptjax.evaluate --config=experiments/gpt3/eval_few_shot.py --config.init_from=PATH \
      --config.suite.batch_tokens=65536 --workdir=/data/scores
"""

import json
import logging
import pathlib
import subprocess
import sys
from typing import Any

import jax

from gptjax.configs import base, cli, errors
from gptjax.data import loader, tokens
from gptjax.data.labelled import sets
from gptjax.evals import perplexity, report, suite
from gptjax.models import pretrained
from gptjax.runtime import checkpoint, program, progress
from gptjax.runtime import mesh as mesh_lib
from gptjax.sampling import pipeline
from gptjax.text import files
from gptjax.text import tokenizer as tokenizer_lib
from gptjax.training import losses
from gptjax.training import step as step_lib

EVALUATION = 'evaluation.json'
_log = logging.getLogger('gptjax')


def main(args: cli.Args) -> None:
    """Scores held-out text, or the tasks of the suite section where it names any."""
    (_suite if args.config.suite.tasks else _held_out)(args)


def _mesh(args: cli.Args, weights: str) -> mesh_lib.Mesh:
    if pretrained.wants_one_device(weights):
        return mesh_lib.one_device()
    return mesh_lib.Mesh(mesh_lib.Config(**args.config.mesh))


def _suite(args: cli.Args) -> None:
    """Writes WORKDIR/results.jsonl, results.md and pictures; items as they are scored."""
    config = suite.Config(**args.config.suite)
    workdir = pathlib.Path(args.workdir)
    weights = args.config.init_from or args.workdir
    mesh = _mesh(args, weights)
    errors.require(
        jax.process_count() == 1, 'tasks are scored by one process; leave --distributed out'
    )
    for other in config.beside:
        errors.require(bool(report.read(pathlib.Path(other))), f'{other} holds no results.jsonl')
    with mesh.scope(), program.only_one(workdir), program.graceful_stop():
        with progress.Progress('read', None, ' parameters') as bar:
            loaded = pipeline.load(weights, mesh=mesh, progress=bar.advance, raw=True)
        respondent = suite.respondent(config, loaded, mesh.rows())
        about = _about(loaded, weights)
        rows, absent = [], {}
        jobs = suite.jobs(config)
        for number, job in enumerate(jobs, 1):
            bar = _Bar(f'{number} of {len(jobs)}: {job.name}, {job.k} shots, seed {job.seed}')
            try:
                found = suite.run(
                    job, respondent, config, args.config.data_dir, workdir / suite.ITEMS,
                    {'weights': about['weights'], 'state': _state(weights)}, bar.advance,
                    bar.begin,
                )  # fmt: skip
            except (sets.Absent, suite.Unscorable) as e:
                _log.warning('%s, %d shots is not scored: %s', job.name, job.k, e)
                absent[f'{job.name}, {job.k} shots'] = str(e)
                continue
            finally:
                bar.close()
            rows += [row | about for row in found]
            _log.info('%s, %d shots: %s', job.name, job.k, _said(found))
        if not rows:
            raise errors.InputError(
                'none of the tasks has data at hand: ' + '; '.join(absent.values())
            )
        others = [pathlib.Path(other) for other in config.beside]
        comparisons = [c for other in others for c in suite.compared(workdir, other, jobs)]
        beside = [report.read(other) for other in others]
        for path in report.write(workdir, rows, absent, comparisons, beside):
            _log.info('wrote %s', path)
    print((workdir / report.TABLE).read_text(encoding='utf-8'))


def _about(loaded: pipeline.Loaded, weights: str) -> dict[str, Any]:
    """What a result says of the model: weights, parameters, training, commit of this code."""
    said = ', '.join(filter(None, (str(weights), pretrained.provenance(weights))))
    config = loaded.decoder.model.config
    shapes = jax.eval_shape(loaded.decoder.model.init_params, jax.random.key(0))
    n_params = sum(x.size for x in jax.tree.leaves(shapes))
    about = {'weights': said, 'parameters': n_params, 'commit': _commit()}
    meta = checkpoint.newest_meta(weights) or {}
    if windows := meta.get('data', {}).get('windows'):  # one of our training runs
        about['train_flops'] = windows * config.n_ctx * config.flops_per_token(n_params)
    return about


def _state(weights: str) -> list:
    """Changes when other weights stand under the same path: the step, or the files' times."""
    meta = checkpoint.newest_meta(weights)
    if meta:
        return [meta['step']]
    path = pathlib.Path(weights)
    found = [path] if path.is_file() else sorted(path.glob('*.safetensors'))
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in found]


def _commit() -> str:
    """Of the checkout this runs from; '' where it is none."""
    try:
        found = subprocess.run(
            ['git', 'log', '-1', '--format=%h', '--', __file__],
            cwd=pathlib.Path(__file__).parent, capture_output=True, text=True, check=False,
        )  # fmt: skip
    except OSError:  # no git here
        return ''
    return found.stdout.strip()


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
    """Scores the held-out split of config.data.eval_set; writes WORKDIR/evaluation.json."""
    config = perplexity.Config(**args.config.evaluate)
    workdir = pathlib.Path(args.workdir)
    weights = args.config.init_from or args.workdir
    mesh = _mesh(args, weights)
    provenance = pretrained.provenance(weights)
    data = loader.Config(**args.config.data)
    with progress.Progress('stage', None, ' tokens') as bar:
        folder = tokens.locate(data.eval_set, workdir, data.stage_dir, bar.advance)
    held_out = tokens.open_set(folder, 'valid')
    with mesh.scope():
        with progress.Progress('read', None, ' parameters') as bar:
            model, params, tokenizer = pretrained.load(
                weights, shardings=mesh.shardings, progress=bar.advance
            )
        if tokenizer is None:
            _log.warning('%s has no tokenizer to compare with that of the tokens', weights)
        elif tokenizer_lib.fingerprint(tokenizer) != held_out.fingerprint:
            raise errors.InputError(
                f'the tokens in {held_out.folder} were made with another tokenizer than that of '
                f'{weights}; prepare them with the latter (--config.tokenizer.kind=file; of a '
                '.gguf file, python -m gptjax.convert makes a folder that has it)'
            )
        n_ctx = config.n_ctx or model.config.n_ctx
        errors.require(
            held_out.n_vocab <= model.config.n_vocab,
            f'the tokens in {held_out.folder} have {held_out.n_vocab} ids, the model of {weights} '
            f'{model.config.n_vocab}; prepare them with its tokenizer',
        )
        perplexity.check(held_out, n_ctx, config)
        mesh.check_batch(config.batch_windows, n_ctx)
        total = perplexity.n_windows(held_out, n_ctx, config)
        with progress.Progress('evaluate', total, ' windows') as bar:
            found = perplexity.score(
                step_lib.make_eval_step(losses.next_token(model.apply)), params, held_out, n_ctx,
                config, mesh, bar.advance,
            )  # fmt: skip
    report = {
        'weights': ', '.join(filter(None, (str(weights), provenance))),
        'set': args.config.data.eval_set,
        'protocol': found.protocol,
        'documents': found.documents,
        'tokens': found.tokens,
        'bytes': found.text_bytes,
        'words': found.words,
        **found.metrics(),
    }
    workdir.mkdir(parents=True, exist_ok=True)
    if program.is_first():
        files.replace(workdir / EVALUATION, json.dumps(report, indent=1) + '\n')
    for name, value in report.items():
        print(f'{name:18} {value:,.4f}' if isinstance(value, float) else f'{name:18} {value}')
    _log.info('wrote %s', workdir / EVALUATION)


if __name__ == '__main__':
    if sys.argv[1:2] == ['harness']:
        try:
            from gptjax.evals import harness
        except errors.InputError as e:
            sys.exit(f'error: {e}')
        sys.exit(harness.main(sys.argv[2:]))
    program.run(main, __doc__, default_config=base.__file__)
