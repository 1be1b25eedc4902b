# SPDX-License-Identifier: Apache-2.0
"""Fits of a sweep's table, or of anybody's, with all that says what was fitted."""

import logging
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gptjax.configs import errors
from gptjax.runtime import jobs, program, results
from gptjax.scaling import fits, table
from gptjax.scaling import runs as runs_lib
from gptjax.storage import buckets, documents

COUNTS = {'all': 'n', 'non_embedding': 'n_non_embedding', 'with_head': 'n_with_head'}
_SAME = ('commit', 'tokenizer', 'data')  # of all runs of a fit
_ALONG = '1'  # the approach that reads losses along training
_log = logging.getLogger('gptjax')


class Given(NamedTuple):
    """Runs to be fitted, and what a result says of where they are from."""

    runs: runs_lib.Runs
    said: dict[str, Any]


def others(path: pathlib.Path, columns: Mapping[str, str], where: Sequence[str]) -> Given:
    """The runs of anybody's table. Arguments and errors as table.read() and table.runs()."""
    said = {'table': path.name, 'columns': dict(columns)} | (
        {'where': list(where)} if where else {}
    )
    return Given(table.runs(table.read(path), columns, where, path), said)


def swept(
    path: pathlib.Path, approach: str, count: str, where: Sequence[str], allow_mixed: bool
) -> Given:
    """The runs of a table that collect wrote: those that are done, of one family of models.

    Args:
      count: of COUNTS. allow_mixed: whether runs may be of different commits, tokenizers, data.

    Raises:
      InputError: as others(); the runs were made by different code, or are of different tokens.
    """
    c, loss = ('loss', 'noise_scale_tokens') if approach == 'batch' else ('flops', 'loss')
    named = {'name': 'point', 'n': COUNTS[count], 'd': 'd', 'c': c, 'loss': loss}
    columns, more = table.read(path), {'parameters_counted': count}
    if left_out := _unfinished(columns):
        more['left_out'] = left_out
        _log.warning('not fitted: %s', ', '.join(f'{k} ({v})' for k, v in left_out.items()))
    where = [*where, f'state={jobs.DONE}', f'{loss}!=']
    where += [] if approach == _ALONG else ['final=True']
    where += _of_one_family(columns, where, path)
    more['allowed'] = _mixed(columns, where, path, allow_mixed)
    runs, said = others(path, named, where)
    return Given(runs, said | more)


def fit(given: Given, options: fits.Options, drop_highest: int) -> dict[str, Any]:
    """The result of a fit as it is written. Raises InputError as fits.fit()."""
    runs, dropped = runs_lib.without_highest(given.runs, drop_highest)
    rule = f'the {drop_highest} highest losses dropped' if drop_highest else 'none'
    said = given.said | {'outlier_rule': rule} | ({'dropped': dropped} if dropped else {})
    made = {'made': results.now(), 'commit': program.commit()}
    return {**fits.fit(runs, options), **said, **made}


def _of_one_family(columns: table.Columns, where: Sequence[str], path: pathlib.Path) -> list[str]:
    """The condition that leaves GPTs alone, where other models stand beside them."""
    families = {str(columns['family'][i]) for i in table.kept(columns, where, path)}
    if len(families) < 2:
        return []
    chosen = 'gpt' if 'gpt' in families else min(families)
    _log.info('%s alone is fitted, of %s', chosen, ', '.join(sorted(families)))
    return [f'family={chosen}']


def _mixed(
    columns: table.Columns, where: Sequence[str], path: pathlib.Path, allowed: bool
) -> list[str]:
    """What differs between the runs though it should not. Raises InputError if not allowed."""
    kept = table.kept(columns, where, path)
    found = []
    for name in _SAME:
        values = sorted({str(columns[name][i]) for i in kept})
        if len(values) < 2:
            continue
        shown = ', '.join(value[:12] or 'none' for value in values)
        if not allowed:
            raise errors.InputError(
                f'the runs were made with {len(values)} values of {name} ({shown}): losses do not '
                'compare; choose some with --where, or say --allow_mixed, and the result says so'
            )
        found.append(f'{name}: {shown}')
    return found


def path_of(root: buckets.Anywhere, approach: str) -> Any:
    """Where the result of an approach stands in a sweep."""
    return root / f'fit_{approach}.json'


def write(result: Mapping[str, Any], path: buckets.Anywhere) -> None:
    """Writes a result."""
    path.parent.mkdir(parents=True, exist_ok=True)
    documents.write(path, _plain(result))


def read(path: buckets.Anywhere) -> dict[str, Any]:
    """A result. Raises Damaged where it is none."""
    remedy = 'make it again with python -m gptjax.scale fit'
    return documents.read(path, dict, remedy, ('approach', 'n_points', 'data_digest'))


def _unfinished(columns: table.Columns) -> dict[str, str]:
    """Runs that did not get to their end -> their state."""
    pairs = zip(columns['point'], columns['state'], strict=True)
    return {str(name): str(state) for name, state in pairs if state != jobs.DONE}


def _plain(value: Any) -> Any:
    """As JSON has it: no numbers that are not finite."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
