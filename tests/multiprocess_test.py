# SPDX-License-Identifier: Apache-2.0
"""Real runs of several processes equal the run of one; one of them killed, the run goes on."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import types

import pytest

from gptjax.runtime import metrics
from tests import helpers, pods

pytestmark = pytest.mark.slow
DEVICES = 4


def start(
    config, workdir, processes: int, *flags, differing=types.MappingProxyType({})
) -> list[subprocess.Popen]:
    port = pods.free_port()
    command = [sys.executable, '-m', 'gptjax.train', f'--config={config}', f'--workdir={workdir}']
    command += ['--config.mesh.data=2', '--config.mesh.fsdp=2', *flags]
    command += [f'--coordinator=localhost:{port}', f'--processes={processes}']
    devices = f'--xla_force_host_platform_device_count={DEVICES // processes}'
    return [
        subprocess.Popen(
            [*command, f'--process={index}', *differing.get(index, ())],
            env=os.environ | {'XLA_FLAGS': devices},
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(processes)
    ]


def finish(running: list[subprocess.Popen]) -> None:
    for process in running:
        _, said = process.communicate()
        assert process.returncode == 0, said


def found(workdir: pathlib.Path) -> list[float]:
    """Losses of every step, and the held-out score."""
    rows = metrics.read(workdir)
    assert [row['step'] for row in rows] == list(range(1, len(rows) + 1))  # written by one process
    results = json.loads((workdir / 'results.json').read_text())
    assert len(rows) == results['steps']
    return [*(row['train/loss'] for row in rows), results['eval/tokens/nats_per_token']]


@pytest.fixture(scope='module')
def config(tmp_path_factory, corpus_file):
    return helpers.tiny_config(tmp_path_factory.mktemp('config'), corpus_file)


@pytest.fixture(scope='module')
def alone(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('alone')
    helpers.prepare(config, workdir)
    finish(start(config, workdir, 1))
    return found(workdir)


@pytest.mark.parametrize('processes', [2, 4])
def test_several_processes_equal_one(config, tmp_path, alone, processes):
    helpers.prepare(config, tmp_path)
    finish(start(config, tmp_path, processes))
    assert found(tmp_path) == pytest.approx(alone, rel=1e-5)


def test_one_of_two_killed(config, tmp_path, alone):
    """The other one does not wait for ever, and the run, begun again, agrees."""
    helpers.prepare(config, tmp_path)
    often = ('--config.checkpoint.every_steps=2',)
    running = start(config, tmp_path, 2, *often)
    while running[1].poll() is None:
        if list(tmp_path.glob('checkpoints/*/manifest.json')):
            break
        time.sleep(0.02)
    running[1].send_signal(signal.SIGKILL)
    for process in running:
        process.communicate()
    assert running[1].returncode == -signal.SIGKILL
    assert running[0].returncode != 0
    finish(start(config, tmp_path, 2, *often))
    assert found(tmp_path) == pytest.approx(alone, rel=1e-5)


def test_restored_by_another_number_of_processes(config, tmp_path, alone):
    helpers.prepare(config, tmp_path)
    finish(start(config, tmp_path, 4, '--config.checkpoint.every_steps=2'))
    newest = max(tmp_path.glob('checkpoints/*/manifest.json'))
    newest.unlink()  # as if killed in the last save
    (tmp_path / 'results.json').unlink()
    finish(start(config, tmp_path, 2, '--config.checkpoint.every_steps=2'))
    assert found(tmp_path) == pytest.approx(alone, rel=1e-5)


def test_a_host_that_runs_something_else_is_named(config, tmp_path):
    helpers.prepare(config, tmp_path)
    said = []
    running = start(config, tmp_path, 2, differing={1: ['--config.seed=2']})
    for process in running:
        said.append(process.communicate()[1])
        assert process.returncode == 1, said
    assert all('error: host 1 has config.seed = 2' in each for each in said)
