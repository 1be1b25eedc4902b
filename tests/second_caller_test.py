# SPDX-License-Identifier: Apache-2.0
"""A second program on the loop: all that a run is comes with it, and it stays short."""

import contextlib
import json
import pathlib
import shutil

import pytest

from gptjax.configs import cli, errors
from gptjax.runtime import checkpoint, clock, metrics, program, scores
from tests import classifier

CONFIG = """
from gptjax.configs import base

def get_config(arg=None):
    config = base.get_config()
    config.optim = base.optim('epochs', peak_lr=0.05, warmup_epochs=0.5, schedule='linear')
    config.train.update(total_tokens=0, total_epochs=6.0, log_every_steps=1, eval_every_steps=7)
    config.checkpoint.update(every_steps=10, every_secs=0.0, keep_steps=(3, 13),
                             keep_best='eval/made/accuracy', best_is='highest')
    return config.lock()
"""
STEPS = 60  # 6 epochs of 160 in batches of 16


def args_of(tmp_path: pathlib.Path, workdir: str, *flags: str) -> cli.Args:
    path = tmp_path / 'config.py'
    path.write_text(CONFIG)
    argv = ['classifier', f'--config={path}', f'--workdir={tmp_path / workdir}', *flags]
    return cli.parse(argv)


def arrays_of(workdir: pathlib.Path) -> list[str]:
    """Of the newest checkpoint, by their hashes."""
    folder, meta = checkpoint.latest(workdir)
    assert meta['step'] == STEPS
    manifest = json.loads((folder / 'manifest.json').read_text())
    return sorted(f'{n} {h}' for n, h in manifest.items() if n.split('/')[-1][0].isdigit())


@pytest.fixture(scope='module')
def whole(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp('classifier')
    classifier.main(args_of(folder, 'whole'))
    return folder / 'whole'


def test_it_is_short():
    assert len(pathlib.Path(classifier.__file__).read_text().splitlines()) < 120


def test_it_learns_and_logs_what_its_loss_says(whole):
    rows = metrics.read(whole)
    assert [row['step'] for row in rows] == list(range(1, STEPS + 1))
    assert rows[-1]['train/accuracy'] > 0.8 > 0.5 > rows[0]['train/accuracy']
    rates = [row['opt/lr'] for row in rows]
    assert rates[0] == pytest.approx(0.05 / 5)  # half an epoch is five steps
    assert max(rates) == rates[4] == pytest.approx(0.05)
    assert rates[-1] == pytest.approx(0.05 * 0.1)
    results = json.loads((whole / 'results.json').read_text())
    assert (results['steps'], results['tokens']) == (STEPS, STEPS * 16 * 12)
    assert 'commit' in results
    before = (whole / 'metrics.jsonl').read_text()
    classifier.main(args_of(whole.parent, 'whole'))
    assert (whole / 'metrics.jsonl').read_text() == before


def test_the_best_and_some_steps_are_kept_beside_the_newest(whole):
    scored = {
        row['step']: row['eval/made/accuracy']
        for row in metrics.read(whole)
        if 'eval/made/accuracy' in row
    }
    assert list(scored) == [7, 14, 21, 28, 35, 42, 49, 56, 60]
    first_best = next(step for step, value in scored.items() if value == max(scored.values()))
    assert checkpoint.best(whole) == (first_best, 'eval/made/accuracy', max(scored.values()))
    kept = {int(p.name) for p in (whole / 'checkpoints').iterdir() if p.name.isdigit()}
    newest = set(sorted(kept)[-2:])
    assert kept == {3, 13, first_best} | newest
    assert 60 in newest


def test_the_best_alone_is_kept_beside_the_newest(tmp_path):
    flags = ('--config.checkpoint.keep_steps=()',)
    classifier.main(args_of(tmp_path, 'run', *flags, '--config.train.total_epochs=3.0'))
    best = checkpoint.best(tmp_path / 'run')
    kept = {int(p.name) for p in (tmp_path / 'run' / 'checkpoints').iterdir()}
    assert kept == {best.step, *sorted(kept)[-2:]}
    assert len(kept) == (2 if best.step in sorted(kept)[-2:] else 3)
    scored = {r['step']: r.get(best.name, 0.0) for r in metrics.read(tmp_path / 'run')}
    assert best.value == scored[best.step] == max(scored.values())


def test_what_was_best_before_a_rollback_is_best_only_if_it_is_kept(tmp_path):
    classifier.main(args_of(tmp_path, 'run', '--config.train.total_epochs=3.0'))
    best = checkpoint.best(tmp_path / 'run')
    back = checkpoint.Checkpoints(tmp_path / 'run', 2)
    back.drop_after(best.step)
    assert checkpoint.best(tmp_path / 'run') == best
    back.drop_after(best.step - 1)
    back.close()
    again = checkpoint.best(tmp_path / 'run')
    assert again is None or again.step < best.step


def test_stopped_anywhere_it_goes_on_bit_equal(whole, tmp_path, monkeypatch):
    """Before and behind saves and evaluations, and between the two."""
    stops = [1, 6, 7, 10, 13, 14, 20, 41, 42, 59, STEPS]
    reached = []
    monkeypatch.setattr(program, 'stop_requested', lambda: bool(stops) and reached[-1] >= stops[0])
    push = metrics.Writer.write

    def noted(self, step, *rest):
        reached.append(step)
        push(self, step, *rest)

    monkeypatch.setattr(metrics.Writer, 'write', noted)
    reached.append(0)
    while stops:
        with contextlib.suppress(program.Preempted):
            classifier.main(args_of(tmp_path, 'stopped'))
        stops.pop(0)
    classifier.main(args_of(tmp_path, 'stopped'))
    assert arrays_of(tmp_path / 'stopped') == arrays_of(whole)
    rows = [
        [(r['step'], r['train/loss'], r.get('eval/made/accuracy')) for r in metrics.read(w)]
        for w in (tmp_path / 'stopped', whole)
    ]
    assert rows[0] == rows[1]
    assert checkpoint.best(tmp_path / 'stopped') == checkpoint.best(whole)


def test_killed_between_a_save_and_its_evaluation(whole, tmp_path, monkeypatch):
    """The checkpoint is there, the score is made up for."""

    class Killed(BaseException):
        pass

    def scores(self, *rest, **kwargs):
        raise Killed

    flags = ('--config.checkpoint.every_steps=7',)
    monkeypatch.setattr(classifier.recipe_lib.Evaluation, 'scores', property(lambda self: scores))
    with pytest.raises(Killed):
        classifier.main(args_of(tmp_path, 'killed', *flags))
    monkeypatch.undo()
    assert checkpoint.latest(tmp_path / 'killed')[1]['step'] == 7
    assert 'eval/made/accuracy' not in metrics.read(tmp_path / 'killed')[-1]
    classifier.main(args_of(tmp_path, 'killed', *flags))
    assert arrays_of(tmp_path / 'killed') == arrays_of(whole)
    scored = [
        row['step'] for row in metrics.read(tmp_path / 'killed') if 'eval/made/accuracy' in row
    ]
    assert scored == [7, 14, 21, 28, 35, 42, 49, 56, 60]
    assert checkpoint.best(tmp_path / 'killed')[1:] == checkpoint.best(whole)[1:]


_LATER = (
    pytest.param(name, marks=pytest.mark.slow)
    for name in ('documents.write', 'Checkpoints.is_best')
)


@pytest.mark.parametrize('moment', ['scores.write', *_LATER])
def test_killed_while_a_score_is_kept(whole, tmp_path, monkeypatch, moment):
    """The first time that it comes to this, when it goes on the second time, and so on."""

    class Killed(BaseException):
        pass

    owner, name = {
        'scores.write': (scores, 'write'),
        'documents.write': (scores.documents, 'write'),
        'Checkpoints.is_best': (checkpoint.Checkpoints, 'is_best'),
    }[moment]
    plain, left = getattr(owner, name), [0]

    def dying(*given):
        left[0] -= 1
        if not left[0]:
            raise Killed
        return plain(*given)

    monkeypatch.setattr(owner, name, dying)
    for patience in range(1, 40):
        left[0] = patience
        try:
            classifier.main(args_of(tmp_path, 'run'))
            break
        except Killed:
            continue
    assert left[0] > 0, 'it does not come to an end'
    assert patience > 3
    monkeypatch.undo()
    assert arrays_of(tmp_path / 'run') == arrays_of(whole)
    assert checkpoint.best(tmp_path / 'run')[1:] == checkpoint.best(whole)[1:]


def test_a_damaged_score_is_a_missing_one(whole, tmp_path, caplog):
    shutil.copytree(whole, tmp_path / 'run')
    best = checkpoint.best(whole)
    for damage in ('', '{', '[1]', '{"eval/made/accuracy": "x"}', '{"eval/made/accuracy": null}'):
        path = tmp_path / 'run' / 'checkpoints' / f'{best.step:08d}' / scores.NAME
        path.write_text(damage)
        found = checkpoint.best(tmp_path / 'run')
        assert found is None or found.step != best.step
        assert 'cannot be read' in caplog.text
        caplog.clear()


def test_the_best_by_an_earlier_mark_stays_the_best(whole, tmp_path):
    """Before checkpoints kept their scores, best.json beside them named one."""
    shutil.copytree(whole, tmp_path / 'run')
    folder = tmp_path / 'run' / 'checkpoints'
    best = checkpoint.best(whole)
    for path in folder.glob(f'*/{scores.NAME}'):
        path.unlink()
    assert checkpoint.best(tmp_path / 'run') is None
    for damage in ('', '[]', '{}', '{"step": 3}'):
        (folder / 'best.json').write_text(damage)
        assert checkpoint.best(tmp_path / 'run') is None
    (folder / 'best.json').write_text(json.dumps(best._asdict()))
    assert checkpoint.best(tmp_path / 'run') == best
    kept = checkpoint.Checkpoints(tmp_path / 'run', 1, rule=scores.Rule(best.name, True))
    assert not kept.is_best({best.name: best.value})
    assert kept.is_best({best.name: best.value + 0.01})
    kept._prune()
    kept.close()
    left = {int(p.name) for p in folder.iterdir() if p.name.isdigit()}
    assert left == {best.step, STEPS}


def test_a_mistake_in_an_evaluation_costs_no_step(tmp_path, monkeypatch):
    def scores(state, check):
        raise errors.InputError('the held-out file went away')

    monkeypatch.setattr(classifier.recipe_lib.Evaluation, 'scores', property(lambda self: scores))
    with pytest.raises(errors.InputError, match='went away'):
        classifier.main(args_of(tmp_path, 'run'))
    assert checkpoint.latest(tmp_path / 'run')[1]['step'] == 7


def test_a_missing_score_is_missing(tmp_path, monkeypatch):
    evaluation = classifier.recipe_lib.Evaluation
    monkeypatch.setattr(
        classifier.recipe_lib,
        'Evaluation',
        lambda names, scores: evaluation(
            [*names, 'eval/made/spearman'],
            lambda s, check: {**scores(s, check), 'eval/made/spearman': None},
        ),
    )
    classifier.main(args_of(tmp_path, 'run', '--config.train.total_epochs=1.0'))
    results = json.loads((tmp_path / 'run' / 'results.json').read_text())
    assert 'eval/made/accuracy' in results
    assert 'eval/made/spearman' not in results


def test_what_a_stop_has_cost_is_no_training_time(tmp_path, monkeypatch):
    """The evaluation that is caught up with is not of a step."""
    plain = classifier.recipe_lib.Evaluation
    reached, now = [0], [0.0]

    def slow(names, scores):
        def scored(state, check):
            now[0] += 1000.0
            return scores(state, check)

        return plain(names, scored)

    monkeypatch.setattr(classifier.recipe_lib, 'Evaluation', slow)
    monkeypatch.setattr(clock.time, 'monotonic', lambda: now[0])
    monkeypatch.setattr(program, 'stop_requested', lambda: reached[-1] >= 7)
    push = metrics.Writer.write

    def noted(self, step, *rest):
        reached.append(step)
        push(self, step, *rest)

    monkeypatch.setattr(metrics.Writer, 'write', noted)
    flags = ('--config.train.total_epochs=1.0',)
    with pytest.raises(program.Preempted):
        classifier.main(args_of(tmp_path, 'run', *flags))
    monkeypatch.setattr(program, 'stop_requested', lambda: False)
    classifier.main(args_of(tmp_path, 'run', *flags))
    assert now[0] >= 2000.0
    assert json.loads((tmp_path / 'run' / 'results.json').read_text())['train_secs'] < 1000.0


def test_frozen_parameters_stay_without_moments(tmp_path):
    flags = ('--config.optim.frozen=("embed*",)', '--config.train.total_epochs=1.0')
    classifier.main(args_of(tmp_path, 'run', *flags))
    folder, meta = checkpoint.latest(tmp_path / 'run')
    assert any("['params']['embedding']" in name for name in meta['shapes'])
    assert not any("['mu']['embedding']" in name for name in meta['shapes'])
    again = args_of(tmp_path, 'run', *flags, '--config.train.total_epochs=2.0')
    with pytest.raises(errors.InputError, match='total_epochs = 1.0 there, 2.0 here'):
        classifier.main(again)
    with pytest.raises(errors.UsageError, match="no parameter is named 'embeding'"):
        classifier.main(args_of(tmp_path, 'x', '--config.optim.frozen=("embeding",)'))
    with pytest.raises(errors.UsageError, match='leaves nothing to train'):
        classifier.main(args_of(tmp_path, 'x', '--config.optim.frozen=("*",)'))


def test_a_best_by_no_score_is_told_before_the_first_step(tmp_path):
    with pytest.raises(
        errors.UsageError, match='is no score of this run; there are: eval/made/acc'
    ):
        classifier.main(args_of(tmp_path, 'x', '--config.checkpoint.keep_best=eval/made/f1'))
    assert not (tmp_path / 'x' / 'checkpoints').exists()
