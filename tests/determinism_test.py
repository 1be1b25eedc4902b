# SPDX-License-Identifier: Apache-2.0
"""The same seed is bit-equal; killed and resumed is bit-equal; a signal saves and exits with 75."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from gptjax import train
from gptjax.configs import errors
from gptjax.runtime import checkpoint, metrics
from gptjax.training import claim, optim
from tests import helpers


@pytest.fixture(scope='module')
def ready(tmp_path_factory, corpus_file):
    return helpers.prepared(tmp_path_factory.mktemp('ready'), corpus_file)


def fresh(ready, path: pathlib.Path) -> tuple[str, pathlib.Path]:
    """A new workdir over the same tokens."""
    config, folder = ready
    return config, helpers.fresh(path, folder)


FLAGS = (
    '--config.train.total_tokens=10240',
    '--config.batch.ramp_from_tokens=256',
    '--config.batch.ramp_over_tokens=3000',
    '--config.batch.ramp_stages=2',
    '--config.model.residual_dropout=0.1',
    '--config.batch.device_windows=0',
)


def state_of(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """Every array of the newest checkpoint."""
    folder, meta = checkpoint.latest(workdir)
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
        found = reader.restore(
            folder / 'state',
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(), rest=ocp.args.StandardRestore()
            ),
        )
    leaves = jax.tree_util.tree_leaves_with_path(dict(found.items()))
    return {jax.tree_util.keystr(p): np.asarray(x) for p, x in leaves} | {'step': meta['step']}


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def losses(workdir: pathlib.Path) -> dict[int, float]:
    rows = metrics.read(workdir)
    steps = [row['step'] for row in rows]
    assert len(set(steps)) == len(steps)  # no step twice
    return {row['step']: row['train/loss'] for row in rows if 'train/loss' in row}


@pytest.fixture(scope='module')
def whole(ready, tmp_path_factory):
    """An uninterrupted run."""
    config, workdir = fresh(ready, tmp_path_factory.mktemp('whole') / 'run')
    train.main(helpers.args(config, workdir, *FLAGS))
    return workdir


def test_the_same_seed_is_bit_equal(ready, whole, tmp_path):
    config, workdir = fresh(ready, tmp_path / 'run')
    train.main(helpers.args(config, workdir, *FLAGS))
    assert equal(state_of(workdir), state_of(whole))
    assert losses(workdir) == losses(whole)


@pytest.mark.slow
def test_another_seed_is_not(ready, whole, tmp_path):
    config, workdir = fresh(ready, tmp_path / 'run')
    train.main(helpers.args(config, workdir, *FLAGS, '--config.seed=1'))
    assert not equal(state_of(workdir), state_of(whole))


@pytest.mark.slow
def test_a_finished_run_that_is_made_longer_is_bit_equal(ready, tmp_path):
    flags = ('--config.optim.schedule=constant', '--config.train.eval_every_steps=0')
    short, long = (f'--config.train.total_tokens={number}' for number in (4096, 6144))
    config, once = fresh(ready, tmp_path / 'once')
    train.main(helpers.args(config, once, *flags, long))
    config, twice = fresh(ready, tmp_path / 'twice')
    for length in (short, long):
        train.main(helpers.args(config, twice, *flags, length))
        tokens = json.loads((twice / 'results.json').read_text())['tokens']
        assert length.endswith(f'={tokens}')
    assert equal(state_of(twice), state_of(once))
    assert losses(twice) == losses(once)
    with pytest.raises(errors.InputError, match=f'--config.init_from={twice} starts from its wei'):
        train.main(helpers.args(config, twice, *flags, short))  # than what is done
    assert (twice / 'results.json').exists()


@pytest.mark.parametrize(
    ('optim_', 'step', 'longer'),
    [
        ({'schedule': 'constant'}, 100, True),
        ({'schedule': 'constant'}, 201, False),  # more than there will be
        ({'schedule': 'inverse_sqrt', 'warmup_tokens': 640}, 100, True),
        ({'schedule': 'cosine'}, 1, False),
        ({'schedule': 'cosine', 'decay_tokens': 3200}, 100, True),
        ({'schedule': 'wsd', 'cooldown_tokens': 640}, 90, True),
        ({'schedule': 'wsd', 'cooldown_tokens': 640}, 91, False),
    ],
)
def test_a_run_is_made_longer_where_its_rates_so_far_stay(optim_, step, longer):
    """Of 100 steps, 200 are wanted."""

    def rate_of(total_tokens, total_epochs):
        return optim.rate_of(config, helpers.plan_of(64, 16, total_tokens))

    config = helpers.optim_config(**optim_)
    there, here = ({'train': {'total_tokens': 64 * n, 'total_epochs': 0.0}} for n in (100, 200))
    assert claim.goes_on({'step': step, 'config': there}, here, rate_of, 200) == longer


def _start(config: str, workdir: pathlib.Path, *flags: str) -> subprocess.Popen:
    command = [sys.executable, '-m', 'gptjax.train', f'--config={config}', f'--workdir={workdir}']
    return subprocess.Popen(
        [*command, *FLAGS, *flags], stderr=subprocess.PIPE, text=True, env=os.environ | {'CI': '1'}
    )


def _wait_for(workdir: pathlib.Path, step: int, process: subprocess.Popen) -> None:
    name = workdir / 'checkpoints' / f'{step:08d}' / 'manifest.json'
    while process.poll() is None:
        if name.exists() or any(p.name > f'{step:08d}' for p in workdir.glob('checkpoints/0*')):
            return
        time.sleep(0.01)


@pytest.mark.parametrize(
    'how', [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_stopped_and_resumed_is_bit_equal(ready, whole, tmp_path, how):
    config, workdir = fresh(ready, tmp_path / 'run')
    codes = []
    for step in (2, 8):
        process = _start(config, workdir)
        _wait_for(workdir, step, process)
        process.send_signal(how)
        _, said = process.communicate()
        codes.append(process.returncode)
        helpers.check_no_fault(said)
    if how == signal.SIGTERM:
        assert codes[0] == 75
        assert 'run the same command again' in said or codes[1] == 0
    else:
        assert codes[0] == -9
    process = _start(config, workdir)
    _, said = process.communicate()
    assert process.returncode == 0, said
    assert equal(state_of(workdir), state_of(whole))
    resumed, uninterrupted = losses(workdir), losses(whole)
    assert resumed == uninterrupted


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_trained_again(ready, whole, tmp_path, caplog):
    config, workdir = fresh(ready, tmp_path / 'run')
    train.main(helpers.args(config, workdir, *FLAGS))
    newest = checkpoint.latest(workdir)[0]
    victim = max(
        (newest / 'state').rglob('*'), key=lambda p: p.stat().st_size if p.is_file() else 0
    )
    content = bytearray(victim.read_bytes())
    content[-3] ^= 4
    victim.write_bytes(content)
    train.main(helpers.args(config, workdir, *FLAGS))
    assert 'is damaged' in caplog.text
    assert equal(state_of(workdir), state_of(whole))


@pytest.mark.slow
def test_resume_on_another_mesh_agrees_to_rounding(ready, whole, tmp_path):
    config, workdir = fresh(ready, tmp_path / 'run')
    smooth = ('--config.optim.eps=0.001',)  # tames what Adam makes of rounding
    train.main(helpers.args(config, workdir, *FLAGS, *smooth))
    other = tmp_path / 'other'
    fresh(ready, other)
    train.main(helpers.args(config, other, *FLAGS, *smooth))
    newest = checkpoint.latest(other)[0]
    (newest / 'manifest.json').unlink()  # as if killed in the last save
    (other / 'results.json').unlink()
    mesh = ('--config.mesh.data=1', '--config.mesh.fsdp=8')
    train.main(helpers.args(config, other, *FLAGS, *smooth, *mesh))
    a, b = state_of(workdir), state_of(other)
    for name in a:
        np.testing.assert_allclose(a[name], b[name], atol=2e-5, err_msg=name)
    config_there = json.loads((other / 'config.json').read_text())
    assert config_there['mesh']['fsdp'] == 8
