# SPDX-License-Identifier: Apache-2.0
"""The points of a sweep as runs: what each trains, in which folder, at what cost.

ROOT/sweep.json        what the points are, and what made them
ROOT/configs/NAME.json the whole config of a point
ROOT/points/NAME/      its workdir
ROOT/logs/NAME.txt     what it said
ROOT/prepared.json     what made the tokens in ROOT
Relative folders of tokens are ROOT's, and all points share them.
"""

import pathlib
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_collections

from gptjax.configs import base, errors, sweep
from gptjax.models import counts, heads
from gptjax.runtime import jobs, program
from gptjax.storage import buckets, documents

SWEEP = 'sweep.json'
_PREPARED = 'prepared.json'
LAST_PREPARED = 'prepare_tokens'
_PREPARING = {
    'prepare_corpus': 'corpus',
    'train_tokenizer': 'tokenizer',
    'prepare_tokens': 'tokens',
}
_AGAIN = 'give --config=<experiment with a sweep()>'


class Point(NamedTuple):
    """One run of a sweep.

    Attributes:
      tokens: of training, up to its end.
      begins: tokens that another point has trained before it; 0 = it begins by itself.
      memory: bytes it takes on a CPU, about.
    """

    name: str
    config: ml_collections.ConfigDict
    counts: counts.Counts
    tokens: int
    begins: int
    memory: float
    after: frozenset[str]

    @property
    def is_counted(self) -> bool:
        """Whether it is an n-gram model."""
        return self.config.model.family == 'ngram'

    @property
    def flops(self) -> float:
        """That remain to be spent on it, once what it begins with is there."""
        return self.counts.flops_per_token * (self.tokens - self.begins)


def of_sweep(
    config: ml_collections.ConfigDict, found: Mapping[str, sweep.Overrides], root: str
) -> dict[str, Point]:
    """The points, cheapest first.

    Args:
      config: that they override.
      found: of configs.sweep.points().
      root: the folder of the sweep.

    Raises:
      UsageError: a point's config is wrong; the message names the point.
    """
    wanted: dict[str, set[int]] = {name: set() for name in found}
    for each in found.values():
        if began := sweep.origin(each):
            wanted[began.point].add(began.step)
    points = {}
    for name, overrides in found.items():
        try:
            points[name] = _point(name, config, overrides, root, wanted[name])
        except errors.UsageError as e:
            raise errors.UsageError(f'point {name}: {e}') from e
    for point in points.values():
        for before in point.after:
            _check_before(point, points[before])
    return dict(sorted(points.items(), key=lambda item: (_to_end(item[1], points), item[0])))


def folder(root: buckets.Anywhere, name: str) -> Any:
    """The workdir of a point."""
    return root / 'points' / name


def config_path(root: buckets.Anywhere, name: str) -> Any:
    """Where the config of a point stands."""
    return root / 'configs' / f'{name}.json'


def log_path(root: pathlib.Path, name: str) -> pathlib.Path:
    """What a point's run said, all of its tries."""
    return root / 'logs' / f'{name}.txt'


def write(root: buckets.Anywhere, points: Mapping[str, Point], made_by: Mapping[str, Any]) -> None:
    """Writes sweep.json and the configs, those alone that are not there as they are."""
    for name, point in points.items():
        _write_new(config_path(root, name), base.plain(point.config))
    said = {
        name: {
            'tokens': point.tokens,
            'least': least_tokens(point.config),
            'begins': point.begins,
            'flops': point.flops,
            'after': sorted(point.after),
            **point.counts._asdict(),
        }
        for name, point in points.items()
    }
    _write_new(root / SWEEP, {**made_by, 'commit': program.commit(), 'points': said})


def least_tokens(config: ml_collections.ConfigDict | Mapping[str, Any]) -> int:
    """What a run of a config has read at its end, at least: it ends after a whole step."""
    counted = config['model']['family'] == 'ngram'
    a_step = config['model']['n_ctx'] if counted else config['batch']['batch_tokens']
    return max(1, total_tokens(config) - a_step + 1)


def total_tokens(config: ml_collections.ConfigDict | Mapping[str, Any]) -> int:
    """The length of its training; of an n-gram model what is counted, 0 = all there is."""
    counted = config['model']['family'] == 'ngram'
    return config['ngram' if counted else 'train']['total_tokens']


def read(root: buckets.Anywhere) -> dict[str, Any]:
    """sweep.json. Raises Damaged where it is not there, or not what was written."""
    return documents.read(root / SWEEP, dict, _AGAIN, ('points',))


def jobs_of(
    points: Mapping[str, Point], root: pathlib.Path, config: ml_collections.ConfigDict
) -> list[jobs.Job]:
    """What runs the points, and what prepares their tokens where these are to stand in ROOT."""
    preparing = _preparing(root, config)
    first = frozenset(job.name for job in preparing)
    running = [
        jobs.Job(
            name,
            _command('count_ngrams' if point.is_counted else 'train', root, name),
            _to_end(point, points),
            point.memory,
            point.after | first,
            log_path(root, name),
        )
        for name, point in points.items()
    ]
    return preparing + running


def _point(
    name: str,
    config: ml_collections.ConfigDict,
    overrides: sweep.Overrides,
    root: str,
    kept: set[int],
) -> Point:
    began = sweep.origin(overrides)
    if began:
        where = f'{root}/points/{began.point}@{began.step}'
        overrides = {'init_state': 'whole', **overrides, 'init_from': where}
    changed = sweep.apply(config, overrides)
    with changed.unlocked():
        _share_tokens(changed)
        changed.checkpoint.keep_steps = tuple(sorted({*changed.checkpoint.keep_steps, *kept}))
    model = heads.configure(changed.model)
    batch = changed.batch.batch_tokens
    errors.require(
        changed.train.total_tokens > 0 or changed.model.family == 'ngram',
        'train.total_tokens = 0: the points of a sweep are as long as tokens say, not epochs',
    )
    whole = began is not None and changed.init_state == 'whole'
    return Point(
        name,
        changed.lock(),
        counts.of(model),
        total_tokens(changed),
        began.step * batch if began and whole else 0,
        counts.memory(model, batch),
        frozenset({began.point} if began else ()),
    )


def _check_before(point: Point, before: Point) -> None:
    """Raises UsageError where a point begins behind the end of the other, or behind its own."""
    errors.require(
        point.begins < min(before.tokens + 1, point.tokens),
        f'point {point.name} begins at {point.begins:,} tokens of {before.name}, which ends at '
        f'{before.tokens:,}, and is itself {point.tokens:,} long',
    )


def _to_end(point: Point, points: Mapping[str, Point]) -> float:
    """FLOPs from nothing to its end: one that begins with another is never before it."""
    before = (_to_end(points[name], points) for name in point.after)
    return point.flops + max(before, default=0.0)


def _share_tokens(config: ml_collections.ConfigDict) -> None:
    """Makes ROOT's of the folders that are relative to a workdir."""

    def shared(name: str) -> str:
        elsewhere = '://' in name or pathlib.PurePath(name).is_absolute() or not name
        return name if elsewhere else f'../../{name}'

    config.data.sets = tuple(map(shared, config.data.sets))
    config.tokenizer.dir = shared(config.tokenizer.dir)
    for label, name in config.data.eval_sets.items():
        config.data.eval_sets[label] = shared(name)


def note_prepared(root: pathlib.Path, config: ml_collections.ConfigDict) -> None:
    """Writes down that the tokens in ROOT are those of a config."""
    _write_new(root / _PREPARED, _made_by(config))


def _made_by(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """What makes the tokens of a config what they are."""
    plain = base.plain(config)
    return {section: plain[section] for section in _PREPARING.values()}


def _preparing(root: pathlib.Path, config: ml_collections.ConfigDict) -> list[jobs.Job]:
    """The programs that make the tokens, one after another.

    None where others' tokens are named, or where these were made by this config; of another one
    the programs say what is to be done.
    """
    path, wanted = root / _PREPARED, documents.text(_made_by(config))
    there = path.exists() and path.read_bytes() == wanted.encode()
    if tuple(config.data.sets) != (config.tokens.dir,) or there:
        return []
    found: list[jobs.Job] = []
    for name in _PREPARING:
        before = frozenset(job.name for job in found[-1:])
        command = _command(name, root, '', root)
        found.append(jobs.Job(name, command, -1.0, 0.0, before, log_path(root, name)))
    return found


def _command(
    program_: str, root: pathlib.Path, name: str, workdir: pathlib.Path | None = None
) -> list[str]:
    config = config_path(root, name) if name else root / base.OF_RUN
    where = workdir or folder(root, name)
    return [sys.executable, '-m', f'gptjax.{program_}', f'--config={config}', f'--workdir={where}']


def _write_new(path: buckets.Anywhere, content: Mapping[str, Any]) -> None:
    text = documents.text(content)
    if not path.exists() or path.read_bytes() != text.encode():
        path.parent.mkdir(parents=True, exist_ok=True)
        documents.write(path, content)
