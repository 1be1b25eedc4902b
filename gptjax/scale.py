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

from absl import flags

from gptjax.configs import cli, errors, sweep
from gptjax.runtime import jobs, program, verbs
from gptjax.storage import scratch
from gptjax.sweeps import points as points_lib
from gptjax.sweeps import running

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
    raise NotImplementedError


def _points(args: cli.Args) -> dict[str, points_lib.Point]:
    """The points of the command line's experiment."""
    import jax

    jax.config.update('jax_platforms', 'cpu')  # shapes alone: accelerators are the points'
    found = sweep.points(args.module, args.path, args.arg)
    return points_lib.of_sweep(args.config, found, args.workdir)


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


VERBS = {
    'points': verbs.Verb(points, reads=READS, needs_workdir=False),
    'run': verbs.Verb(run, _define_run, READS),
}

if __name__ == '__main__':
    verbs.run(VERBS, __doc__)
