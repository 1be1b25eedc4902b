# SPDX-License-Identifier: Apache-2.0
"""A real run of two processes equals the run of one."""

import json
import os
import socket
import subprocess
import sys

import pytest

from gptjax.runtime import metrics
from tests import helpers

_WORKER = """
import sys, jax
port, processes, index = (int(sys.argv.pop(1)) for _ in range(3))
initialize = jax.distributed.initialize
jax.distributed.initialize = lambda: initialize(f'localhost:{port}', processes, index)
from gptjax import train
from gptjax.runtime import program
program.run(train.main, '')
"""


def _train(config, workdir, processes: int) -> None:
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    flags = [f'--config={config}', f'--workdir={workdir}', '--distributed']
    flags += ['--config.mesh.data=2', '--config.mesh.fsdp=2']
    devices = f'--xla_force_host_platform_device_count={4 // processes}'
    running = [
        subprocess.Popen(
            [sys.executable, '-c', _WORKER, str(port), str(processes), str(index), *flags],
            env=os.environ | {'XLA_FLAGS': devices},
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(processes)
    ]
    for process in running:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path, corpus_file):
    config = helpers.tiny_config(tmp_path, corpus_file)
    losses = []
    for processes in (1, 2):
        workdir = tmp_path / f'run{processes}'
        helpers.prepare(config, workdir)
        _train(config, workdir, processes)
        rows = metrics.read(workdir)
        assert [row['step'] for row in rows] == list(range(1, 7))  # written by one process only
        losses.append([row['train/loss'] for row in rows])
        results = json.loads((workdir / 'results.json').read_text())
        losses[-1].append(results['eval/tokens/nats_per_token'])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
