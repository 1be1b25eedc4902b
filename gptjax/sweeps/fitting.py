# SPDX-License-Identifier: Apache-2.0
"""Fits of a sweep's table, or of anybody's, with all that says what was fitted."""

import logging
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

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


class Source:
    """A table, and which of its rows and columns are fitted."""

    def __init__(
        self,
        path: pathlib.Path,
        columns: Mapping[str, str],
        where: Sequence[str],
        own: bool,
        allow_mixed: bool = False,
    ) -> None:
        """Args: own: whether it is what collect wrote. allow_mixed: different commits may be."""
        self.path, self._columns, self._where = path, dict(columns), list(where)
        self._own, self._allow_mixed = own, allow_mixed

    def runs(self, approach: str) -> tuple[runs_lib.Runs, dict[str, Any]]:
        """The runs, and what a result says of where they are from.

        Raises:
          InputError: as table.read() and table.runs(); the runs were made by different code, or
            are of different tokens.
        """
        columns = table.read(self.path)
        said: dict[str, Any] = {'table': self.path.name, 'columns': self._columns}
        where = list(self._where)
        if self._own:
            left_out = _unfinished(columns)
            if left_out:
                said['left_out'] = left_out
                _log.warning('not fitted: %s', ', '.join(f'{k} ({v})' for k, v in left_out.items()))
            where += [f'state={jobs.DONE}', 'loss!=']
            where += [] if approach == _ALONG else ['final=True']
            where += ['noise_scale_tokens!='] if approach == 'batch' else []
            where += self._of_one_family(columns, where)
            said['allowed'] = self._allowed(columns, where)
        if where:
            said['where'] = where
        return table.runs(columns, self._columns, where, self.path), said

    def _of_one_family(self, columns: table.Columns, where: list[str]) -> list[str]:
        """The condition that leaves GPTs alone, where other models stand beside them."""
        kept = table.kept(columns, where, self.path)
        families = {str(columns['family'][i]) for i in kept}
        if len(families) < 2:
            return []
        chosen = 'gpt' if 'gpt' in families else min(families)
        _log.info('%s alone is fitted, of %s', chosen, ', '.join(sorted(families)))
        return [f'family={chosen}']

    def _allowed(self, columns: table.Columns, where: list[str]) -> list[str]:
        """What differs between the runs though it should not, where that is allowed."""
        kept = table.kept(columns, where, self.path)
        found = []
        for name in _SAME:
            values = sorted({str(columns[name][i]) for i in kept})
            if len(values) < 2:
                continue
            shown = ', '.join(value[:12] or 'none' for value in values)
            if not self._allow_mixed:
                raise errors.InputError(
                    f'the runs were made with {len(values)} values of {name} ({shown}): losses do '
                    'not compare; choose some with --where, or say --allow_mixed, and the result '
                    'says so'
                )
            found.append(f'{name}: {shown}')
        return found


def fit(source: Source, options: fits.Options, drop_highest: int, count: str) -> dict[str, Any]:
    """The result of a fit as it is written. Raises InputError as Source.runs() and fits.fit()."""
    runs, said = source.runs(options.approach)
    runs, dropped = runs_lib.without_highest(runs, drop_highest)
    said['outlier_rule'] = f'the {drop_highest} highest losses dropped' if drop_highest else 'none'
    if dropped:
        said['dropped'] = dropped
    if count:
        said['parameters_counted'] = count
    result = fits.fit(runs, options)
    made = {'made': results.now(), 'commit': program.commit()}
    return {**result, **said, **made}


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
