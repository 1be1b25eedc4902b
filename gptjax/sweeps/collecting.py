# SPDX-License-Identifier: Apache-2.0
"""Workdirs into one table: a row for each evaluation of each run, and one for each run without.

ROOT/table.csv and, where pyarrow is installed, ROOT/table.parquet.
"""

import contextlib
import csv
import dataclasses
import io
import logging
import math
import re
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from gptjax.configs import base, errors, upgrade
from gptjax.models import counts, heads
from gptjax.runtime import jobs, listing, manifest, metrics, results
from gptjax.storage import buckets, documents, files
from gptjax.sweeps import points as points_lib
from gptjax.sweeps import states
from gptjax.training import noise

CSV, PARQUET = 'table.csv', 'table.parquet'
_HELD_OUT = re.compile(r'eval/([^/]+)/nats_per_token$')
_LATER_HALF = 0.5  # of training: where the noise scale is read
_log = logging.getLogger('gptjax')


@dataclasses.dataclass(frozen=True)
class Row:
    """A run at a moment: at an evaluation, or where it stands.

    Attributes:
      final: whether this is the end of a run that is done.
      n, n_non_embedding, n_with_head: parameters, by three counts (models/counts.py).
      d: tokens trained. flops: exact and causal, as training counts them; flops_6nd: 6 n d.
      loss: held out, nats a token; nan where there is none. train_loss: of the last logged steps.
      noise_scale_tokens: the gradient noise scale over the later half; nan where it was not logged.
      tokenizer: its fingerprint. data: the digests of the training sets.
    """

    point: str
    state: str
    final: bool
    step: int
    n: int
    n_non_embedding: int
    n_with_head: int
    d: int
    flops: float
    flops_6nd: float
    loss: float
    bits_per_byte: float
    train_loss: float
    noise_scale_tokens: float
    seed: int
    family: str
    batch_tokens: int
    peak_lr: float
    train_secs: float
    commit: str
    tokenizer: str
    data: str
    why: str


def collect(runs: Mapping[str, buckets.Anywhere], root: buckets.Anywhere, label: str) -> list[Row]:
    """The rows of runs.

    Args:
      runs: name -> workdir.
      root: of the sweep; what is no point of it is found by its workdir alone.
      label: of the held-out set whose loss is read; '' = the first of each run's.
    """
    found = []
    for name, workdir in runs.items():
        found += list(_rows(name, workdir, root, label))
    return found


def ended(workdir: buckets.Anywhere, label: str) -> Row:
    """The last row of a run that is done. Raises InputError where it is not."""
    rows = [row for row in _rows(str(workdir), workdir, workdir, label) if row.final]
    if not rows or math.isnan(rows[0].loss):
        raise errors.InputError(f'{workdir} is not at its end, or was not scored on held-out text')
    return rows[0]


def workdirs(root: buckets.Anywhere) -> dict[str, buckets.Anywhere]:
    """The workdirs of a sweep's points by name; {} where there is no sweep."""
    if not (root / points_lib.SWEEP).exists():
        return {}
    return {name: points_lib.folder(root, name) for name in points_lib.read(root)['points']}


def write(rows: list[Row], root: buckets.Anywhere) -> None:
    """Writes the table."""
    names = [field.name for field in dataclasses.fields(Row)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(names)
    for row in rows:
        writer.writerow([_cell(value) for value in dataclasses.astuple(row)])
    files.replace(root / CSV, text.getvalue())
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        _log.info("no %s: it needs pip install 'gptjax[parquet]'", PARQUET)
        return
    kinds = {int: pyarrow.int64(), float: pyarrow.float64(), bool: pyarrow.bool_()}
    hints = typing.get_type_hints(Row)
    schema = pyarrow.schema([(name, kinds.get(hints[name], pyarrow.string())) for name in names])
    content = pyarrow.BufferOutputStream()
    table = pyarrow.Table.from_pylist([dataclasses.asdict(row) for row in rows], schema=schema)
    parquet.write_table(table, content)
    files.replace(root / PARQUET, content.getvalue().to_pybytes())


def _rows(
    name: str, workdir: buckets.Anywhere, root: buckets.Anywhere, label: str
) -> Iterator[Row]:
    there = workdir / base.OF_RUN
    if not there.exists():
        there = points_lib.config_path(root, name)
    config = upgrade.config(documents.read(there, dict, 'this is no run', ('model',)))
    config['model'] = upgrade.section('model', config['model'])
    look = states.look_at(workdir, states.failure(root, name), points_lib.least_tokens(config))
    meta, ended = _newest_meta(workdir), results.found(workdir)
    if meta and 'entries' in config['model']:  # which a run's config knows not, and its model does
        config['model']['entries'] = tuple(meta['config']['model']['entries'])
    size = counts.of(heads.configure(config['model']))
    rows = list(metrics.rows(workdir))
    common = {
        'point': name,
        'state': look.state,
        'n': size.parameters,
        'n_non_embedding': size.non_embedding,
        'n_with_head': size.with_head,
        'noise_scale_tokens': _noise(rows),
        'seed': config['seed'],
        'family': config['model']['family'],
        'batch_tokens': config['batch']['batch_tokens'],
        'peak_lr': float(config['optim']['peak_lr']),
        'commit': str(ended.get('commit') or meta.get('commit', '')),
        'tokenizer': str(meta.get('tokenizer', '')),
        'data': '+'.join(meta.get('data', {}).get('sets', ())),
        'why': look.why,
    }

    def row(at: Mapping[str, Any], final: bool, secs: float) -> Row:
        d = int(at.get('tokens', 0))
        held_out = _held_out(at, label)
        return Row(
            **common,
            final=final,
            step=int(at.get('step', at.get('steps', 0))),
            d=d,
            flops=size.flops_per_token * d,
            flops_6nd=6.0 * size.parameters * d,
            loss=held_out.get('nats_per_token', math.nan),
            bits_per_byte=held_out.get('bits_per_byte', math.nan),
            train_loss=_train_loss(rows, d),
            train_secs=float(secs),
        )

    is_done = look.state == jobs.DONE
    last = ended.get('tokens') if is_done else None
    scored = [each for each in rows if _held_out(each, label) and each['tokens'] != last]
    yield from (row(each, False, _secs(rows, each['step'])) for each in scored)
    if is_done:
        yield row(ended, True, ended['train_secs'])
    elif not scored:
        at = rows[-1] if rows else {}
        yield row(at, False, _secs(rows, at.get('step', 0)))


def _held_out(row: Mapping[str, Any], label: str) -> dict[str, float]:
    """Measure -> value of the held-out set of a label."""
    for name in row:
        found = _HELD_OUT.fullmatch(name)
        if found and label in ('', found[1]):
            start = f'eval/{found[1]}/'
            return {key.removeprefix(start): row[key] for key in row if key.startswith(start)}
    return {}


def _train_loss(rows: list[dict[str, Any]], d: int) -> float:
    losses = [each['train/loss'] for each in rows if 'train/loss' in each and each['tokens'] <= d]
    return losses[-1] if losses else math.nan


def _secs(rows: list[dict[str, Any]], step: int) -> float:
    """Of training, up to a step."""
    secs = [
        row['perf/total_secs'] for row in rows if 'perf/total_secs' in row and row['step'] <= step
    ]
    return secs[-1] if secs else math.nan


def _noise(rows: list[dict[str, Any]]) -> float:
    """The noise scale of the later half of training: the ratio of the means of its two parts."""
    parts = [(r[noise.TRACE], r[noise.SQUARE]) for r in rows if noise.TRACE in r]
    parts = parts[int(len(parts) * _LATER_HALF) :]
    square = sum(part[1] for part in parts)
    return sum(part[0] for part in parts) / square if parts and square > 0 else math.nan


def _newest_meta(workdir: buckets.Anywhere) -> dict[str, Any]:
    """What the newest finished checkpoint says of itself; {} where there is none."""
    for folder in reversed(listing.finished(workdir / listing.FOLDER)):
        with contextlib.suppress(OSError, ValueError):
            return manifest.read_meta(folder)
    return {}


def _cell(value: object) -> object:
    return '' if isinstance(value, float) and math.isnan(value) else value
