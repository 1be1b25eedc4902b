# SPDX-License-Identifier: Apache-2.0
"""A SIGTERM to any host of several has all of them save and end with 75, whatever they are at."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from gptjax.runtime import checkpoint
from tests import at_moment, helpers, multiprocess_test, pods

pytestmark = pytest.mark.slow  # each is two processes that compile, twice
FLAGS = (
    f'--config.train.total_tokens={at_moment.STEPS * 512}',
    f'--config.train.eval_every_steps={at_moment.STEP}',
    '--config.checkpoint.every_steps=3',
    '--config.train.log_every_steps=1',
)
MOMENTS = ('beginning', 'compiling', 'between', 'fetching', 'saving', 'evaluating')


@pytest.fixture(scope='module')
def ready(tmp_path_factory, corpus_file):
    return helpers.prepared(tmp_path_factory.mktemp('ready'), corpus_file)


@pytest.fixture(scope='module')
def alone(ready, tmp_path_factory):
    workdir = fresh(ready, tmp_path_factory.mktemp('alone') / 'run')
    ended(start(ready, workdir, 'never', -1, 1), 0)
    return multiprocess_test.found(workdir)


def fresh(ready, path: pathlib.Path) -> pathlib.Path:
    return helpers.fresh(path, ready[1])


def start(ready, workdir, moment: str, host: int, processes: int, *flags) -> list:
    port, config = pods.free_port(), ready[0]
    command = [sys.executable, '-m', 'tests.at_moment', moment, str(host), 'train']
    command += [f'--config={config}', f'--workdir={workdir}', '--config.mesh.data=2', *FLAGS]
    command += [f'--coordinator=localhost:{port}', f'--processes={processes}', *flags]
    devices = f'--xla_force_host_platform_device_count={2 // processes}'
    return [
        subprocess.Popen(
            [*command, f'--process={index}'],
            env=os.environ | {'XLA_FLAGS': devices},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(processes)
    ]


def ended(running: list, code: int) -> list[tuple[str, str]]:
    said = pods.communicated(running)
    assert [process.returncode for process in running] == [code] * len(running), said
    for _, errors in said:
        helpers.check_no_fault(errors)
    return said


@pytest.mark.parametrize(('host', 'processes'), [(0, 1), (0, 2), (1, 2)])
@pytest.mark.parametrize('moment', MOMENTS)
def test_a_signal_to_one_host(ready, alone, tmp_path, moment, host, processes):
    """On a single host, too, that was given --coordinator."""
    workdir = fresh(ready, tmp_path / 'run')
    ended(start(ready, workdir, moment, host, processes), 75)
    found = checkpoint.latest(workdir)
    if moment == 'beginning':
        assert found is None
    elif moment != 'compiling':
        assert at_moment.STEP - 1 <= found[1]['step'] < at_moment.STEPS
    ended(start(ready, workdir, 'never', -1, processes), 0)
    assert multiprocess_test.found(workdir) == pytest.approx(alone, rel=1e-5)


def test_a_signal_after_the_last_step_changes_nothing(ready, alone, tmp_path):
    workdir = fresh(ready, tmp_path / 'run')
    codes = [process.wait() for process in start(ready, workdir, 'last', 0, 2)]
    assert set(codes) <= {0, 75}
    ended(start(ready, workdir, 'never', -1, 2), 0)
    assert multiprocess_test.found(workdir) == pytest.approx(alone, rel=1e-5)


def test_hosts_talk_where_they_save_and_nowhere_else(ready, tmp_path):
    workdir = fresh(ready, tmp_path / 'run')
    for _, said in ended(start(ready, workdir, 'never', -1, 2), 0):
        (line,) = [line for line in said.splitlines() if line.startswith('talk ')]
        talk = dict(json.loads(line.removeprefix('talk ')))
        assert set(talk) == set(range(1, at_moment.STEPS + 1))
        saves = {step for step in talk if step % 3 == 0}
        evaluations = {at_moment.STEP, 2 * at_moment.STEP, at_moment.STEPS}
        quiet = set(talk) - saves - evaluations - {1}
        assert {talk[step] for step in quiet} == {0}
        assert all(talk[step] for step in saves)


def test_the_next_step_is_under_way_before_one_has_ended(ready, tmp_path):
    workdir = fresh(ready, tmp_path / 'run')
    flags = ('--config.train.eval_every_steps=0', '--config.checkpoint.every_steps=0')
    ended(start(ready, workdir, 'overlapping', -1, 2, *flags), 0)
    rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    late = [row['train/late'] for row in rows if 'train/late' in row]
    assert len(late) == at_moment.STEPS
    assert not any(late)
