# SPDX-License-Identifier: Apache-2.0
"""Commands side by side: their order, what is tried again, what waits, and how all are stopped."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from gptjax.configs import errors
from gptjax.runtime import jobs
from tests import conftest, helpers

ROOM = jobs.Room([frozenset(), frozenset()], 1e9)
ONE = jobs.Room([frozenset()], 1e9)


def job(folder, name, code, cost=1.0, after=(), memory=1.0):
    command = [sys.executable, '-c', f'import sys, pathlib, time; {code}']
    return jobs.Job(name, command, cost, memory, frozenset(after), folder / 'logs' / f'{name}.txt')


def noted(folder, name):
    """Code that writes down that it ran."""
    return f'f = open({str(folder / "order")!r}, "a"); f.write({name!r} + "\\n"); f.close()'


def ran(folder):
    path = folder / 'order'
    return path.read_text().split() if path.exists() else []


def run(todo, room=ONE, hopeless=lambda job: False):
    shown = []
    found = jobs.run(todo, room, hopeless, lambda states: shown.append(dict(states)))
    assert shown[-1] == found
    return found


def test_the_cheapest_that_can_begin_is_begun_first(tmp_path):
    todo = [
        job(tmp_path, name, noted(tmp_path, name), cost, after)
        for name, cost, after in (('a', 3, ()), ('b', 1, ('c',)), ('c', 2, ()), ('d', 9, ('b',)))
    ]
    assert run(todo) == dict.fromkeys('abcd', jobs.DONE)
    assert ran(tmp_path) == ['c', 'b', 'a', 'd']


def test_what_fails_is_tried_once_more_and_then_named(tmp_path, caplog):
    flag = tmp_path / 'flag'
    once = (
        f'p = pathlib.Path({str(flag)!r}); there = p.exists(); p.touch(); print("broken"); '
        'sys.exit(0 if there else 1)'
    )
    todo = [
        job(tmp_path, 'once', once),
        job(tmp_path, 'twice', f'{noted(tmp_path, "twice")}; print("for good"); sys.exit(3)'),
        job(tmp_path, 'usage', f'{noted(tmp_path, "usage")}; sys.exit(2)'),
        job(tmp_path, 'hopeless', f'{noted(tmp_path, "hopeless")}; sys.exit(1)'),
        job(tmp_path, 'behind', noted(tmp_path, 'behind'), after=('twice',)),
        job(tmp_path, 'last', noted(tmp_path, 'last'), after=('behind',)),
    ]
    found = run(todo, hopeless=lambda job: job.name == 'hopeless')
    assert found == {
        'once': jobs.DONE,
        'twice': jobs.FAILED,
        'usage': jobs.FAILED,
        'hopeless': jobs.FAILED,
        'behind': jobs.BLOCKED,
        'last': jobs.BLOCKED,
    }
    assert sorted(ran(tmp_path)) == ['hopeless', 'twice', 'twice', 'usage']
    assert 'once failed, exit code 1: broken; it is tried once more' in caplog.text
    assert 'twice failed, exit code 3: for good; all it said' in caplog.text


def test_memory_is_shared_and_one_job_runs_in_any_case(tmp_path):
    sleeping = 'time.sleep(0.4)'
    begin = f'f = open({str(tmp_path / "order")!r}, "a"); f.write("+ "); f.close()'
    end = f'f = open({str(tmp_path / "order")!r}, "a"); f.write("- "); f.close()'
    todo = [
        job(tmp_path, str(i), f'{begin}; {sleeping}; {end}', memory=memory)
        for i, memory in enumerate((6e8, 6e8, 5e9))
    ]
    assert set(run(todo, ROOM).values()) == {jobs.DONE}
    assert ran(tmp_path) == ['+', '-'] * 3  # never two at once


def test_cores_are_shared(tmp_path):
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip('one core')
    room = jobs.Room([frozenset({core}) for core in cores[:2]], 1e9)
    code = 'import os; print(sorted(os.sched_getaffinity(0))); time.sleep(0.3)'
    todo = [job(tmp_path, name, code) for name in 'ab']
    run(todo, room)
    assert {jobs.last_line(each.log) for each in todo} == {f'[{core}]' for core in cores[:2]}
    assert os.sched_getaffinity(0) == set(cores)


def test_room_of_this_machine():
    cores = len(os.sched_getaffinity(0))
    assert len(jobs.room(1, 0).slots) in (cores, 1)  # one where there is an accelerator
    assert len(jobs.room(0, 0).slots) == 1
    assert len(jobs.room(1, 1).slots) == 1
    assert jobs.room(1, 0).memory > 0
    with pytest.raises(errors.UsageError, match='this machine has'):
        jobs.room(cores + 1, 0)


CHILD = """
import pathlib, signal, sys, time
path = pathlib.Path(sys.argv[1])
def save(*_):
    path.with_suffix('.saved').touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
path.touch()
time.sleep(60)
"""
ABOVE = """
import pathlib, sys
from gptjax.runtime import jobs, program
folder, child = pathlib.Path(sys.argv[1]), sys.argv[2]
def main(args):
    todo = [jobs.Job(name, [sys.executable, child, str(folder / name)], 1.0, 1.0, frozenset(),
                     folder / f'{name}.log') for name in 'abc']
    room = jobs.Room([frozenset(), frozenset()], 1e9)
    jobs.run(todo, room, lambda job: False, lambda states: None)
sys.argv = [sys.argv[0], f'--workdir={folder}', '--config=experiments/quickstart.py']
program.run(main, '', (), uses_jax=False)
"""


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stop_reaches_all(tmp_path, number):
    """Two run, one waits: both are told, and end; also where the one above them is killed."""
    script, child, folder = (tmp_path / name for name in ('above.py', 'child.py', 'run'))
    script.write_text(ABOVE)
    child.write_text(CHILD)
    folder.mkdir()
    with helpers.signals_heeded():
        above = subprocess.Popen(
            [sys.executable, str(script), str(folder), str(child)],
            cwd=conftest.ROOT,
            text=True,
            stderr=subprocess.PIPE,
            env=os.environ | {'PYTHONPATH': str(conftest.ROOT)},
        )
    _until(lambda: len(_names(folder, '')) == 2)
    above.send_signal(number)
    _, said = above.communicate(timeout=60)
    _until(lambda: len(_names(folder, '.saved')) == 2)
    assert above.returncode == (75 if number != signal.SIGKILL else -9), said
    assert not (folder / 'c').exists()
    helpers.check_no_fault(said)


def _names(folder: pathlib.Path, suffix: str) -> list[str]:
    return [path.name for path in folder.iterdir() if path.suffix == suffix]


def _until(holds) -> None:
    for _ in range(600):
        if holds():
            return
        time.sleep(0.1)
    raise AssertionError('it did not come to that')
