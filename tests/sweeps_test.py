# SPDX-License-Identifier: Apache-2.0
"""A sweep from its points to a scored prediction, as its user runs it."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
import types

import pytest

from gptjax import scale
from gptjax.configs import base, cli, errors, sweep
from gptjax.runtime import jobs, results
from gptjax.storage import buckets, leases, scratch
from gptjax.sweeps import collecting, live, points, states
from tests import conftest, helpers

SWEEP = """
from gptjax.configs import cli, sizes
from gptjax.configs import sweep as sweep_lib

{config}

def sweep(arg=None):
    small = {{'train.total_tokens': 4 * 512, 'optim.warmup_tokens': 512}}
    wsd = {{'optim.schedule': 'wsd', 'optim.warmup_tokens': 512, 'optim.cooldown_tokens': 1024}}
    return {{
        'small': small,
        'stem': wsd | {{'train.total_tokens': 8 * 512}},
        'branch': wsd | {{
            'train.total_tokens': 5 * 512, 'init_from': sweep_lib.Checkpoint('stem', 3)}},
        'counted': {{'model': sizes.ngram(3, n_vocab=512, n_ctx=32), 'ngram.total_tokens': 1000}},
        'wild': small | {{
            'train.total_tokens': 70 * 512, 'train.spike_sigmas': 1e-3,
            'optim.schedule': 'constant', 'optim.peak_lr': 100.0}},
        'wrong': small | {{'batch.batch_tokens': 500}},
    }}
"""
DONE = ['small', 'stem', 'branch', 'counted']


def run(*flags, **how):
    command = [sys.executable, '-m', 'gptjax.scale', *map(str, flags)]
    return subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **how
    )


def args(verb, *flags):
    """The arguments of a verb, as its command line gives them."""
    found = scale.VERBS[verb]
    given = ['scale', *map(str, flags)]
    return cli.parse(
        given, found.define, found.default_config, found.reads, scratch.WHERE, found.needs_workdir
    )


def call(verb, *flags):
    scale.VERBS[verb].main(args(verb, *flags))


@pytest.fixture(scope='module')
def ran(tmp_path_factory, corpus_file):
    """A sweep that was stopped once, and then run to its end: (folder, what it said)."""
    folder = tmp_path_factory.mktemp('sweep')
    config = folder / 'swept.py'
    config.write_text(SWEEP.format(config=helpers.TINY_CONFIG.format(path=str(corpus_file))))
    root = folder / 'root'
    command = ('run', f'--config={config}', f'--workdir={root}')
    with helpers.signals_heeded():
        first = run(*command, cwd=conftest.ROOT)
    for _ in range(1200):
        if any(root.glob('points/*/metrics.jsonl')) or first.poll() is not None:
            break
        time.sleep(0.1)
    first.send_signal(signal.SIGINT)
    _, stopped = first.communicate(timeout=120)
    assert first.returncode == 75, stopped
    assert not any(leases.is_held(each) for each in root.glob('points/[a-z]*'))
    again = run(*command, cwd=conftest.ROOT)
    _, said = again.communicate(timeout=600)
    return config, root, again.returncode, said


def test_runs_what_can_be_run_and_names_the_rest(ran):
    _, root, code, said = ran
    helpers.check_no_fault(said)
    assert code == 1
    assert '2 of' in said
    assert 'did not get to their end: ' in said
    assert 'is not a multiple of n_ctx' in said
    wanted = points.read(root)['points']
    looks = {name: states.look(root, name, each) for name, each in wanted.items()}
    assert {name: look.state for name, look in looks.items()} == {
        **dict.fromkeys(DONE, jobs.DONE),
        'wild': states.DIVERGED,
        'wrong': jobs.FAILED,
    }
    assert 'gradient norm' in looks['wild'].why
    assert 'not a multiple' in looks['wrong'].why
    assert results.diverged(root / 'points' / 'wild')['step'] >= 1
    assert all(results.began(root / 'points' / name) for name in ('small', 'stem', 'wild'))
    branch = results.read(root / 'points' / 'branch')
    assert branch['steps'] == 5
    assert branch['branched_from'][0].endswith('stem@3')


def test_what_is_done_is_not_run_again(ran):
    config, root, _, _ = ran
    before = {name: (root / 'logs' / f'{name}.txt').read_bytes() for name in DONE}
    again = run('run', f'--config={config}', f'--workdir={root}', cwd=conftest.ROOT)
    _, said = again.communicate(timeout=300)
    assert f'{len(DONE)} of 6 points are done already' in said
    assert before == {name: (root / 'logs' / f'{name}.txt').read_bytes() for name in DONE}


def test_status_says_where_each_point_is(ran, capsys):
    _, root, _, _ = ran
    call('status', f'--workdir={root}')
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 6
    assert all(('done' in line) == (line.split()[0] in DONE) for line in said)


@pytest.fixture(scope='module')
def collected(ran):
    _, root, _, _ = ran
    call('collect', f'--workdir={root}')
    with (root / collecting.CSV).open() as f:
        return root, list(csv.DictReader(f))


def test_the_table_has_every_point_and_how_it_ended(collected):
    root, rows = collected
    assert {row['point'] for row in rows} == {*DONE, 'wild', 'wrong'}
    final = {row['point']: row for row in rows if row['final'] == 'True'}
    assert sorted(final) == sorted(DONE)
    small = final['small']
    assert int(small['d']) == 4 * 512
    assert float(small['flops_6nd']) == 6 * int(small['n']) * 4 * 512
    found = results.read(root / 'points' / 'small')
    assert float(small['loss']) == found['eval/tokens/nats_per_token']
    assert float(small['bits_per_byte']) == found['eval/tokens/bits_per_byte']
    assert int(small['n']) == found['parameters'] > int(small['n_with_head'])
    assert small['commit'] == found['commit']
    assert small['tokenizer']
    assert small['data']
    assert int(final['counted']['n']) == results.read(root / 'points' / 'counted')['parameters']
    assert int(final['counted']['d']) == 992  # 31 windows of 32
    states_ = {row['point']: row['state'] for row in rows}
    assert (states_['wild'], states_['wrong']) == ('diverged', 'failed')
    assert [row['why'] for row in rows if row['point'] == 'wrong'][0]
    along = [row for row in rows if row['point'] == 'stem']
    assert [int(row['step']) for row in along] == sorted(int(row['step']) for row in along)
    assert len(along) > 1  # its evaluations on the way


def test_both_tables_say_the_same(collected):
    from pyarrow import parquet

    root, rows = collected
    found = parquet.read_table(root / collecting.PARQUET).to_pylist()
    assert len(found) == len(rows)
    for one, other in zip(found, rows, strict=True):
        for name, value in one.items():
            if isinstance(value, float):
                assert (value != value) == (other[name] == '')
            else:
                assert str(value) == other[name]


@pytest.mark.parametrize(
    ('found', 'said'),
    [
        ([{'seed': 0}, {'seed': 0}], 'the same'),
        ([], 'no points'),
        ({'a/b': {}}, 'no name of a point'),
        ({'.a': {}}, 'no name of a point'),
        ({'a': {'init_from': sweep.Checkpoint('b', 1)}}, 'no point of the sweep'),
        (
            {
                'a': {'init_from': sweep.Checkpoint('b', 1)},
                'b': {'init_from': sweep.Checkpoint('a', 1)},
            },
            'begins with itself',
        ),
    ],
)
def test_sweeps_that_are_none(found, said):
    module = types.ModuleType('swept')
    with pytest.raises(errors.UsageError, match='has no sweep'):
        sweep.points(module, 'x.py', None)
    module.sweep = lambda: found
    with pytest.raises(errors.UsageError, match=said):
        sweep.points(module, 'x.py', None)


@pytest.mark.parametrize(
    ('overrides', 'said'),
    [
        ({'optim.peak_rl': 1.0}, 'does not exist'),
        ({'model.n_heads': 7.5}, 'n_heads = 7.5, which must be of type int'),
        ({'train.total_tokens': 0, 'train.total_epochs': 1.0}, 'not epochs'),
    ],
)
def test_a_point_that_is_wrong_is_named(overrides, said):
    with pytest.raises(errors.UsageError, match=f'point bad: .*{said}'):
        points.of_sweep(base.get_config(), {'bad': overrides}, 'root')


def test_a_branch_behind_the_end_of_its_stem_is_refused():
    tokens = base.get_config().batch.batch_tokens
    stem = {'train.total_tokens': 10 * tokens}
    for step, total in ((11, 20), (5, 5)):
        branch = {'init_from': sweep.Checkpoint('stem', step), 'train.total_tokens': total * tokens}
        with pytest.raises(errors.UsageError, match='point branch begins at'):
            points.of_sweep(base.get_config(), {'stem': stem, 'branch': branch}, 'root')


def test_tokens_of_another_corpus_are_not_taken_for_this_ones(tmp_path):
    """They are made where there are none, and looked at again where what makes them has changed."""
    config = base.get_config()
    swept = points.of_sweep(config, {'a': {}}, str(tmp_path))

    def preparing():
        return [job.name for job in points.jobs_of(swept, tmp_path, config) if job.name != 'a']

    assert len(preparing()) == 3
    points.note_prepared(tmp_path, config)
    assert preparing() == []
    config.corpus.path = 'other'
    assert len(preparing()) == 3
    config.data.sets = ('/elsewhere/tokens',)
    assert preparing() == []


def test_the_board_tells_what_is_left():
    found = {
        name: {'train.total_tokens': tokens, 'model.d_model': width, 'model.d_head': width // 2}
        for name, tokens, width in (('a', 200_000, 64), ('b', 400_000, 64), ('c', 200_000, 128))
    }
    swept = points.of_sweep(base.get_config(), found, 'root')
    looks = {
        'a': states.Look(jobs.DONE, 200_000, 3.0, 1000.0),
        'b': states.Look(jobs.RUNNING, 100_000, 4.0, 1000.0),
        'c': states.Look(jobs.WAITING, 0, float('nan'), 0.0),
    }
    left = live.secs_left(swept, looks)
    assert left['a'] == 0
    assert left['b'] == pytest.approx(300)
    costs = {name: point.counts.flops_per_token for name, point in swept.items()}
    assert left['c'] == pytest.approx(200 * costs['c'] / costs['a'])
    assert live.total_left(left, 2) == pytest.approx(
        max(sum(left.values()) / 2, max(left.values()))
    )
    nothing = {name: states.Look(jobs.WAITING, 0, float('nan'), 0.0) for name in found}
    assert all(value != value for value in live.secs_left(swept, nothing).values())
    assert live.table(swept, looks, 2).row_count == 3


def test_a_sweep_in_a_bucket_is_collected_in_place(collected, storage):
    """The same rows from copies of the workdirs in a bucket, and the table there."""
    root, rows = collected
    there = buckets.of(f'gs://{storage.bucket()}/one')
    for path in root.rglob('*'):
        wanted = path.suffix in ('.json', '.jsonl') and 'tokens' not in path.parts
        if path.is_file() and (wanted or path.name.startswith('.complete')):
            (there / path.relative_to(root).as_posix()).put(path.read_bytes())
    call('collect', f'--workdir={there}')
    found = list(csv.DictReader((there / collecting.CSV).read_bytes().decode().splitlines()))
    assert [(r['point'], r['state'], r['loss']) for r in found] == [
        (r['point'], r['state'], r['loss']) for r in rows
    ]


@pytest.mark.parametrize(
    ('flags', 'code', 'said'),
    [
        ([], 2, 'say what to do'),
        (['fitt'], 2, "no 'fitt' here"),
        (['fit', '--approach=9'], 2, 'approach'),
        (['fit', '--table=no.csv', '--columns=n=a,d=b,loss=c', '--out=x'], 1, 'no.csv'),
        (['predict', '--workdir=nowhere', '--n=1e6', '--d=1e8'], 1, 'is missing'),
        (['run', '--config=experiments/quickstart.py', '--workdir=w'], 2, 'has no sweep()'),
        (['plot', '--workdir=nowhere'], 1, 'is missing'),
    ],
)
def test_wrong_usage_is_one_line(tmp_path, flags, code, said):
    shutil.copytree(conftest.ROOT / 'experiments', tmp_path / 'experiments')
    found = run(*flags, cwd=tmp_path, env=os.environ | {'PYTHONPATH': str(conftest.ROOT)})
    _, heard = found.communicate(timeout=120)
    assert found.returncode == code, heard
    assert said in heard
    assert len(heard.strip().splitlines()) == 1
    helpers.check_no_fault(heard)


def test_help_names_every_verb():
    found = run('--help', cwd=conftest.ROOT)
    text, _ = found.communicate(timeout=120)
    assert found.returncode == 0
    assert all(f'  {verb} ' in text for verb in scale.VERBS)
    found = run('fit', '--help', cwd=conftest.ROOT)
    text, _ = found.communicate(timeout=120)
    assert found.returncode == 0
    assert '--drop_highest' in text
