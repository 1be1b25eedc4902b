# SPDX-License-Identifier: Apache-2.0
"""Runs that branch off others: nothing is lost or read twice, and the parent is needed no more."""

import shutil

import jax
import numpy as np
import pytest

from gptjax import train
from gptjax.configs import errors
from gptjax.data import loader, tokens
from gptjax.models import pretrained, sources
from gptjax.runtime import checkpoint, metrics, program, results
from gptjax.training import plan as plan_lib
from gptjax.training import step as step_lib
from tests import helpers

OFTEN = (
    *('--config.checkpoint.every_steps=4', '--config.checkpoint.keep=99'),
    *('--config.train.log_every_steps=1', '--config.optim.ema_decay=0.9'),
    *('--config.model.n_layers=1', '--config.model.residual_dropout=0.1'),
    *('--config.optim.schedule=wsd', '--config.optim.cooldown_tokens=1536'),
)
EPOCHS = '--config.train.total_tokens=0'
LONG, SHORT = '--config.train.total_tokens=12288', '--config.train.total_tokens=6144'


def branching(step: int) -> tuple[str, ...]:
    return f'--config.init_from=../parent@{step}', '--config.init_state=whole'


@pytest.fixture(scope='module')
def folder(tmp_path_factory, corpus_file):
    """A prepared folder, and a run of 24 steps beside it."""
    parent = tmp_path_factory.mktemp('runs')
    (parent / 'data').mkdir()
    config, _ = helpers.prepared(parent / 'data', corpus_file)
    run(parent, 'parent', config, LONG)
    return parent, config


def run(parent, name, config, *flags):
    """Trains in a folder beside the others. Returns it."""
    workdir = parent / name
    if not workdir.exists():
        helpers.fresh(workdir, parent / 'data')
    flags = [flag.replace('../', f'{parent}/') for flag in flags]
    train.main(helpers.args(config, workdir, *OFTEN, *flags))
    return workdir


def outcome(workdir, since: int):
    """Losses of the steps behind one, the scores, and the weights."""
    rows = {row['step']: row['train/loss'] for row in metrics.read(workdir) if row['step'] > since}
    scores = {k: v for k, v in results.read(workdir).items() if k.startswith('eval/')}
    params = pretrained.load(str(workdir)).params
    average = pretrained.load(f'{workdir}/average').params
    return rows, scores, [np.asarray(x).tobytes() for x in jax.tree.leaves((params, average))]


def test_a_cooldown_is_that_of_a_run_of_its_length(folder, monkeypatch):
    """From a step before it, of a longer run; stopped on the way, and its parent gone by then."""
    parent, config = folder
    alone = run(parent, 'alone', config, SHORT)
    shutil.copytree(parent / 'parent', parent / 'passing')
    named = tuple(flag.replace('parent@', 'passing@') for flag in branching(8))
    looks = iter([False, True])
    monkeypatch.setattr(program, 'stop_requested', lambda: next(looks, False))
    with pytest.raises(program.Preempted):
        run(parent, 'branch', config, SHORT, *named)
    shutil.rmtree(parent / 'passing')
    branch = run(parent, 'branch', config, SHORT, *named)
    assert outcome(branch, 8) == outcome(alone, 8)
    assert results.read(branch)['branched_from'] == [f'{parent}/passing@8']
    assert checkpoint.peek(branch)['data']['branch']['step'] == 8
    assert min(row['step'] for row in metrics.read(branch)) == 9


def test_a_branch_that_changes_nothing_is_its_parent(folder):
    parent, config = folder
    branch = run(parent, 'same', config, LONG, *branching(16))
    assert outcome(branch, 16) == outcome(parent / 'parent', 16)
    again = run(
        parent,
        'again',
        config,
        LONG,
        f'--config.init_from={branch}@20',
        '--config.init_state=whole',
    )
    assert outcome(again, 20) == outcome(parent / 'parent', 20)
    assert results.read(again)['branched_from'] == [f'{branch}@20', f'{parent}/parent@16']


def test_another_batch_and_rate_from_a_step_on(folder):
    parent, config = folder
    more = ('--config.batch.batch_tokens=1024', '--config.optim.peak_lr=3e-4')
    branch = run(parent, 'wider', config, LONG, *more, *branching(8))
    rows = {row['step']: row for row in metrics.read(branch)}
    assert rows[9]['tokens'] == 8 * 512 + 1024
    assert results.read(branch)['steps'] == 8 + 8
    assert rows[9]['opt/lr'] == pytest.approx(3e-4)


def test_another_mixture_in_epochs_goes_back_behind_a_spike(folder, monkeypatch):
    """From the newest step of a run: one set goes on, one begins, and the spike's are left out."""
    parent, config = folder
    seen, make = [], step_lib.make_train_step

    def making(*args):
        step = make(*args)

        def poisoned(state, batch):
            seen.extend(tuple(row) for row in np.asarray(batch['tokens']).tolist())
            spike = float('nan') if len(seen) == 6 * 16 else 1.0
            return step(state, batch | {'weights': batch['weights'] * spike})

        return poisoned

    monkeypatch.setattr(step_lib, 'make_train_step', making)
    whole = tokens.open_set(parent / 'data' / 'tokens', 'train')
    steps = 24 + 12
    flags = (
        *(f'--config.init_from={parent}/parent', '--config.init_state=whole'),
        *("--config.data.sets=('tokens', 'tokens')", '--config.data.weights=(0.5, 0.5)'),
        *(f'--config.train.total_epochs={steps * 512 / (2 * len(whole))}', EPOCHS),
        *('--config.train.on_spike=rollback', '--config.train.rollback_steps=2'),
    )
    branch = run(parent, 'mixed', config, *flags)
    assert results.read(branch)['steps'] == steps
    data = checkpoint.latest(branch)[1]['data']
    assert data['skipped'] == [[28, 2 * 16]]
    order = loader.Order(24 * 16, [0, 1], [24 * 16, 0], [])
    assert loader.Order(**data['branch']['order']) == order
    mixture = loader.windows([whole, whole], [0.5, 0.5], 32, 0, order=order)
    expected = [tuple(mixture[i]()[:32].tolist()) for i in range(14 * 16)]
    assert seen[: 6 * 16] == expected[: 6 * 16]
    assert seen[-8 * 16 :] == expected[6 * 16 :]  # from step 28 again to 36


@pytest.mark.parametrize(
    ('flags', 'said'),
    [
        (('--config.optim.mu_dtype=bfloat16', *branching(8)), 'optim.mu_dtype = float32 there'),
        (('--config.optim.ema_decay=0', *branching(8)), 'optim.ema_decay > 0 = True there'),
        (('--config.seed=1', *branching(8)), 'seed = 0 there, 1 here'),
        (('--config.model.n_layers=2', *branching(8)), 'another model .n_layers = 1 there'),
        (('--config.train.total_tokens=4096', *branching(8)), 'are over before step 8'),
        (branching(7), 'has no whole checkpoint of step 7|7'),
        (
            ('--config.init_from=../parent/average', '--config.init_state=whole'),
            'an average of weights, not a state',
        ),
        (('--config.init_state=whole',), 'whole with init_from'),
        (('--config.init_state=most',), 'must be weights, or whole'),
    ],
)
def test_what_cannot_be_gone_on_from_is_a_line(folder, flags, said, tmp_path):
    parent, config = folder
    workdir = helpers.fresh(tmp_path / 'run', parent / 'data')
    flags = [flag.replace('../', f'{parent}/') for flag in flags]
    with pytest.raises(errors.InputError, match=said) as caught:
        train.main(helpers.args(config, workdir, *OFTEN, LONG, *flags))
    assert '\n' not in str(caught.value)
    assert not (workdir / 'checkpoints').exists()


def test_a_step_of_a_run_can_be_named(folder):
    parent, _ = folder
    short, long = (sources.open(f'{parent}/parent{x}') for x in ('@12', '/checkpoints/12'))
    assert short.identity() == long.identity()
    assert sources.open(f'{parent}/parent@12/average').identity() != short.identity()


@pytest.mark.parametrize('seed', range(20))
def test_a_plan_behind_another_reads_on(seed):
    rng = np.random.default_rng(seed)

    def drawn():
        ramp = int(rng.integers(0, 2))
        config = plan_lib.Config(
            batch_tokens=64 * int(rng.integers(4, 9)),
            device_windows=0,
            ramp_from_tokens=64 * ramp,
            ramp_over_tokens=5000 * ramp,
            ramp_stages=3,
        )
        return plan_lib.of_tokens(config, 16, 20_000)

    before, own, step = drawn(), drawn(), int(rng.integers(1, 25))
    before.skip(step - 1, step)
    plan = own.after(step, before.stages(step), before.skipped)
    for s in range(step):
        assert plan.examples(s) == before.examples(s)
    for s in range(step, plan.total_steps):
        assert plan.size(s) == own.size(s)
        last, size = plan.examples(s - 1)
        assert plan.examples(s)[0] == last + size + (before.skipped[0][1] if s == step - 1 else 0)
    assert plan.tokens(plan.total_steps) >= 20_000
    assert set(plan.sizes()) == {own.size(s) for s in range(step, 10**4)}
    assert plan.saved(step)['windows'] == before.saved(step)['windows']


@pytest.mark.parametrize('seed', range(10))
def test_another_mixture_reads_on_in_every_set(seed):
    """Mixtures one after the other, of sets that come, go and come back, and of one named twice."""
    rng = np.random.default_rng(seed)
    names, order, at, read, given = ['a', 'b'], loader.from_start(2), 0, {}, {}
    for _ in range(6):
        weights = list(rng.random(len(names)) + 0.1)
        mixture = loader.windows([numbered(name) for name in names], weights, 10, 5, order=order)
        for name, number in zip(names, order.numbers, strict=True):
            assert given.setdefault(number, name) == name  # each number is of one set, for ever
        assert len(set(order.numbers)) == len(names)
        count = int(rng.integers(1, 30))
        for index in range(count):
            window = mixture[index]()
            read.setdefault('abc'[window[0] // 10_000], []).append(tuple(window))
        before, at = names, at + count
        names = ['abc'[i] for i in rng.integers(0, 3, rng.integers(1, 4))]
        order = loader.mixed_anew(order, before, weights, at, names)
    ends = [list(each) for each in zip(names, order.numbers, order.offsets, strict=True)]
    for name, windows in read.items():  # of every shuffle of it the first ones, each once
        expected = []
        for _, number, end in (each for each in ends + order.gone if each[0] == name):
            alone = loader.Order(0, [number], [0], [])
            whole = loader.windows([numbered(name)], [1.0], 10, 5, order=alone)
            expected += [tuple(whole[i]()) for i in range(end)]
        assert sorted(windows) == sorted(expected)


def numbered(name: str):
    return helpers.token_set('abc'.index(name) * 10_000 + np.arange(1001))
