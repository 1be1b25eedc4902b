# SPDX-License-Identifier: Apache-2.0
"""Any program, stopped at any moment, saves, says so in a line, exits with 75, and then goes on.

Moments are counted from when a program listens to signals, some 100 ms after Python begins.
"""

import hashlib
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from gptjax.models import pretrained
from gptjax.runtime import checkpoint, metrics, signals
from gptjax.storage import documents
from gptjax.text import tokenizer as tokenizer_lib
from tests import helpers

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
STEPS = 12
TRAIN = (
    f'--config.train.total_tokens={STEPS * 512}',
    '--config.train.log_every_steps=5',
    '--config.train.eval_every_steps=4',
    '--config.train.layer_norms=True',
    '--config.model.residual_dropout=0.1',
    '--config.checkpoint.every_steps=5',
)
PROMPTS = [f'--prompt=the {word}' for word in ('cat', 'dog', 'house', 'mat')]


class Moment(NamedTuple):
    """When a signal is sent, as a share of what the program takes; gap: secs to another one."""

    share: float
    number: int
    group: bool
    gap: float | None

    @classmethod
    def drawn(cls, seed: str) -> 'Moment':
        rng = random.Random(seed)
        gap = rng.choice((None, None, 0.0, 0.1, 1.2))
        return cls(rng.random(), rng.choice(SIGNALS), rng.random() < 0.5, gap)


class Case(NamedTuple):
    """A program: its flags; what lies ready in its workdir; what it leaves there."""

    name: str
    flags: Callable[[pathlib.Path], list[str]]
    needs: tuple[str, ...]
    left: Callable[[pathlib.Path], Any]


def _bytes(*folders: str) -> Callable[[pathlib.Path], dict[str, str]]:
    """The hashes of all files below folders of a workdir."""

    def left(workdir: pathlib.Path) -> dict[str, str]:
        paths = [p for folder in folders for p in (workdir / folder).rglob('*') if p.is_file()]
        paths = [p for p in paths if p.name != '.lock']
        return {
            str(p.relative_to(workdir)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths
        }

    return left


def _trained(workdir: pathlib.Path) -> Any:
    """The arrays of the newest checkpoint and every row of metrics, without what takes time."""
    folder, meta = checkpoint.latest(workdir)
    manifest = json.loads((folder / 'manifest.json').read_text())
    arrays = {n: h for n, h in manifest.items() if n.split('/')[-1][0].isdigit()}
    assert arrays
    rows = [
        {name: value for name, value in row.items() if not name.startswith('perf/')}
        for row in metrics.read(workdir)
    ]
    return meta['step'], meta['since_row'], arrays, rows


def _samples(workdir: pathlib.Path) -> list[str]:
    return (workdir / 'samples.jsonl').read_text(encoding='utf-8').splitlines()


CASES = {
    'train': Case('train', lambda folder: list(TRAIN), ('tokens', 'tokenizer'), _trained),
    'prepare_corpus': Case(
        'prepare_corpus', lambda folder: ['--config.corpus.shard_bytes=20000'], (), _bytes('corpus')
    ),
    'train_tokenizer': Case(
        'train_tokenizer',
        lambda folder: ['--config.tokenizer.kind=bpe', '--config.tokenizer.n_vocab=300'],
        ('corpus',),
        _bytes('tokenizer'),
    ),
    'forgetting': Case(
        'forgetting',
        lambda folder: [
            f'--run=GPT={folder}/weights',
            '--windows=16',
            '--config.evaluate.max_tokens=0',
        ],
        ('tokens',),
        lambda workdir: documents.read(workdir / 'forgetting.json', dict, ''),
    ),
    'prepare_tokens': Case(
        'prepare_tokens',
        lambda folder: ['--config.tokens.processes=2'],
        ('corpus', 'tokenizer'),
        _bytes('tokens'),
    ),
    'generate': Case(
        'generate', lambda folder: [f'--config.init_from={folder}/weights', *PROMPTS], (), _samples
    ),
    'evaluate': Case(
        'evaluate',
        lambda folder: [f'--config.init_from={folder}/weights'],
        ('tokens',),
        lambda workdir: helpers.evaluation_of(workdir),
    ),
    'convert': Case(
        'convert',
        lambda folder: [f'--config.init_from={folder}/weights', '--to=huggingface'],
        (),
        _bytes('.'),
    ),
    'count_ngrams': Case(
        'count_ngrams',
        lambda folder: ['--config.ngram.memory_tokens=500', '--arpa'],
        ('tokens', 'tokenizer'),
        _bytes('model.arpa'),
    ),
    'quickstart': Case(
        'quickstart', lambda folder: list(TRAIN), (), lambda workdir: _trained(workdir)[2]
    ),
}


class Ready:
    """What the programs read, and what they leave where nothing stops them, with the time taken."""

    def __init__(self, folder: pathlib.Path, corpus: pathlib.Path) -> None:
        self.folder = folder
        self.config = helpers.tiny_config(folder, corpus)
        helpers.prepare(self.config, folder, '--config.corpus.shard_bytes=6000')
        model = helpers.tiny_model(n_vocab=257, n_ctx=64)
        tokenizer = tokenizer_lib.Bytes()
        pretrained.save_workdir(folder / 'weights', model, helpers.params_of(model), tokenizer)
        self._whole: dict[str, tuple[float, Any]] = {}
        self._workdirs = 0

    def workdir(self, case: Case) -> pathlib.Path:
        """A new one."""
        self._workdirs += 1
        path = self.folder / f'run-{self._workdirs}'
        path.mkdir()
        for name in case.needs:
            (path / name).symlink_to(self.folder / name)
        return path

    def start(self, case: Case, workdir: pathlib.Path, cache: str = '') -> subprocess.Popen:
        """Starts a program; cache: a folder of its own for what is compiled, else the usual one."""
        config = self.config
        if case.name == 'count_ngrams':
            config += ':model=ngram'
        given = [] if case.name == 'convert' else [f'--config={config}']
        flags = [*given, f'--workdir={workdir}', *case.flags(self.folder)]
        env = os.environ | {'XLA_FLAGS': ''}
        if cache:
            env['XDG_CACHE_HOME'] = str(self.folder / cache)
        return subprocess.Popen(
            [sys.executable, '-m', f'gptjax.{case.name}', *flags],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
            start_new_session=True,
        )

    def end(self, case: Case, workdir: pathlib.Path) -> Any:
        """Runs to the end: what is left then."""
        process = self.start(case, workdir)
        said = process.communicate()[1]
        assert process.returncode == 0, said
        helpers.check_no_fault(said)
        return case.left(workdir)

    def whole(self, case: Case) -> tuple[float, Any]:
        """The seconds that a program takes to its end, and what it leaves."""
        if case.name not in self._whole:
            began = time.monotonic()
            left = self.end(case, self.workdir(case))
            self._whole[case.name] = time.monotonic() - began, left
        return self._whole[case.name]


@pytest.fixture(autouse=True, scope='module')
def _signals():
    with helpers.signals_heeded():
        yield


@pytest.fixture(scope='module')
def ready(tmp_path_factory, corpus_file):
    return Ready(tmp_path_factory.mktemp('ready'), corpus_file)


def listens(process: subprocess.Popen) -> None:
    """Returns when a process has a handler for SIGTERM, or has ended."""
    while process.poll() is None and not is_listening(process):
        time.sleep(0.005)


def is_listening(process: subprocess.Popen) -> bool:
    """Whether a process has a handler for SIGTERM, and has not begun to leave."""
    proc = pathlib.Path(f'/proc/{process.pid}')
    flags = int(proc.joinpath('stat').read_text().rpartition(')')[2].split()[6])
    lines = proc.joinpath('status').read_text().splitlines()
    caught = sum(int(line.split()[1], 16) for line in lines if line.startswith('SigCgt'))
    return bool(caught >> (signal.SIGTERM - 1) & 1) and not flags & 4  # PF_EXITING of sched.h


def send(process: subprocess.Popen, moment: Moment) -> bool:
    """Sends a signal to what is still there; whether it was."""
    if process.poll() is not None:
        return False
    running = is_listening(process)
    (os.killpg if moment.group else os.kill)(process.pid, moment.number)
    return running


def stopped(process: subprocess.Popen, moment: Moment, secs: float) -> int:
    """Stops a process `secs` after it listens; its exit code."""
    listens(process)
    time.sleep(secs)
    running = send(process, moment)
    if moment.gap is not None:
        time.sleep(moment.gap)
        send(process, moment)
    said = process.communicate()[1]
    print(f'{secs:.2f} s', moment, process.returncode, said[-300:], sep='\n')
    assert process.returncode == (signals.STOPPED if running else 0)
    helpers.check_no_fault(said)
    if process.returncode:
        assert said.count('run the same command again') == 1
    return process.returncode


def stop_and_go_on(ready: Ready, case: Case, moment: Moment) -> int:
    secs, left = ready.whole(case)
    workdir = ready.workdir(case)
    code = stopped(ready.start(case, workdir), moment, moment.share * secs)
    if not code:  # it was done
        assert case.left(workdir) == left
    assert ready.end(case, workdir) == left
    return code


SAMPLE = [
    ('train', Moment(0.0, signal.SIGTERM, False, None)),
    ('train', Moment(0.8, signal.SIGINT, True, 0.0)),
    ('prepare_tokens', Moment(0.5, signal.SIGINT, True, 0.1)),
    ('prepare_tokens', Moment(0.8, signal.SIGTERM, False, None)),
    ('prepare_corpus', Moment(0.6, signal.SIGHUP, False, None)),
    ('generate', Moment(0.6, signal.SIGTERM, True, None)),
    ('evaluate', Moment(0.7, signal.SIGINT, False, 0.0)),
    ('convert', Moment(0.8, signal.SIGTERM, False, None)),
    ('train_tokenizer', Moment(0.7, signal.SIGTERM, True, None)),
    ('forgetting', Moment(0.6, signal.SIGINT, False, 0.1)),
]


@pytest.mark.parametrize(('name', 'moment'), SAMPLE)
def test_stopped_and_run_again(ready, name, moment):
    stop_and_go_on(ready, CASES[name], moment)


@pytest.mark.slow
@pytest.mark.parametrize('number', range(4))
@pytest.mark.parametrize('name', [name for name in CASES if name != 'quickstart'])
def test_stopped_at_any_moment(ready, name, number):
    stop_and_go_on(ready, CASES[name], Moment.drawn(f'{name} {number}'))


@pytest.mark.slow
def test_training_is_stopped_while_it_compiles(ready):
    """Twenty times, before its first step: nothing is to be saved."""
    case = CASES['train']
    workdir = ready.workdir(case)
    process = ready.start(case, workdir, 'cold')
    listens(process)
    began = time.monotonic()
    while 'first step done' not in (line := process.stderr.readline()):
        assert line
    secs = time.monotonic() - began
    process.kill()
    process.communicate()
    for number in range(20):
        moment = Moment.drawn(f'compile {number}')
        process = ready.start(case, ready.workdir(case), f'cold-{number}')
        assert stopped(process, moment, (number + moment.share) / 20 * secs) == signals.STOPPED


@pytest.mark.slow
def test_quickstart_is_stopped_again_and_again(ready):
    """In one workdir: nothing that was done is done again, and the end is the same."""
    case = CASES['quickstart']
    secs, left = ready.whole(case)
    workdir = ready.workdir(case)
    for number in range(8):
        moment = Moment.drawn(f'quickstart {number}')
        stopped(ready.start(case, workdir), moment, moment.share * secs / 6)
    assert ready.end(case, workdir) == left


def test_a_worker_that_is_killed_is_named(ready):
    case = CASES['prepare_tokens']
    workdir = ready.workdir(case)
    process = ready.start(case, workdir)
    children = pathlib.Path(f'/proc/{process.pid}/task/{process.pid}/children')
    killed = False
    while not killed and process.poll() is None:
        for child in children.read_text().split():
            command = pathlib.Path(f'/proc/{child}/cmdline').read_bytes()
            if b'spawn_main' in command:
                os.kill(int(child), signal.SIGKILL)
                killed = True
    said = process.communicate()[1]
    assert process.returncode == 1
    assert 'error: a process at work was killed' in said.splitlines()[-1]
    helpers.check_no_fault(said)
    assert ready.end(case, workdir) == ready.whole(case)[1]


def test_a_closed_log_has_training_save(ready):
    """As under 2>&1 | head: what was trained is kept."""
    case = CASES['train']
    workdir = ready.workdir(case)
    process = ready.start(case, workdir)
    while 'first step done' not in (line := process.stderr.readline()):
        assert line
    process.stderr.close()
    assert process.wait() in (signals.STOPPED, 0)
    assert checkpoint.latest(workdir)[1]['step'] > 0
    assert ready.end(case, workdir) == ready.whole(case)[1]
