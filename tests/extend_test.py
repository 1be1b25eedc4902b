# SPDX-License-Identifier: Apache-2.0
"""docs/extend.md: every listing made in a copy of the package, trained with, generated from."""

import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from tests import conftest, helpers

DOC = (conftest.ROOT / 'docs' / 'extend.md').read_text(encoding='utf-8')
BLOCK = re.compile(r'```(\w*)\n(.*?)```', re.DOTALL)
SHARED = (
    '--config=experiments/quickstart.py',
    '--config.tokenizer.dir=../quickstart/tokenizer',
    "--config.data.sets=('../quickstart/tokens',)",
    '--config.data.eval_sets.tokens=../quickstart/tokens',
)
SMALL = """config.evaluate.batch_windows = 8
        config.model.update(n_ctx=96, n_layers=1)
        config.batch.batch_tokens = 4 * 96
        config.train.update(total_tokens=3 * 4 * 96, eval_every_steps=0)
        config.optim.warmup_tokens = 96
        config.checkpoint.every_steps = 0"""
# A compiler that does not try hard.
XLA_FLAGS = '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'
# Runs programs one after another in one process: importing JAX takes longer than the rest.
RUNNER = """
import importlib, json, runpy, subprocess, sys, time, traceback
from gptjax.configs import base, cli, errors
from gptjax.runtime import program as runtime

runtime.set_up_logging()
said, began = {}, time.monotonic()
for command in json.load(open(sys.argv[1])):
    try:
        if command[2:3] == ['gptjax.scale']:
            subprocess.run([sys.executable, *command[1:]], check=True)
        elif command[:2] == ['python', '-m']:
            program = importlib.import_module(command[2])
            define = getattr(program, 'define', lambda values: None)
            args = cli.parse(command[2:], define, base.__file__, program.READS)
            program.main(args)
        else:
            sys.argv = command[1:]
            runpy.run_path(command[1], run_name='__main__')
        said[' '.join(command)] = 'done'
    except errors.InputError as e:
        said[' '.join(command)] = str(e)
    except Exception:
        said[' '.join(command)] = traceback.format_exc()
    print(f'{time.monotonic() - began:.1f}', *command, flush=True)
json.dump(said, open('said.json', 'w'))
"""


def listings(text: str) -> list[tuple[str, str, str, bool]]:
    """(file, python or diff, code, whether it goes to the file's end), as the text names them."""
    found, name, at = [], '', 0
    for block in BLOCK.finditer(text):
        before, at = text[at : block.start()], block.end()
        if block[1] in ('python', 'diff'):
            name = (re.findall(r'`([\w/]+\.py)`', before) or [name])[-1]
            found.append((name, block[1], block[2], 'At the end of' in before))
    return found


def apply(path: pathlib.Path, kind: str, code: str, at_end: bool) -> None:
    """Makes a listing's change: a new file, lines at the end, or a diff."""
    if kind == 'diff':
        lines = code.splitlines()
        old = [line[1:] for line in lines if line[:1] in (' ', '-')]
        new = [line[1:] for line in lines if line[:1] in (' ', '+')]
        text = path.read_text()
        joined = '\n'.join(old) + '\n'
        assert text.count(joined) == 1, f'{path} does not hold, once:\n{joined}'
        path.write_text(text.replace(joined, '\n'.join(new) + '\n'))
    elif at_end:
        path.write_text(path.read_text() + '\n\n' + code)
    else:
        assert not path.exists(), path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)


def commands(text: str) -> list[list[str]]:
    found = []
    for block in re.findall(r'```sh\n(.*?)```', text, re.DOTALL):
        for line in block.strip().splitlines():
            parts = shlex.split(line.partition('  #')[0])
            at = parts.index('$SHARED') if '$SHARED' in parts else None
            if at is not None:
                parts[at : at + 1] = SHARED
            found.append(parts)
    return found


@pytest.fixture(scope='module')
def lab(tmp_path_factory, corpus_file):
    """A folder with a copy of the package, a tiny quickstart, and its tokens."""
    folder = tmp_path_factory.mktemp('lab')
    ignored = shutil.ignore_patterns('__pycache__')
    shutil.copytree(conftest.ROOT / 'gptjax', folder / 'gptjax', ignore=ignored)
    (folder / 'experiments').mkdir()
    (folder / 'experiments' / '__init__.py').touch()
    config = folder / 'experiments' / 'quickstart.py'
    text = pathlib.Path(helpers.tiny_config(folder, corpus_file)).read_text()
    config.write_text(text.replace('config.evaluate.batch_windows = 8', SMALL))
    config = str(config)
    helpers.prepare(config, folder / 'runs' / 'quickstart')
    return folder


def run(lab, todo: list[list[str]]) -> dict[str, str]:
    (lab / 'runner.py').write_text(RUNNER)
    (lab / 'todo.json').write_text(json.dumps(todo))
    environment = os.environ | {'PYTHONPATH': str(lab), 'XLA_FLAGS': XLA_FLAGS}
    done = subprocess.run(
        [sys.executable, 'runner.py', 'todo.json'],
        cwd=lab,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((lab / 'said.json').read_text())


@pytest.mark.slow
def test_every_listing_works_as_it_stands(lab):
    """Over 20 s: sixteen models are trained and generated from."""
    *parts, last = DOC.split('\n## ')[1:]
    todo = []
    for part in parts:
        for name, *change in listings(part):
            apply(lab / name, *change)
        todo += commands(part)
    assert len(todo) >= 25
    said = run(lab, todo)
    assert {command: what for command, what in said.items() if what != 'done'} == {}

    def rows(name):
        lines = (lab / 'runs' / name / 'metrics.jsonl').read_text().splitlines()
        return [json.loads(line) for line in lines]

    assert rows('mixture')[-1]['train/balance'] > 0
    assert 0.25 <= rows('mixture')[-1]['train/busiest_expert'] <= 1
    assert rows('smoothed')[-1]['train/loss'] > rows('smoothed')[-1]['train/nats']
    assert 'eval/tokens/calibration_error' in rows('calibration')[-1]
    assert 'eval/tokens/entropy' in rows('calibration')[-1]
    last_row = rows('two_sets')[-1]
    assert last_row['eval/again/bits_per_byte'] == last_row['eval/tokens/bits_per_byte']
    swept = (lab / 'runs' / 'rates' / 'table.csv').read_text()
    assert all(f'peak_lr={rate},done,True' in swept for rate in (0.001, 0.003))
    table = (lab / 'runs' / 'qk_norm' / 'parameters.txt').read_text()
    assert 'network/block_0/attention/query_norm/scale' in table
    losses = {name: rows(name)[-1]['train/loss'] for name in ('muon', 'exponential', 'l1', 'sinks')}
    assert len(set(losses.values())) == 4
    # The last one is a mistake, in the line that says so.
    for name, *change in listings(last):
        apply(lab / name, *change)
    (what,) = run(lab, commands(last)).values()
    assert f'# error: {what}' in last
