# SPDX-License-Identifier: Apache-2.0
"""A training process is killed again and again, inside saves too; the end is bit-equal."""

import json
import pathlib
import random
import resource
import subprocess
import sys

import pytest

from gptjax.runtime import checkpoint, metrics
from tests import helpers

# Kills its own process just before the n-th change to the checkpoints' folder (a file opened for
# writing, a rename, a folder made, something removed), or when a given step ends.
_VICTIM = """
import json, os, signal, sys
kind, number, report = sys.argv.pop(1), int(sys.argv.pop(1)), sys.argv.pop(1)
seen = 0

def die(what):
    with open(report, 'a') as f:
        f.write(json.dumps([kind, number, what]) + chr(10))
    os.kill(os.getpid(), signal.SIGKILL)

def hook(event, args):
    global seen
    if event == 'open':
        writes = isinstance(args[1], str) and set(args[1]) & set('wax+') or (args[2] or 0) & 3
        if not writes:
            return
    elif event not in ('os.rename', 'os.mkdir', 'os.remove', 'os.rmdir', 'shutil.rmtree'):
        return
    path = os.fspath(args[0]) if isinstance(args[0], (str, bytes, os.PathLike)) else ''
    if event in ('os.remove', 'os.rmdir') and args[1] >= 0:  # of rmtree: in a folder that is open
        path = os.readlink(f'/proc/self/fd/{args[1]}') + '/' + str(path)
    if '/checkpoints/' in str(path):
        seen += 1
        if kind == 'save' and seen == number:
            die(f'{event} {str(path).split("/checkpoints/")[1]}')

sys.addaudithook(hook)
from gptjax import train
from gptjax.runtime import metrics, program

if kind == 'step':
    write = metrics.Writer.write
    def dying(self, step, *rest):
        write(self, step, *rest)
        if step >= number:
            die(f'after step {step}')
    metrics.Writer.write = dying
if kind == 'count':
    import atexit
    from gptjax.runtime import signals
    signals.install()  # which ends the process behind what is registered later
    atexit.register(lambda: open(report, 'a').write(json.dumps(['count', seen, '']) + chr(10)))
program.run(train.main, '', train.READS)
"""
FLAGS = (
    '--config.train.total_tokens=15360',
    '--config.model.residual_dropout=0.1',
    '--config.checkpoint.every_steps=3',
    '--config.optim.ema_decay=0.9',
    '--config.train.log_every_steps=1',
)
STEPS = 30


def start(config, workdir, kind, number, report, *flags) -> int:
    command = [sys.executable, '-c', _VICTIM, kind, str(number), str(report)]
    command += [f'--config={config}', f'--workdir={workdir}', *FLAGS, *flags]
    ended = subprocess.run(command, capture_output=True, text=True)
    helpers.check_no_fault(ended.stderr)
    return ended.returncode


def state_of(workdir: pathlib.Path) -> dict[str, str]:
    """The bytes of the newest checkpoint's arrays, by hash."""
    folder, meta = checkpoint.latest(workdir)
    assert meta['step'] == STEPS
    manifest = json.loads((folder / 'manifest.json').read_text())
    # orbax's own metadata holds times of day
    return {n: h for n, h in manifest.items() if '/d/' in n or n.split('/')[-1][0].isdigit()}


@pytest.fixture(scope='module')
def ready(tmp_path_factory, corpus_file):
    config, folder = helpers.prepared(tmp_path_factory.mktemp('ready'), corpus_file)
    report = folder / 'count'
    whole = helpers.fresh(folder / 'whole', folder)
    assert start(config, whole, 'count', 0, report) == 0
    changes = json.loads(report.read_text())[1]
    return config, folder, whole, changes


def kill_again_and_again(ready, tmp_path, kills: int, in_saves: int) -> None:
    config, folder, whole, changes = ready
    workdir, report = helpers.fresh(tmp_path / 'run', folder), tmp_path / 'report'
    rng = random.Random(0)
    # A save changes the folder some 25 times: at least its points are all reached in turn.
    per_save = changes // (STEPS // 3)
    assert per_save >= 10
    points = [('save', 1 + (i * per_save) // in_saves + rng.randrange(3)) for i in range(in_saves)]
    points += [('step', 1 + i * STEPS // (kills - in_saves)) for i in range(kills - in_saves)]
    points.sort(key=lambda point: (point[0] == 'step') * point[1])
    codes = [start(config, workdir, *point, report) for point in points]
    codes.append(start(config, workdir, 'none', 0, report))
    while codes[-1] == -9:
        codes.append(start(config, workdir, 'none', 0, report))
    died = [json.loads(line) for line in report.read_text().splitlines()]
    print(*died, sep='\n')
    assert codes[-1] == 0
    assert codes.count(-9) == len(died) == kills
    assert sum(kind == 'save' for kind, _, _ in died) >= in_saves
    assert state_of(workdir) == state_of(whole)
    rows = [metrics.read(w) for w in (workdir, whole)]
    losses = [[(row['step'], row['train/loss']) for row in r] for r in rows]
    assert losses[0] == losses[1]
    assert [step for step, _ in losses[0]] == list(range(1, STEPS + 1))  # none twice


def test_killed_three_times(ready, tmp_path):
    kill_again_and_again(ready, tmp_path, 3, 2)


@pytest.mark.slow
def test_killed_twenty_five_times(ready, tmp_path):
    kill_again_and_again(ready, tmp_path, 25, 15)


@pytest.mark.slow  # it waits, and tries again
def test_a_save_that_fails_is_one_line(ready, tmp_path):
    """Whatever orbax's threads raise beside: what is whole is said, and no traceback shown."""
    config, folder, _, _ = ready
    workdir = helpers.fresh(tmp_path / 'run', folder)

    def small_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))

    flags = (f'--config={config}', f'--workdir={workdir}', *FLAGS)
    found = helpers.run_program('train', *flags, preexec_fn=small_disk)
    assert found.returncode == 1
    helpers.check_no_fault(found.stderr)
    said = [line for line in found.stderr.splitlines() if line.startswith('error: ')]
    assert len(said) == 1
    assert f'could not save step {STEPS} to {workdir}/checkpoints, none is kept' in said[0]
    assert not checkpoint.latest(workdir)
    assert helpers.run_program('train', *flags).returncode == 0
