# SPDX-License-Identifier: Apache-2.0
"""Spikes, full and failing disks, dead data: what a run does about each, and what it says."""

import errno
import json
import os
import threading
import time
import types

import jax
import numpy as np
import pytest

from gptjax import train
from gptjax.configs import errors
from gptjax.runtime import arrays, checkpoint, clock, metrics, program, saver
from gptjax.storage import retry
from gptjax.training import reader
from gptjax.training import step as step_lib
from tests import helpers

FLAGS = (
    '--config.train.total_tokens=10240',
    '--config.checkpoint.every_steps=4',
    '--config.train.log_every_steps=1',
    '--config.checkpoint.every_secs=0.0',
)
STEPS = 20


@pytest.fixture(scope='module')
def ready(tmp_path_factory, corpus_file):
    return helpers.prepared(tmp_path_factory.mktemp('ready'), corpus_file)


@pytest.fixture
def workdir(ready, tmp_path):
    return helpers.fresh(tmp_path / 'run', ready[1])


def run(ready, workdir, *flags):
    train.main(helpers.args(ready[0], workdir, *FLAGS, *flags))


def poison(monkeypatch, *first_tokens):
    """Weights of NaN for batches that begin with a window of one of these."""
    make = step_lib.make_train_step
    seen = []

    def making(*args):
        step = make(*args)

        def poisoned(state, batch):
            first = int(np.asarray(batch['tokens'])[0].sum())
            seen.append(first)
            if first in first_tokens:
                batch = batch | {'weights': batch['weights'] * float('nan')}
            return step(state, batch)

        return poisoned

    monkeypatch.setattr(step_lib, 'make_train_step', making)
    return seen


@pytest.fixture(scope='module')
def batches(ready, tmp_path_factory):
    """What tells the batches of a run apart, in order."""
    path = helpers.fresh(tmp_path_factory.mktemp('seen') / 'run', ready[1])
    with pytest.MonkeyPatch.context() as patch:
        seen = poison(patch)
        run(ready, path)
    assert len(set(seen)) == STEPS
    return seen


def test_stop_at_a_loss_that_is_not_finite(ready, workdir, batches, monkeypatch):
    poison(monkeypatch, batches[9])
    with pytest.raises(
        errors.InputError, match=r'loss nan.* at step 10.*on_spike=skip or rollback'
    ):
        run(ready, workdir)
    assert checkpoint.latest(workdir)[1]['step'] == 8
    assert metrics.read(workdir)[-1]['step'] == 9


def test_skip(ready, workdir, batches, monkeypatch, caplog):
    poison(monkeypatch, batches[9])
    run(ready, workdir, '--config.train.on_spike=skip')
    assert 'at step 10: its update is skipped' in caplog.text
    rows = {row['step']: row for row in metrics.read(workdir)}
    assert list(rows) == list(range(1, STEPS + 1))
    assert 'train/loss' not in rows[10]
    assert rows[STEPS]['train/skipped_steps'] == 1
    assert json.loads((workdir / 'results.json').read_text())['steps'] == STEPS


def test_skipping_without_end_ends(ready, workdir, batches, monkeypatch):
    monkeypatch.setattr(reader, 'MOST_SKIPS', 3)
    poison(monkeypatch, *batches[5:9])
    with pytest.raises(errors.InputError, match='at step 8'):
        run(ready, workdir, '--config.train.on_spike=skip')


def test_rollback_leaves_the_batches_out(ready, workdir, batches, monkeypatch, caplog):
    seen = poison(monkeypatch, batches[9])
    run(ready, workdir, '--config.train.on_spike=rollback', '--config.train.rollback_steps=3')
    assert 'going back to step 4, without the batches since' in caplog.text
    # Step 10 spiked; step 11 was under way. From step 4 on, windows go on after step 10's.
    assert seen[:11] == batches[:11]
    assert seen[11 : 11 + 10] == batches[10:20]
    assert len(seen) == 11 + STEPS - 4
    rows = metrics.read(workdir)
    assert [row['step'] for row in rows] == list(range(1, STEPS + 1))
    meta = checkpoint.latest(workdir)[1]
    assert meta['data']['skipped'] == [[4, 6 * 16]]
    assert meta['data']['windows'] == (STEPS + 6) * 16


def test_rollback_uses_the_oldest_checkpoint_where_none_is_old_enough(
    ready, workdir, batches, monkeypatch, caplog
):
    poison(monkeypatch, batches[17])
    run(ready, workdir, '--config.train.on_spike=rollback', '--config.train.rollback_steps=100')
    assert 'going back to step 12, without the batches since' in caplog.text  # 12 and 16 were kept


def test_an_evaluation_that_is_not_finite_is_a_spike(ready, workdir, monkeypatch):
    monkeypatch.setattr(train.perplexity.Score, 'named', lambda self, name: {'eval/x': np.nan})
    with pytest.raises(errors.InputError, match='eval/x is nan at step 3'):
        run(ready, workdir)


@pytest.mark.parametrize('every', [0, 3])
def test_a_stop_in_an_evaluation_saves_first(ready, workdir, monkeypatch, every):
    """Also where the save before it had failed; and the evaluation is made up for."""
    full_for_a_while(monkeypatch, every // 3)
    flags = ('--config.train.eval_every_steps=3', f'--config.checkpoint.every_steps={every}')
    with monkeypatch.context() as patch:
        patch.setattr(program.signals, 'stop_requested', lambda: True)
        with pytest.raises(program.Preempted):
            run(ready, workdir, *flags)
    assert checkpoint.latest(workdir)[1]['step'] == 3
    assert not any('eval/tokens/bits_per_byte' in row for row in metrics.read(workdir))
    run(ready, workdir, *flags)
    scored = [r['step'] for r in metrics.read(workdir) if 'eval/tokens/bits_per_byte' in r]
    assert scored == [3, 6, 9, 12, 15, 18, 20]


def test_a_run_that_went_back_resumes_with_its_gap(ready, workdir, batches, monkeypatch):
    flags = ('--config.train.on_spike=rollback', '--config.train.rollback_steps=3')
    poison(monkeypatch, batches[9])
    run(ready, workdir, *flags)
    whole = checkpoint.latest(workdir)
    folder = whole[0]
    expected = json.loads((folder / 'manifest.json').read_text())
    (folder / 'manifest.json').unlink()  # as if killed in the last save
    (workdir / 'results.json').unlink()
    monkeypatch.undo()
    run(ready, workdir, *flags)
    again = json.loads((folder / 'manifest.json').read_text())
    arrays = [name for name in expected if name.split('/')[-1][0].isdigit()]
    assert arrays
    assert all(again[name] == expected[name] for name in arrays)


def full_for_a_while(monkeypatch, failures: int):
    left = [failures]

    def disk_usage(folder):
        left[0] -= 1
        return types.SimpleNamespace(free=0 if left[0] >= 0 else 2**40)

    monkeypatch.setattr(arrays.shutil, 'disk_usage', disk_usage)
    monkeypatch.setattr(metrics, 'shutil', types.SimpleNamespace(disk_usage=_roomy))


def _roomy(folder):
    return types.SimpleNamespace(free=2**40)


def test_a_full_disk_is_waited_for(ready, workdir, monkeypatch, caplog):
    full_for_a_while(monkeypatch, 2)
    monkeypatch.setattr(saver, 'FIRST_SECS', 0.01)
    run(ready, workdir)
    assert 'training goes on: could not save step 4' in caplog.text
    assert checkpoint.latest(workdir)[1]['step'] == STEPS
    assert len(metrics.read(workdir)) == STEPS


def test_the_last_save_is_insisted_on(ready, workdir, monkeypatch):
    monkeypatch.setattr(saver, 'INSIST_SECS', 0.5)
    full_for_a_while(monkeypatch, 10**6)
    soon = '--config.checkpoint.give_up_minutes=0.01'
    with pytest.raises(checkpoint.SaveError, match='no space is left'):
        run(ready, workdir, '--config.checkpoint.every_steps=0', soon)


def test_storage_that_fails_for_a_moment_is_tried_again(monkeypatch, caplog):
    monkeypatch.setattr(retry, 'FIRST_SECS', 0.001)
    monkeypatch.setattr(retry._Said, 'at', -1e9)
    outcomes = [OSError(errno.EIO, 'input/output error'), TimeoutError('slow'), 'read']

    def read():
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    assert retry.call('reading x', read) == 'read'
    assert caplog.text.count('reading x failed') == 1  # a minute
    outcomes[:] = [FileNotFoundError(errno.ENOENT, 'gone')]
    with pytest.raises(FileNotFoundError):
        retry.call('reading x', read)
    outcomes[:] = [OSError(errno.EIO, 'broken')] * 900
    with pytest.raises(OSError, match='broken'), retry.patience(0.2):
        retry.call('reading x', read)
    assert 0 < len(outcomes) < 899


def test_rows_that_a_full_disk_refused_are_written_later(tmp_path, monkeypatch, caplog):
    writer = metrics.Writer(tmp_path, metrics.past(tmp_path, 0), 1.0)
    writer.write(1, 10, {'a': 1.0})
    writer.flush()
    fsync = os.fsync

    def full(fd):
        os.ftruncate(fd, os.fstat(fd).st_size - 5)  # not all of it fitted
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(metrics.os, 'fsync', full)
    writer.write(2, 20, {'a': 2.0})
    writer.flush()
    monkeypatch.setattr(metrics.os, 'fsync', fsync)
    assert 'rows of metrics.jsonl wait to be written' in caplog.text
    writer.write(3, 30, {'a': 3.0})
    writer.close()
    assert [row['a'] for row in metrics.read(tmp_path)] == [1.0, 2.0, 3.0]


def test_a_dead_data_pipeline_is_named(ready, workdir, monkeypatch):
    def broken(*args):
        yield from ()
        raise ValueError('a disk went away')

    monkeypatch.setattr(train.loader, 'batches', broken)
    with pytest.raises(errors.InputError, match='the data pipeline died: a disk went away'):
        run(ready, workdir)
    monkeypatch.setattr(train.loader, 'batches', lambda *args: iter(()))
    with pytest.raises(errors.InputError, match='has no more batches'):
        run(ready, workdir)


def test_a_slow_data_pipeline_is_named(caplog):
    watchdog = clock.Watchdog('the next batch', after_secs=0.1)
    with watchdog:
        time.sleep(0.4)
    time.sleep(0.2)
    watchdog.close()
    assert 'for the next batch' in caplog.text
    watch = clock.Clock(1.0)
    watch.trained(10, 0.1)
    watch.waited(1e6)
    watch.read(0)
    assert 'the data pipeline is slow' in caplog.text
    assert not [t for t in threading.enumerate() if t.name == 'watchdog' and not t.daemon]


def test_everything_is_seen(ready, workdir, caplog):
    caplog.set_level('INFO')
    run(
        ready,
        workdir,
        '--config.train.layer_norms=True',
        '--config.train.profile_at_step=2',
        '--config.train.profile_steps=2',
        '--config.mesh.data=2',
        '--config.mesh.fsdp=4',
        '--config.train.total_tokens=4096',
    )
    row = metrics.read(workdir)[-1]
    for name in (
        'perf/step_secs_p50',
        'perf/step_secs_p90',
        'perf/goodput',
        'perf/data_wait',
        'norm/grad/network/block_0/attention/query/kernel/1',
        'norm/param/network/token_embedding',
        'opt/grad_norm',
        'perf/tokens_per_sec',
    ):
        assert np.isfinite(row[name]), name
    assert list((workdir / 'profile').rglob('*.xplane.pb'))
    table = (workdir / 'parameters.txt').read_text()
    assert 'network/block_0/attention/query/kernel' in table
    assert 'fsdp' in table
    assert 'of a device: parameters' in caplog.text
    events = b''.join(p.read_bytes() for p in (workdir / 'tensorboard').iterdir())
    assert b'perf/step_secs' in events


def test_weights_and_biases_when_asked(tmp_path, monkeypatch):
    logged = []

    class Run:
        def define_metric(self, name, step_metric):
            assert (name, step_metric) == ('*', 'step')

        def log(self, values):
            logged.append(values)

        def finish(self):
            logged.append('finished')

    fake = type('wandb', (), {'init': staticmethod(lambda **kwargs: Run())})
    monkeypatch.setitem(__import__('sys').modules, 'wandb', fake)
    writer = metrics.Writer(tmp_path, metrics.past(tmp_path, 0), 1.0, wandb='project')
    writer.write(1, 10, {'a': 1.0})
    writer.close()
    assert logged == [{'step': 1, 'a': 1.0}, 'finished']
    monkeypatch.setitem(__import__('sys').modules, 'wandb', None)
    with pytest.raises(errors.UsageError, match='pip install wandb'):
        metrics.Writer(tmp_path, metrics.past(tmp_path, 0), 1.0, wandb='project')


@pytest.mark.slow
def test_an_average_beside_frozen_weights_goes_on_bit_equal(ready, workdir, tmp_path):
    from gptjax.models import pretrained

    flags = ('--config.optim.ema_decay=0.5', '--config.optim.frozen=("network/*_embedding",)')
    flags += ('--config.train.total_tokens=3072',)
    whole = helpers.fresh(tmp_path / 'whole', ready[1])
    run(ready, whole, *flags)
    _, meta = checkpoint.latest(whole)
    averaged = {name for name in meta['shapes'] if name.startswith("['average']")}
    assert averaged
    assert not any('embedding' in name for name in averaged)
    with helpers.stopped_after(3), pytest.raises(program.Preempted):
        run(ready, workdir, *flags)
    run(ready, workdir, *flags)
    for path in ('', 'average'):
        first, again = (pretrained.load(w / path).params for w in (whole, workdir))
        np.testing.assert_equal(jax.device_get(first), jax.device_get(again))
    trained, average = (pretrained.load(whole / p).params['network'] for p in ('', 'average'))
    np.testing.assert_array_equal(trained['token_embedding'], average['token_embedding'])


def test_rows_of_a_run_that_was_stopped_between_two_of_them(ready, workdir, tmp_path):
    """Means go on with the steps that were read before the stop, and so do counts."""
    flags = ('--config.train.log_every_steps=4', '--config.checkpoint.every_steps=0')
    whole = helpers.fresh(tmp_path / 'whole', ready[1])
    run(ready, whole, *flags)
    with helpers.stopped_after(6, 13):
        for _ in range(2):
            with pytest.raises(program.Preempted):
                run(ready, workdir, *flags)
    run(ready, workdir, *flags)
    rows = [
        [{k: v for k, v in row.items() if not k.startswith('perf/')} for row in metrics.read(w)]
        for w in (workdir, whole)
    ]
    assert [row['step'] for row in rows[0]] == [3, 4, 6, 8, 9, 12, 15, 16, 18, 20]
    assert rows[0] == rows[1]


def test_the_best_average_is_what_best_stands_for(ready, workdir):
    from gptjax.models import pretrained

    name = 'eval_average/tokens/bits_per_byte'
    flags = ('--config.optim.ema_decay=0.5', f'--config.checkpoint.keep_best={name}')
    run(ready, workdir, *flags, '--config.train.total_tokens=3072')
    best = checkpoint.best(workdir)
    step = workdir / 'checkpoints' / f'{best.step:08d}'
    of_best, average, last = (
        np.asarray(pretrained.load(p).params['network']['token_embedding'])
        for p in (workdir / 'best', step / 'average', step)
    )
    np.testing.assert_array_equal(of_best, average)
    assert not np.array_equal(average, last)


def test_the_average_is_scored_saved_and_loaded(ready, workdir):
    from gptjax.models import pretrained

    run(ready, workdir, '--config.optim.ema_decay=0.5', '--config.train.total_tokens=2048')
    results = json.loads((workdir / 'results.json').read_text())
    assert results['eval/tokens/bits_per_byte'] != results['eval_average/tokens/bits_per_byte']
    last, average = (
        pretrained.load(p).params['network']['token_embedding']
        for p in (workdir, workdir / 'average')
    )
    assert last.dtype == average.dtype
    assert not np.array_equal(last, average)
    assert np.abs(last - average).max() < 0.1
