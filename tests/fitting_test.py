# SPDX-License-Identifier: Apache-2.0
"""Fits of a sweep's table, predictions written before a run, and the report of both."""

import csv
import pathlib
import types

import numpy as np
import pytest

from gptjax.configs import errors
from gptjax.runtime import results
from gptjax.storage import documents
from gptjax.sweeps import collecting, predictions
from tests.sweeps_test import call


def synthetic(root: pathlib.Path, seed: int = 0, **changed) -> pathlib.Path:
    """A sweep's table as collect writes it, of losses by a law."""
    rng = np.random.default_rng(seed)
    rows = []
    for n in np.geomspace(1e5, 1e7, 5):
        for d in np.geomspace(1e7, 1e9, 6):
            loss = 1.7 + 400 * n**-0.34 + 410 * d**-0.28
            values = dict.fromkeys(
                (f.name for f in collecting.dataclasses.fields(collecting.Row)), ''
            )
            values |= {'point': f'n={n:.3g},d={d:.3g}', 'state': 'done', 'final': True, 'step': 1}
            values |= {'n': int(n), 'n_non_embedding': int(n * 0.8), 'n_with_head': int(n * 0.9)}
            values |= {'d': int(d), 'flops': 6 * n * d, 'flops_6nd': 6 * n * d, 'family': 'gpt'}
            values |= {'loss': loss * np.exp(0.003 * rng.standard_normal()), 'commit': 'abc1234'}
            rows.append(values | {'tokenizer': 't', 'data': 'x'})
    for index, change in changed.get('rows', {}).items():
        rows[index] |= change
    root.mkdir(parents=True, exist_ok=True)
    with (root / collecting.CSV).open('w', newline='') as f:
        writer = csv.DictWriter(f, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return root


def test_fits_predicts_and_scores(tmp_path, capsys, monkeypatch):
    """From a table to a prediction written before a run, and one that was not."""
    root = synthetic(tmp_path / 'root')
    call('fit', f'--workdir={root}', '--samples=100', '--budgets=1e17,1e18')
    call('fit', f'--workdir={root}', '--samples=100', '--approach=kaplan')
    fitted = documents.read(root / 'fit_3.json', dict, '')
    assert fitted['n_points'] == 30
    assert fitted['parameters_counted'] == 'all'
    assert fitted['objective'] == 'huber_sum'
    assert fitted['outlier_rule'] == 'none'
    assert (
        documents.read(root / 'fit_kaplan.json', dict, '')['parameters_counted'] == 'non_embedding'
    )
    run_ = tmp_path / 'run'
    flags = (f'--workdir={root}', '--n=2e7', '--d=4e9', f'--run={run_}')
    call('predict', *flags, '--name=before')
    said = predictions.read(root, 'before')
    true = 1.7 + 400 * 2e7**-0.34 + 410 * 4e9**-0.28
    assert said['intervals']['90'][0] < true < said['intervals']['90'][1]
    assert said['made_before_run']
    assert said['fit']['data_digest'] == fitted['data_digest']
    with pytest.raises(errors.InputError, match='is a prediction already'):
        call('predict', *flags, '--name=before')
    with pytest.raises(errors.InputError, match='is missing|is not at its end|no run'):
        call('score', f'--workdir={root}', '--name=before')
    run_.mkdir()
    results.begin(run_)
    call('predict', *flags, '--name=after')
    assert not predictions.read(root, 'after')['made_before_run']
    ended = types.SimpleNamespace(n=20_000_000, n_non_embedding=1, d=4_000_000_000, loss=true)
    monkeypatch.setattr(collecting, 'ended', lambda workdir, label: ended)
    capsys.readouterr()
    for name in ('before', 'after'):
        call('score', f'--workdir={root}', f'--name={name}')
    shown = capsys.readouterr().out
    assert '| yes |' in shown
    assert 'no, it began' in shown
    scored = predictions.read(root, 'before')
    assert scored['score']['inside'] == {'50': scored['score']['inside']['50'], '90': True}
    assert abs(scored['score']['sigmas']) < 2
    assert scored['made'] == said['made']
    assert scored['value'] == said['value']
    ended.n = 30_000_000
    with pytest.raises(errors.InputError, match='another run'):
        call('score', f'--workdir={root}', '--name=before')
    call('plot', f'--workdir={root}')
    report = (root / 'report.md').read_text()
    assert 'no, it began' in report
    assert '## Approach 3' in report
    for name in ('laws', 'grid', 'parametric', 'optima', 'predictions'):
        assert f'{name}.png' in report
        assert (root / f'{name}.png').stat().st_size > 5000
        assert (root / f'{name}.svg').read_text().startswith('<?xml')
    assert 'rates.png' not in report
    rates = {
        'rows': {row: {'peak_lr': 0.001 * (row + 1), 'batch_tokens': 512} for row in range(30)}
    }
    other = synthetic(tmp_path / 'other', **rates)
    call('plot', f'--workdir={other}')
    assert 'rates.png' in (other / 'report.md').read_text()
    call('plot', f'--workdir={other}', '--pictures=batches')
    assert (other / 'batches.svg').exists()
    with pytest.raises(errors.UsageError, match='isoflop wants a fit'):
        call('plot', f'--workdir={root}', '--pictures=isoflop')
    with pytest.raises(errors.UsageError, match="no picture 'nothing'"):
        call('plot', f'--workdir={root}', '--pictures=nothing')


@pytest.mark.parametrize('field', ['commit', 'tokenizer', 'data'])
def test_runs_that_do_not_compare_are_refused(tmp_path, field):
    root = synthetic(tmp_path, rows={3: {field: 'other'}})
    with pytest.raises(errors.InputError, match=f'2 values of {field}'):
        call('fit', f'--workdir={root}', '--samples=20')
    call('fit', f'--workdir={root}', '--samples=20', '--allow_mixed')
    allowed = documents.read(root / 'fit_3.json', dict, '')['allowed']
    assert len(allowed) == 1
    assert allowed[0].startswith(field)
    assert 'other' in allowed[0]


@pytest.mark.parametrize('state', ['diverged', 'failed', 'running', 'stopped', 'waiting'])
def test_a_run_without_an_end_is_left_out_and_named(tmp_path, caplog, state):
    root = synthetic(tmp_path, rows={3: {'state': state, 'final': False, 'loss': ''}})
    call('fit', f'--workdir={root}', '--samples=20')
    found = documents.read(root / 'fit_3.json', dict, '')
    assert found['n_points'] == 29
    assert list(found['left_out'].values()) == [state]
    assert f'({state})' in caplog.text


def test_a_fit_of_another_table_says_what_it_is_of(tmp_path):
    path = synthetic(tmp_path) / collecting.CSV
    out = tmp_path / 'fit.json'
    columns = '--columns=name=point,n=n_with_head,d=d,loss=loss'
    call(
        'fit',
        f'--table={path}',
        columns,
        '--where=d>2e7',
        '--drop_highest=2',
        f'--out={out}',
        '--samples=20',
        '--method=projection',
    )
    found = documents.read(out, dict, '')
    assert found['n_points'] == 25 - 2
    assert len(found['dropped']) == 2
    assert found['outlier_rule'] == 'the 2 highest losses dropped'
    assert found['method'] == 'projection'
    assert found['where'] == ['d>2e7']


def test_over_trained_models_of_others_are_predicted_from_the_rest(real_data, tmp_path):
    """34 models on C4 (arXiv 2403.08540): those of over 80 tokens a parameter from the others."""
    path = real_data / 'scaling_testbed' / 'models.csv'
    if not path.exists():
        pytest.skip('no testbed')
    columns = '--columns=name=name,n=params,d=tokens,loss=c4_val'
    where = '--where=dataset=c4_original,chinchilla_multiplier<=4'
    flags = (f'--table={path}', columns, '--samples=200', '--allow_wide')
    call('fit', *flags, where, f'--out={tmp_path / "fit.json"}')
    fitted = documents.read(tmp_path / 'fit.json', dict, '')
    assert fitted['n_points'] == 23
    with path.open() as f:
        rows = [row for row in csv.DictReader(f) if row['dataset'] == 'c4_original']
    far = [row for row in rows if float(row['chinchilla_multiplier']) > 4]
    off, inside = [], 0
    for row in far:
        said = predictions.predict(
            fitted, float(row['params']), float(row['tokens']), row['name'], None
        )
        low, high = said['intervals']['90']
        inside += low <= float(row['c4_val']) <= high
        off.append(abs(said['value'] / float(row['c4_val']) - 1))
    print(f'{len(far)} models: {np.mean(off):.3f} off on average, {inside} inside 90 %')
    assert len(far) == 11
    assert np.mean(off) < 0.04
    assert inside >= 8
