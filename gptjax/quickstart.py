# SPDX-License-Identifier: Apache-2.0
"""From nothing to a GPT that writes, and its baselines: the programs one by one, then a report.

What is done is not repeated; what was interrupted goes on. Laptop:
  python -m gptjax.quickstart --workdir=runs/quickstart
TPU VM, on one host, with an experiment of your own:
  python -m gptjax.quickstart --workdir=/data/run \
      --config=experiments/shakespeare_char.py:path=input.txt
"""

import json
import logging
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import ml_collections

from gptjax.configs import cli, errors
from gptjax.runtime import plots, program, results, signals, workers
from gptjax.storage import documents, files, scratch

CONFIG = 'experiments/quickstart.py'
# What the programs read that it runs.
READS = (
    'seed',
    'init_from',
    'init_state',
    'data_dir',
    'corpus',
    'tokenizer',
    'tokens',
    'data',
    'model',
    'ngram',
    'batch',
    'optim',
    'train',
    'evaluate',
    'suite',
    'checkpoint',
    'mesh',
    'decode',
    'engine',
)
# Short, so that they fit small contexts too.
_PROMPTS = ('Return a list of', 'The following example', 'This module provides')
REPORT, _EVALUATION = 'report.md', 'evaluation.json'
_PICTURES = ('loss.png', 'comparison.png')
_SAMPLES = 'report_samples.jsonl'  # apart from those that people generate here later
_LABELS = {'ngram': 'n-gram', 'lstm': 'LSTM', 'GPT': 'GPT'}
# The programs in order, and what each leaves below the workdir when it has run to its end.
_OUTPUTS = {
    'prepare_corpus': 'corpus/manifest.json',
    'train_tokenizer': 'tokenizer/recipe.json',
    'prepare_tokens': 'tokens/manifest.json',
    'train': results.NAME,
    'evaluate': _EVALUATION,
    'generate': _SAMPLES,
    'count_ngrams': results.NAME,
}
# The baselines, each in a folder of its own: variant of the config file -> the program that makes
# it. A config file that does not know the variant has no baselines.
_BASELINES = {'ngram': 'count_ngrams', 'lstm': 'train'}
_AGAIN = 'run the same command again'
_log = logging.getLogger('gptjax')


def main(args: cli.Args) -> None:
    """Writes WORKDIR/report.md and everything it names."""
    workdir = pathlib.Path(args.workdir)
    errors.require(
        scratch.origin(workdir) == workdir,
        'the quickstart writes to a disk; docs/pods.md has the programs it runs, for buckets',
    )
    workdir.mkdir(parents=True, exist_ok=True)
    argv = cli.with_config(sys.argv, CONFIG)
    steps = _steps(argv, args.config, workdir)
    began = time.monotonic()
    for number, step in enumerate(steps, 1):
        made_by = [args.config.to_json(), step.command[1:]]
        done = step.folder / f'.done-{step.name}'
        if _is_done(done, made_by, [step.folder / step.output]):
            _log.info('%d/%d %s: done already', number, len(steps), step.name)
            continue
        _log.info('%d/%d %s', number, len(steps), shlex.join(['python', *step.command[1:]]))
        _run(step.command)
        files.replace(done, _stamp(made_by, [step.folder / step.output]))
        (workdir / REPORT).unlink(missing_ok=True)
    done, report = workdir / '.done-report', [workdir / name for name in (REPORT, *_PICTURES)]
    if not _is_done(done, [], report):
        _report(args, workdir, argv[1:])
        files.replace(done, _stamp([], report))
    _log.info('all done in %.0f s; read %s', time.monotonic() - began, workdir / REPORT)


def _stamp(made_by: list, outputs: list[pathlib.Path]) -> str:
    """What stands beside outputs that are whole: what they were made by, and their bytes."""
    return json.dumps([*made_by, *(files.sha256(path) for path in outputs if path.is_file())])


def _is_done(done: pathlib.Path, made_by: list, outputs: list[pathlib.Path]) -> bool:
    stands = outputs[0].is_file() and done.is_file()
    return stands and done.read_bytes() == _stamp(made_by, outputs).encode()


class _Step(NamedTuple):
    name: str
    command: list[str]
    folder: pathlib.Path
    output: str  # below the folder, when it has run to its end


def _steps(argv: list[str], config: ml_collections.ConfigDict, workdir: pathlib.Path) -> list:
    prompts = [f'--samples={_SAMPLES}', *(f'--prompt={prompt}' for prompt in _PROMPTS)]

    def step(program_: str, name: str, flags: list[str], folder: pathlib.Path) -> _Step:
        extra = prompts if program_ == 'generate' else []
        own = cli.for_program(flags, program_)
        command = [sys.executable, '-m', f'gptjax.{program_}', *own, *extra]
        return _Step(name, command, folder, _OUTPUTS[program_])

    steps = [step(name, name, argv[1:], workdir) for name in _OUTPUTS if name != 'count_ngrams']
    for baseline, program_ in _BASELINES.items():
        flags = _baseline_flags(argv, baseline, config, workdir)
        if not flags:
            _log.info('the config file has no model=%s: no such baseline', baseline)
            continue
        folder = workdir / baseline
        steps.append(step(program_, baseline, flags, folder))
        steps.append(step('generate', f'{baseline}-generate', flags, folder))
    return steps


def _baseline_flags(
    argv: list[str], baseline: str, config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> list[str]:
    """The command line of a baseline on the same tokens; empty where there is none."""

    def shared(name: str) -> str:
        return name if '://' in name else str(pathlib.PurePath('..') / name)

    flags = cli.variant(argv, f'model={baseline}', str(workdir / baseline))
    try:
        cli.load(flags[0].partition('=')[2])
    except errors.UsageError:  # of a config file that does not know the variant
        return []
    common = ('--config.model.n_ctx=', '--config.model.n_vocab=')  # the rest is the GPT's
    flags = [f for f in flags if 'model' not in cli.sections([f]) or f.startswith(common)]
    return [
        *flags,
        f'--config.tokenizer.dir={shared(config.tokenizer.dir)}',
        f'--config.data.sets={tuple(map(shared, config.data.sets))!r}',
        *(
            f'--config.data.eval_sets.{label}={shared(folder)}'
            for label, folder in config.data.eval_sets.items()
            if folder
        ),
    ]


def _stop_with_us() -> None:
    """Tells the programs of a killed quickstart to stop and save."""
    workers.signalled_with_parent(signal.SIGTERM)


def _run(command: list[str]) -> None:
    """Runs one program; a signal to us is passed on, and its exit code becomes ours."""
    child: subprocess.Popen | None = None
    asked = False

    def pass_on() -> None:
        nonlocal asked
        asked = True
        if child is not None:
            child.send_signal(signal.SIGTERM)

    with signals.handled(pass_on):
        # A group of its own: Ctrl-C reaches us alone, and is passed on once.
        child = subprocess.Popen(command, preexec_fn=_stop_with_us, process_group=0)
        if asked:  # before there was a child; twice is as once
            pass_on()
        code = child.wait()
    if code == program.PREEMPTED or (asked and code in (0, -signal.SIGTERM)):
        raise program.Preempted(said=code == program.PREEMPTED)
    if code:
        errors_class = errors.UsageError if code == program.WRONG_USAGE else errors.InputError
        raise errors_class(
            f'{command[2]} failed with exit code {code}; mend what it says above and run the same '
            'command again: what is done is kept'
        )


def _report(args: cli.Args, workdir: pathlib.Path, flags: list[str]) -> None:
    config = args.config
    label = next(label for label, folder in config.data.eval_sets.items() if folder)
    eval_name = f'eval/{label}/bits_per_byte'
    plots.loss_curve(workdir, eval_name, workdir / _PICTURES[0])
    found = results.read(workdir)
    evaluation = documents.read(workdir / _EVALUATION, dict, _AGAIN, ('sets',))
    evaluation = evaluation['sets'][label]
    python = os.path.relpath(sys.executable)
    generate, evaluate = (
        shlex.join([python, '-m', f'gptjax.{name}', *cli.for_program(flags, name)])
        for name in ('generate', 'evaluate')
    )
    text = f"""# What the quickstart made

A GPT of {found['parameters']:,} parameters, trained on {found['tokens']:,} tokens in
{found['train_secs']:,.0f} s of training.

| held-out measure | value |
|---|---|
| nats per token | {evaluation['nats_per_token']:.4f} |
| bits per byte | {evaluation['bits_per_byte']:.4f} |
| word perplexity | {evaluation['word_perplexity']:,.1f} |

Scored: {evaluation['tokens']:,} tokens, {evaluation['bytes']:,} bytes. {evaluation['protocol']}.

![loss](loss.png)

{_comparison(workdir, eval_name)}
## Samples

{_samples(workdir)}

## Files

| file | what it holds |
|---|---|
| `{config.corpus.dir}/` | the documents, one JSON line each, and their manifest |
| `{config.tokenizer.dir}/` | the tokenizer |
| `{config.tokens.dir}/` | token shards, training and held-out, and their manifest |
| `config.json` | the complete config of the run |
| `checkpoints/` | weights, optimiser state and data position |
| `metrics.jsonl` | every logged step, a JSON line each |
| `tensorboard/` | the same for TensorBoard (`pip install tensorboard`) |
| `results.json` | what training ended with |
| `evaluation.json` | the held-out measures above, with their protocol |
| `{_SAMPLES}` | the samples above |
| `loss.png` | the picture above |
| `ngram/`, `lstm/` | the baselines, each a run like this one |

## To go on

    {generate} --prompt="Your own words"
    {evaluate} --config.evaluate.stride=64
    tensorboard --logdir={workdir / 'tensorboard'}
"""
    files.replace(workdir / REPORT, text)


def _comparison(workdir: pathlib.Path, eval_name: str) -> str:
    """One table and one picture of the GPT and its baselines; empty where it has none."""
    folders = {
        name: workdir / name for name in _BASELINES if (workdir / name / results.NAME).exists()
    }
    if not folders:
        return ''
    folders['GPT'] = workdir
    rows, runs = [], {}
    for name, folder in folders.items():
        found = results.read(folder)
        speed = found['tokens'] / found['train_secs']
        rows.append(
            f'| {_LABELS[name]} | {found["parameters"]:,} | {found["tokens"]:,} | '
            f'{found[eval_name]:.4f} | {speed:,.0f} |'
        )
        runs[_LABELS[name]] = plots.Run(folder, found[eval_name], speed)
    plots.comparison(runs, eval_name, workdir / _PICTURES[1])
    table = '\n'.join(rows)
    return f"""## Beside its baselines

The same tokenizer, training tokens and held-out windows. The n-gram model reads every training
token once, which is all that counting can use; the others read them in the same order, and as often
as each other.

| model | parameters | tokens read in training | held-out bits per byte | training tokens/s |
|---|---|---|---|---|
{table}

![comparison](comparison.png)
"""


def _samples(workdir: pathlib.Path) -> str:
    shown = []
    for name, folder in {'GPT': workdir, **{name: workdir / name for name in _BASELINES}}.items():
        path = folder / _SAMPLES
        if not path.exists():
            continue
        samples = documents.read_lines(path, ('prompt', 'text')).rows
        quoted = (f'> **{s["prompt"]}**{_quoted(s["text"])}' for s in samples)
        shown.append(f'### {_LABELS[name]}\n\n' + '\n\n'.join(quoted))
    return '\n\n'.join(shown)


def _quoted(text: str) -> str:
    return text.replace('\n', '\n> ')


if __name__ == '__main__':
    program.run(main, __doc__, READS, default_config=CONFIG, uses_jax=False)
