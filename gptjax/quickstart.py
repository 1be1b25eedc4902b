# SPDX-License-Identifier: Apache-2.0
"""From nothing to a GPT that writes: runs the programs one by one, then writes a report.

What is done is not repeated; what was interrupted goes on. Laptop:
  python -m gptjax.quickstart --workdir=runs/quickstart
TPU VM, on one host, with an experiment of your own:
  python -m gptjax.quickstart --workdir=/data/run \
      --config=experiments/shakespeare_char.py:path=input.txt
"""

import ctypes
import json
import logging
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

from gptjax.configs import cli, errors
from gptjax.runtime import plots, program
from gptjax.text import files

CONFIG = 'experiments/quickstart.py'
# Short, so that they fit small contexts too.
_PROMPTS = ('Return a list of', 'The following example', 'This module provides')
REPORT = 'report.md'
# The programs in order, and what each leaves below the workdir when it has run to its end.
_OUTPUTS = {
    'prepare_corpus': 'corpus/manifest.json',
    'train_tokenizer': 'tokenizer/recipe.json',
    'prepare_tokens': 'tokens/manifest.json',
    'train': 'results.json',
    'evaluate': 'evaluation.json',
    'generate': 'samples.jsonl',
}
_log = logging.getLogger('gptjax')


def main(args: cli.Args) -> None:
    """Writes WORKDIR/report.md and everything it names."""
    workdir = pathlib.Path(args.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    flags = cli.with_config(sys.argv, CONFIG)[1:]
    began = time.monotonic()
    stamp = json.dumps([args.config.to_json(), flags, _PROMPTS])
    for number, name in enumerate(_OUTPUTS, 1):
        done = workdir / f'.done-{name}'
        output = workdir / _OUTPUTS[name]
        if output.exists() and done.exists() and done.read_text() == stamp:
            _log.info('%d/%d %s: done already', number, len(_OUTPUTS), name)
            continue
        command = [sys.executable, '-m', f'gptjax.{name}', *flags]
        if name == 'generate':
            command += [f'--prompt={prompt}' for prompt in _PROMPTS]
        _log.info('%d/%d %s', number, len(_OUTPUTS), shlex.join(['python', *command[1:]]))
        _run(command)
        files.replace(done, stamp)
        (workdir / REPORT).unlink(missing_ok=True)
    if not (workdir / REPORT).exists():
        _report(args, workdir, flags)
    _log.info('all done in %.0f s; read %s', time.monotonic() - began, workdir / REPORT)


def _run(command: list[str]) -> None:
    """Runs one program; a signal to us is passed on, and its exit code becomes ours."""
    # A group of its own: Ctrl-C reaches us alone, and is passed on once.
    child = subprocess.Popen(command, preexec_fn=_die_with_parent, process_group=0)
    try:
        code = child.wait()
    except program.Preempted:
        child.send_signal(signal.SIGTERM)
        code = child.wait()
        if code in (0, program.PREEMPTED, -signal.SIGTERM):
            raise
    if code == program.PREEMPTED:
        raise program.Preempted
    if code:
        errors_class = errors.UsageError if code == program.WRONG_USAGE else errors.InputError
        raise errors_class(
            f'{command[2]} failed with exit code {code}; mend what it says above and run the same '
            'command again: what is done is kept'
        )


def _die_with_parent() -> None:
    """On Linux, a killed quickstart leaves no program behind: it is told to stop and save."""
    if sys.platform == 'linux':
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def _report(args: cli.Args, workdir: pathlib.Path, flags: list[str]) -> None:
    config = args.config
    eval_name = f'eval/{pathlib.PurePath(config.data.eval_set).name}/bits_per_byte'
    plots.loss_curve(workdir, eval_name, workdir / 'loss.png')
    results = json.loads((workdir / 'results.json').read_text())
    evaluation = json.loads((workdir / 'evaluation.json').read_text())
    lines = (workdir / 'samples.jsonl').read_text(encoding='utf-8').split('\n')
    samples = [json.loads(line) for line in lines if line]
    shown = '\n\n'.join(f'> **{s["prompt"]}**{_quoted(s["text"])}' for s in samples)
    how, python = shlex.join(flags), os.path.relpath(sys.executable)
    text = f"""# What the quickstart made

A GPT of {results['parameters']:,} parameters, trained on {results['tokens']:,} tokens in
{results['train_secs']:,.0f} s of training.

| held-out measure | value |
|---|---|
| nats per token | {evaluation['nats_per_token']:.4f} |
| bits per byte | {evaluation['bits_per_byte']:.4f} |
| word perplexity | {evaluation['word_perplexity']:,.1f} |

Scored: {evaluation['tokens']:,} tokens, {evaluation['bytes']:,} bytes. {evaluation['protocol']}.

![loss](loss.png)

## Samples

{shown}

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
| `samples.jsonl` | the samples above |
| `loss.png` | the picture above |

## To go on

    {python} -m gptjax.generate {how} --prompt="Your own words"
    {python} -m gptjax.evaluate {how} --config.evaluate.stride=64
    tensorboard --logdir={workdir / 'tensorboard'}
"""
    files.replace(workdir / REPORT, text)


def _quoted(text: str) -> str:
    return text.replace('\n', '\n> ')


if __name__ == '__main__':
    program.run(main, __doc__, default_config=CONFIG, uses_jax=False)
