# SPDX-License-Identifier: Apache-2.0
"""Suites through the program: results, resume, what is absent, comparisons, clean subsets."""

import dataclasses
import json
import pathlib

import pytest

from gptjax import evaluate, train
from gptjax.configs import base, errors
from gptjax.evals import answers, contamination, fewshot, kept, report, suite
from gptjax.models import workdirs
from gptjax.sampling import loaded
from tests import helpers


@pytest.fixture(scope='module')
def run(tmp_path_factory, corpus_file) -> tuple[str, pathlib.Path]:
    """(config, workdir) of a tiny model that reads bytes, trained with a task in the loop."""
    folder = tmp_path_factory.mktemp('suite')
    config, workdir = helpers.prepared(folder, corpus_file)
    flags = (
        '--config.suite.tasks=("arithmetic_2d_plus", "piqa")',
        '--config.suite.limit=4',
        '--config.suite.n_ctx=32',
        '--config.suite.batch_tokens=256',
        f'--config.data_dir={_data(folder)}',
    )
    train.main(helpers.args(config, workdir, *flags))
    return config, workdir


def _data(folder: pathlib.Path) -> pathlib.Path:
    """Six items of PIQA."""
    (folder / 'data' / 'piqa').mkdir(parents=True, exist_ok=True)
    lines = [
        {'query': f'to {i}', 'choices': ['the cat', 'a dog runs'], 'gold': i % 2} for i in range(6)
    ]
    path = folder / 'data' / 'piqa' / 'validation.jsonl'
    path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
    return folder / 'data'


def _flags(run, data_dir: pathlib.Path, tasks: str = "'piqa', 'transposed_letters', 'rte'"):
    return (
        f'--config.init_from={run[1]}',
        f'--config.data_dir={data_dir}',
        f'--config.suite.tasks=({tasks},)',
        '--config.suite.k=(0, 1)',
        '--config.suite.seeds=(0, 1)',
        '--config.suite.limit=5',
        '--config.suite.batch_tokens=256',
    )


def _evaluate(run, workdir: pathlib.Path, *flags: str) -> list[dict]:
    evaluate.main(helpers.args(run[0], workdir, *flags))
    return report.read(workdir)


def test_training_scores_tasks(run):
    lines = (run[1] / 'metrics.jsonl').read_text().splitlines()
    scored = [row for row in map(json.loads, lines) if 'eval/piqa/0shot/accuracy' in row]
    assert scored
    assert 'eval/arithmetic_2d_plus/0shot/exact' in scored[-1]
    assert 'eval/tokens/bits_per_byte' in scored[-1]


def test_results_say_how_they_came_about(run, tmp_path, capsys):
    found = _evaluate(run, tmp_path / 'out', *_flags(run, _data(tmp_path)))
    row = next(r for r in found if (r['task'], r['k'], r['metric']) == ('piqa', 0, 'accuracy'))
    wanted = 'task k metric value stderr n protocol seed commit paper parameters train_flops'
    assert set(row) >= {*wanted.split(), 'n_straddles', 'n_truncated', 'n_dropped'}
    assert row['n'] == 5
    assert 'figure G.4' in row['protocol']
    several = [r for r in found if (r['task'], r['k'], r['metric']) == ('piqa', 1, 'accuracy')]
    assert [r['seed'] for r in several] == [0, 1, [0, 1]]
    assert 'seed_std' in several[-1]
    assert not any(r['task'] == 'rte' for r in found)
    table = (tmp_path / 'out' / 'results.md').read_text()
    assert '- rte, 0 shots: no ' in table
    assert '| piqa | 1 | accuracy |' in table
    assert (tmp_path / 'out' / 'in_context.png').stat().st_size > 10_000
    assert '| piqa | 0 |' in capsys.readouterr().out


def test_a_stopped_suite_goes_on_in_the_middle(run, tmp_path, monkeypatch):
    flags = _flags(run, _data(tmp_path), "'piqa'")
    whole = _evaluate(run, tmp_path / 'whole', *flags)
    _evaluate(run, tmp_path / 'cut', *flags)
    path = tmp_path / 'cut' / suite.ITEMS / 'piqa-1shot-seed0.jsonl'
    lines = path.read_text().splitlines()
    path.write_text('\n'.join(lines[:3]) + '\n' + lines[3][:20])
    asked = []
    plain = answers.Respondent.rows

    def counted(self, task, prompts, seed):
        asked.append(len(prompts))
        return plain(self, task, prompts, seed)

    monkeypatch.setattr(answers.Respondent, 'rows', counted)
    again = _evaluate(run, tmp_path / 'cut', *flags)
    assert asked == [3]  # of five, two were kept
    for one, other in zip(whole, again, strict=True):
        assert one['value'] == pytest.approx(other['value'], abs=1e-4)
    with pytest.raises(errors.InputError, match='items of another limit'):
        _evaluate(run, tmp_path / 'cut', *flags, '--config.suite.limit=4')
    monkeypatch.setattr(workdirs.Workdir, 'identity', lambda self: 'another')
    with pytest.raises(errors.InputError, match='items of another state'):
        _evaluate(run, tmp_path / 'cut', *flags)


def test_sampled_answers_are_of_seed_and_item_alone(run, tmp_path):
    """Whatever is generated side by side, and wherever it was stopped."""
    folder = tmp_path / 'data' / 'cnn_dailymail'
    folder.mkdir(parents=True)
    lines = [{'article': 'x' * (40 + 7 * i % 23), 'highlights': 'y'} for i in range(6)]
    (folder / 'test.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    task = fewshot.find('gpt2_cnn_dailymail')
    small = dataclasses.replace(task, max_new_tokens=8)
    config, workdir = run

    def texts(out: str, batch: int, seed: int = 0, keep: int = 0):
        flags = (
            f'--config.init_from={workdir}',
            f'--config.data_dir={tmp_path / "data"}',
            "--config.suite.tasks=('gpt2_cnn_dailymail',)",
            f'--config.suite.batch_prompts={batch}',
            f'--config.suite.seeds=({seed},)',
        )
        path = tmp_path / out / suite.ITEMS / f'gpt2_cnn_dailymail-0shot-seed{seed}.jsonl'
        if keep:
            path.write_text('\n'.join(path.read_text().split('\n')[: keep + 1]) + '\n')
        _evaluate((config, workdir), tmp_path / out, *flags)
        rows = map(json.loads, path.read_text().splitlines()[1:])
        return {row['i']: row['text'] for row in rows}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fewshot, 'find', lambda name: small)
        whole = texts('a', 8)
        assert len(set(whole.values())) > 1
        assert texts('b', 1) == whole
        assert texts('b', 1, keep=2) == whole
        assert texts('c', 2, seed=1) != whole


@pytest.mark.parametrize(
    ('flags', 'said'),
    [
        (('--config.suite.n_ctx=99999',), "is beyond the model's n_ctx"),
        (('--config.data_dir=nowhere',), 'is no folder'),
        (('--config.data_dir={data}',), 'validation.jsonl:1 is no JSON'),
    ],
)
def test_mistakes_in_tasks_of_a_training_show_before_its_first_step(run, tmp_path, flags, said):
    config, workdir = run
    path = tmp_path / 'data' / 'piqa' / 'validation.jsonl'
    path.parent.mkdir(parents=True)
    path.write_text('{broken')
    fresh = helpers.fresh(tmp_path / 'run', workdir)
    flags = [flag.format(data=tmp_path / 'data') for flag in flags]
    with pytest.raises(errors.InputError, match=said):
        train.main(helpers.args(config, fresh, "--config.suite.tasks=('piqa',)", *flags))
    assert not (fresh / 'metrics.jsonl').exists()


def test_a_metric_without_a_value_ends_no_training(run, tmp_path):
    """A correlation of one item is not defined."""
    config, workdir = run
    folder = tmp_path / 'data' / 'korsts'
    folder.mkdir(parents=True)
    line = {'sentence1': 'a', 'sentence2': 'b', 'score': 3.5}
    (folder / 'test.jsonl').write_text(json.dumps(line))
    fresh = helpers.fresh(tmp_path / 'run', workdir)
    flags = (
        "--config.suite.tasks=('korsts',)",
        f'--config.data_dir={tmp_path / "data"}',
        '--config.suite.n_ctx=0',
        '--config.model.n_ctx=512',
        '--config.batch.batch_tokens=8192',
        '--config.train.total_tokens=8192',
        '--config.optim.warmup_tokens=0',
    )
    train.main(helpers.args(config, fresh, *flags))
    results = json.loads((fresh / 'results.json').read_text())
    assert 'eval/tokens/bits_per_byte' in results
    assert not any('spearman' in name for name in results)


def test_a_long_text_goes_on_in_the_middle(run, tmp_path):
    (tmp_path / 'ptb').mkdir()
    text = "no it was n't black monday\n" * 60
    (tmp_path / 'ptb' / 'validation.jsonl').write_text(json.dumps({'text': text}))
    flags = (*_flags(run, tmp_path, "'ptb_valid'"), '--config.suite.batch_tokens=64')
    whole = _evaluate(run, tmp_path / 'cut', *flags)
    path = tmp_path / 'cut' / suite.ITEMS / 'ptb_valid-0shot-seed0.jsonl'
    lines = path.read_text().splitlines()
    assert len(lines) > 20  # windows, not one text
    path.write_text('\n'.join(lines[:9]) + '\n')
    again = _evaluate(run, tmp_path / 'cut', *flags)
    for one, other in zip(whole, again, strict=True):
        assert one['value'] == pytest.approx(other['value'], rel=1e-4)
        assert one['stderr'] > 0


def test_a_run_beside_another_is_compared(run, tmp_path):
    flags = _flags(run, _data(tmp_path), "'piqa'")
    _evaluate(run, tmp_path / 'a', *flags)
    beside = f'--config.suite.beside=("{tmp_path / "a"}",)'
    _evaluate(run, tmp_path / 'b', *flags, beside)
    table = (tmp_path / 'b' / 'results.md').read_text()
    assert '| piqa | 0 | accuracy | 5 | +0.00 | +0.00 to +0.00 | 1.000 |' in table


def test_the_report_is_whole_after_every_task_and_texts_are_kept_where_asked(
    run, tmp_path, monkeypatch
):
    flags = _flags(run, _data(tmp_path), "'piqa', 'rte'")
    told, plain = [], report.write

    def seen(workdir, *rest):
        paths = plain(workdir, *rest)
        told.append((workdir / report.TABLE).read_text())
        return paths

    monkeypatch.setattr(report, 'write', seen)
    _evaluate(run, tmp_path / 'out', *flags)
    assert [text.count('- piqa, 1 shots: not yet') for text in told] == [1, 1, 0, 0]
    assert all(text.count('- rte, 0 shots: no ') == 1 for text in told)
    path = tmp_path / 'out' / suite.ITEMS / 'piqa-1shot-seed0.jsonl'
    before = kept.read(path)
    _evaluate(run, tmp_path / 'out', *flags, '--config.suite.keep_texts=True')
    header, rows = kept.read(path)
    assert header == before[0]
    for row, old in zip(rows, before[1], strict=True):
        assert row == old | {'prompt': row['prompt'], 'answers': ['the cat', 'a dog runs']}
        assert row['prompt'].count('to ') == 2 - row['dropped']
        assert row['prompt'].endswith(f'to {row["i"]}')


def test_nothing_at_hand_is_an_error_not_a_zero(run, tmp_path, monkeypatch):
    monkeypatch.setattr(loaded, 'load', None)  # it shows before the weights are read
    with pytest.raises(errors.InputError, match='none of the tasks has data'):
        _evaluate(run, tmp_path / 'out', *_flags(run, _data(tmp_path), "'rte'"))
    with pytest.raises(errors.UsageError, match="no task 'piqaa'; did you mean 'piqa'"):
        _evaluate(run, tmp_path / 'out', *_flags(run, _data(tmp_path), "'piqaa'"))
    flags = _flags(run, tmp_path / 'nowhere', "'piqa'")
    with pytest.raises(errors.UsageError, match='is no folder'):
        _evaluate(run, tmp_path / 'out', *flags)


def test_items_found_in_the_corpus_are_left_out(run, tmp_path):
    corpus = run[1] / base.get_config().corpus.dir
    document = json.loads(next(corpus.glob('*.jsonl')).read_text().splitlines()[0])['text']
    inside = ' '.join(document.split()[3:23])
    outside = ' '.join(f'word{i}' for i in range(20))
    assert contamination.Overlaps([(inside, outside)], str(corpus)).dirty((inside, outside)) == [
        True,
        False,
    ]
    (tmp_path / 'piqa').mkdir()
    lines = [{'query': text, 'choices': ['a', 'b'], 'gold': 0} for text in (inside, outside)]
    (tmp_path / 'piqa' / 'validation.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    flags = (
        *_flags(run, tmp_path, "'piqa'"),
        '--config.suite.k=(0,)',
        f'--config.suite.clean_against={corpus}',
    )
    found = _evaluate(run, tmp_path / 'out', *flags)
    assert {row['n_clean'] for row in found} == {1}


def test_a_mistake_in_the_argument_is_one_line(tmp_path):
    done = helpers.run_program(
        'evaluate', '--config=experiments/gpt3/eval.py:tasks=piqa,k=two', f'--workdir={tmp_path}'
    )
    assert done.returncode == 2
    assert done.stderr.strip() == "error: k='two': numbers joined by +, as k=0+1"


def test_jobs_come_with_each_seed_once():
    config = base.get_config().suite
    config.update(tasks=('triviaqa', 'piqa', 'ptb_valid'), k=(0, -1), seeds=(0, 1))
    found = [(job.name, job.k, job.seed) for job in suite.jobs(suite.Config(**config))]
    assert found == [
        ('piqa', 0, 0),
        ('piqa', 50, 0),
        ('piqa', 50, 1),
        ('ptb_valid', 0, 0),
        ('triviaqa', 0, 0),
        ('triviaqa', 64, 0),
        ('triviaqa', 64, 1),
    ]
