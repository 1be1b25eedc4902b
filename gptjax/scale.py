# SPDX-License-Identifier: Apache-2.0
"""Scaling laws: sweeps of runs, their table, fits with intervals, predictions that are scored.

Laptop:
  python -m gptjax.scale run --config=experiments/scaling/isoflop.py --workdir=runs/isoflop
  python -m gptjax.scale collect --workdir=runs/isoflop
  python -m gptjax.scale fit --workdir=runs/isoflop --approach=3
TPU VM: the same, over points that were launched, with --workdir=gs://bucket/isoflop; fits need no
accelerator.
"""

import logging
import pathlib

import jax
import ml_collections
from absl import flags

from gptjax.configs import base, cli, errors, sweep
from gptjax.models import counts, heads
from gptjax.runtime import jobs, program, results, verbs
from gptjax.scaling import bootstrap, fits, parametric, table, told
from gptjax.storage import buckets, scratch
from gptjax.sweeps import collecting, fitting, predictions, running, states
from gptjax.sweeps import points as points_lib

READS = (
    'seed',
    'init_from',
    'init_state',
    'data_dir',
    'corpus',
    'tokenizer',
    'tokens',
    'data',
    'model',
    'ngram',
    'batch',
    'optim',
    'train',
    'evaluate',
    'suite',
    'checkpoint',
    'mesh',
)
_log = logging.getLogger('gptjax')


def points(args: cli.Args) -> None:
    """Lists the points of an experiment's sweep: sizes, lengths, FLOPs; runs nothing."""
    found = _points(args)
    total = sum(point.flops for point in found.values())
    for name, point in found.items():
        n = point.counts.parameters
        print(f'{name:40} N {n:>12,} D {point.tokens:>14,} FLOPs {point.flops:.3g}')
    print(f'{len(found)} points, {total:.3g} FLOPs')


def run(args: cli.Args) -> None:
    """Runs a sweep's points on this machine, side by side, the cheapest first.

    What is done is skipped, what was stopped or broke goes on, what fails is tried once more. The
    corpus, the tokenizer and the tokens are made first where they are not there. Ctrl-C stops all.
    """
    root = pathlib.Path(args.workdir)
    errors.require(
        scratch.origin(root) == root, f'--workdir={args.workdir}: points run here write to a disk'
    )
    room = jobs.room(args.flags.cores_a_point, args.flags.at_once)
    found = _points(args)
    root.mkdir(parents=True, exist_ok=True)
    with program.only_one(root / 'points'):
        points_lib.write(root, found, {'config': args.path})
        running.run(found, root, args.config, room)
    _log.info('all points are done; python -m gptjax.scale collect --workdir=%s', root)


def status(args: cli.Args) -> None:
    """Shows how far the points of a sweep are, whoever runs them."""
    root = _root(args)
    for name, wanted in points_lib.read(root)['points'].items():
        look = states.look(root, name, wanted)
        loss = f'loss {look.loss:.4f}' if look.loss == look.loss else ''
        done = f'{look.tokens:>14,} of {wanted["tokens"]:,} tokens'
        print(f'{name:40} {look.state:9} {done} {loss} {look.why}'.rstrip())


def collect(args: cli.Args) -> None:
    """Makes one table, CSV and Parquet, of all runs of a sweep, finished or not.

    --runs adds other sweeps, and workdirs by themselves, each by the name of its folder.
    """
    root = _root(args)
    runs = collecting.workdirs(root)
    for name in args.flags.runs:
        more = scratch.origin(scratch.here(name))
        runs |= collecting.workdirs(more) or {pathlib.PurePath(name).name: more}
    errors.require(
        bool(runs), f'{root} holds no sweep, and --runs names no workdirs: nothing to collect'
    )
    rows = collecting.collect(runs, root, args.flags.label)
    collecting.write(rows, root)
    done = sum(row.final for row in rows)
    _log.info('%s: %d rows, %d of %d runs done', root / collecting.CSV, len(rows), done, len(runs))


def fit(args: cli.Args) -> None:
    """Fits a law to a sweep's table, or to any, with intervals by the bootstrap.

    Approaches: 1, 2 and 3 of Hoffmann et al. 2022; kaplan, the joint form of Kaplan et al. 2020;
    n, d and c, the loss over parameters, tokens, or FLOPs where it is lowest.
    """
    given = args.flags
    approach = given.approach
    options = fits.Options(
        approach,
        objective=given.objective,
        method=given.method,
        law=given.law,
        unit=given.unit,
        samples=given.samples,
        seed=given.seed,
        budgets=_numbers('budgets', given.budgets),
        allow_wide=given.allow_wide,
    )
    result = fitting.fit(_given(args), options, given.drop_highest)
    out = pathlib.Path(given.out) if given.out else fitting.path_of(_root(args), approach)
    fitting.write(result, out)
    print(told.of_fit(result))
    for warning in result['warnings']:
        _log.warning('%s', warning)
    _log.info('written: %s', out)


def predict(args: cli.Args) -> None:
    """Predicts the loss of a run before it is made, with intervals, and writes that down.

    Of --n and --d, or of the run that --config describes.
    """
    given, root = args.flags, _root(args)
    fitted = fitting.read(pathlib.Path(given.fit) if given.fit else fitting.path_of(root, '3'))
    count = fitted.get('parameters_counted') or 'all'
    if given.n or given.d:
        whole = 0 < given.n < float('inf') and 0 < given.d < float('inf')
        errors.require(whole, 'give both --n and --d, above 0, or --config of a run')
        n, d = given.n, given.d
    else:
        errors.require(args.path != base.__file__, 'give --n and --d, or --config of a run')
        size = _counts(args.config)
        n, d = getattr(size, _ATTRIBUTES[count]), float(args.config.train.total_tokens)
    run = scratch.origin(scratch.here(given.run)) if given.run else None
    name = given.name or f'n={n:.3g},d={d:.3g}'
    said = predictions.predict(fitted, n, d, name, run)
    path = predictions.write(root, said)
    if not said['made_before_run']:
        _log.warning('%s began %s: marked as made after that', run, said['run_began'])
    low, high = said['intervals']['90']
    print(f'{name}: {said["value"]:.4f} nats a token, 90 % from {low:.4f} to {high:.4f}')
    _log.info('written: %s', path)


def score(args: cli.Args) -> None:
    """Compares a prediction with the run that was made since."""
    given, root = args.flags, _root(args)
    said = predictions.read(root, given.name)
    run = given.run or said['run']
    errors.require(bool(run), f'give --run=<workdir>: {given.name} does not say for which it is')
    workdir = scratch.origin(scratch.here(run))
    row = collecting.ended(workdir, given.label)
    count = said['fit'].get('parameters_counted') or 'all'
    outcome = {
        'n': getattr(row, fitting.COUNTS[count]),
        'd': row.d,
        'loss': row.loss,
        'began': results.began(workdir),
    }
    print(predictions.table([predictions.score(root, said, outcome, run)]), end='')


def plot(args: cli.Args) -> None:
    """Draws the sweep, its fits and its predictions as PNG and SVG, and writes report.md.

    Of everything there are data for, or of what --pictures names.
    """
    from gptjax.sweeps import report  # matplotlib is slow to begin

    root = _root(args)
    _log.info('written in %s: %s', root, ', '.join(report.write(root, args.flags.pictures)))


def _numbers(flag: str, given: list[str]) -> tuple[float, ...]:
    """The numbers of a flag. Raises UsageError where one is none, or not above 0."""
    found = []
    for text in given:
        try:
            found.append(float(text))
        except ValueError:
            found.append(0.0)
        errors.require(
            0 < found[-1] < float('inf'), f'--{flag}: {text!r} is no number above 0, as 1e18'
        )
    return tuple(found)


def _root(args: cli.Args) -> buckets.Anywhere:
    """The folder of the sweep, where it really is."""
    return scratch.origin(args.workdir)


def _usual_count(approach: str) -> str:
    """Kaplan et al. leave embeddings out, Hoffmann et al. do not."""
    return 'non_embedding' if approach in ('kaplan', 'n') else 'all'


def _given(args: cli.Args) -> fitting.Given:
    """What is to be fitted: a table that is named, or the sweep's."""
    given = args.flags
    where = [condition for condition in given.where if condition]
    if given.table:
        return fitting.others(pathlib.Path(given.table), table.parse_columns(given.columns), where)
    errors.require(not given.columns, '--columns are those of --table=<file>')
    local = scratch.need(pathlib.Path(args.workdir) / collecting.CSV)
    errors.require(
        local.exists(), f'{local} is missing: python -m gptjax.scale collect makes it, or --table'
    )
    count = given.count or _usual_count(given.approach)
    return fitting.swept(local, given.approach, count, where, given.allow_mixed)


def _counts(config: ml_collections.ConfigDict) -> counts.Counts:
    _keep_off_accelerators()
    return counts.of(heads.configure(config.model))


def _points(args: cli.Args) -> dict[str, points_lib.Point]:
    """The points of the command line's experiment."""
    _keep_off_accelerators()
    found = sweep.points(args.module, args.path, args.arg)
    return points_lib.of_sweep(args.config, found, args.workdir)


def _keep_off_accelerators() -> None:
    """Shapes are all that is asked of JAX here: accelerators are for the points."""
    jax.config.update('jax_platforms', 'cpu')


def _define_run(values: flags.FlagValues) -> None:
    flags.DEFINE_integer(
        'cores_a_point',
        1,
        'Cores of each point; 0 = all, for one point at a time.',
        lower_bound=0,
        flag_values=values,
    )
    flags.DEFINE_integer(
        'at_once', 0, 'Points side by side, at most; 0 = by cores and memory.', flag_values=values
    )


def _define_collect(values: flags.FlagValues) -> None:
    flags.DEFINE_list('runs', [], 'More workdirs, here or gs://.', flag_values=values)
    _define_label(values)


def _define_label(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        'label', '', 'Of the held-out set; the first by default.', flag_values=values
    )


def _define_fit(values: flags.FlagValues) -> None:
    one, text, whole = flags.DEFINE_enum, flags.DEFINE_string, flags.DEFINE_integer
    one('approach', _USUAL.approach, list(fits.APPROACHES), 'What is fitted.', flag_values=values)
    one(
        'objective',
        _USUAL.objective,
        parametric.OBJECTIVES,
        'What is minimised.',
        flag_values=values,
    )
    one('method', _USUAL.method, parametric.METHODS, 'How.', flag_values=values)
    one('law', _USUAL.law, fits.LAWS_OF_ONE, 'Of approaches n, d and c.', flag_values=values)
    text('table', '', "A CSV or Parquet file of runs; the sweep's by default.", flag_values=values)
    text('columns', '', 'Its columns: name=,n=,d=,c=,loss=, as d=c/6/n.', flag_values=values)
    flags.DEFINE_list('where', [], 'Rows: column=value, != < > <= >=.', flag_values=values)
    one('count', None, list(fitting.COUNTS), 'What N counts.', flag_values=values)
    whole('drop_highest', 0, 'Rows of the highest losses left out.', flag_values=values)
    one('unit', _USUAL.unit, bootstrap.UNITS, 'What the bootstrap draws.', flag_values=values)
    whole('samples', _USUAL.samples, 'Of the bootstrap.', flag_values=values)
    whole('seed', _USUAL.seed, 'Of the bootstrap.', flag_values=values)
    flags.DEFINE_list('budgets', [], 'FLOPs to tell the optimum at.', flag_values=values)
    flags.DEFINE_bool('allow_wide', False, 'Numbers known to no factor of 10.', flag_values=values)
    flags.DEFINE_bool('allow_mixed', False, 'Runs of different commits.', flag_values=values)
    text('out', '', 'Where the result goes; WORKDIR/fit_<approach>.json.', flag_values=values)


def _define_predict(values: flags.FlagValues) -> None:
    flags.DEFINE_float('n', 0.0, "Parameters, by the fit's count.", flag_values=values)
    flags.DEFINE_float('d', 0.0, 'Tokens.', flag_values=values)
    flags.DEFINE_string('fit', '', 'WORKDIR/fit_3.json by default.', flag_values=values)
    flags.DEFINE_string('name', '', 'Of the prediction.', flag_values=values)
    flags.DEFINE_string('run', '', 'The workdir it is for.', flag_values=values)


def _define_score(values: flags.FlagValues) -> None:
    flags.DEFINE_string('name', '', 'Of the prediction.', flag_values=values)
    flags.DEFINE_string('run', '', "The run's workdir.", flag_values=values)
    _define_label(values)


def _define_plot(values: flags.FlagValues) -> None:
    flags.DEFINE_list('pictures', [], 'Some of them by name; all by default.', flag_values=values)


_ATTRIBUTES = {'all': 'parameters', 'non_embedding': 'non_embedding', 'with_head': 'with_head'}
_USUAL = fits.Options('3')
_ANY = base.__file__  # where no experiment is wanted
VERBS = {
    'points': verbs.Verb(points, reads=READS, needs_workdir=False),
    'run': verbs.Verb(run, _define_run, READS),
    'status': verbs.Verb(status, default_config=_ANY),
    'collect': verbs.Verb(collect, _define_collect, default_config=_ANY),
    'fit': verbs.Verb(fit, _define_fit, default_config=_ANY, needs_workdir=False),
    'predict': verbs.Verb(predict, _define_predict, READS, _ANY),
    'score': verbs.Verb(score, _define_score, default_config=_ANY),
    'plot': verbs.Verb(plot, _define_plot, default_config=_ANY),
}

if __name__ == '__main__':
    verbs.run(VERBS, __doc__)
