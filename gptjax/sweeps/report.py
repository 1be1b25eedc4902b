# SPDX-License-Identifier: Apache-2.0
"""ROOT/report.md: the runs of a sweep, its fits, every prediction ever made, and the pictures."""

import contextlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import figure as figure_lib

from gptjax.configs import errors
from gptjax.runtime import jobs
from gptjax.scaling import fits as fits_lib
from gptjax.scaling import plots, table, told
from gptjax.scaling import runs as runs_lib
from gptjax.storage import buckets, documents, files
from gptjax.sweeps import collecting, fitting, predictions

REPORT = 'report.md'
# Picture -> (what it shows, what draws it, the fits it needs, any of them).
PICTURES: dict[str, tuple[str, Callable[[plots.Sweep], figure_lib.Figure], tuple[str, ...]]] = {
    'laws': ('loss over FLOPs, tokens, parameters', plots.laws_of_one, ()),
    'grid': ('loss over tokens, by size', plots.grid, ('3', 'kaplan')),
    'isoflop': ('isoFLOP profiles', plots.isoflop, ('2',)),
    'curves': ('losses along training', plots.curves, ('1',)),
    'parametric': ('the parametric loss', plots.parametric, ('3',)),
    'rates': ('loss over learning rates', plots.rates, ()),
    'batches': ('batch sizes and the gradient noise scale', plots.batches, ()),
    'optima': ('best size and length, by approach', plots.optima, ('1', '2', '3', 'kaplan')),
}
_VARIED = {'rates': 'peak_lr', 'batches': 'batch_tokens'}  # what a picture wants to differ
_PREDICTED = 'predictions'
_log = logging.getLogger('gptjax')


def write(root: buckets.Anywhere, asked: Sequence[str]) -> list[str]:
    """Draws pictures and writes the report. Returns the names of the files.

    Args:
      asked: pictures, of PICTURES and `predictions`; () = all that there are data for.

    Raises:
      UsageError: one that was asked for does not exist, or lacks its fit.
      InputError: there is no table.
    """
    known = [*PICTURES, _PREDICTED]
    for name in asked:
        errors.require(name in known, f'no picture {name!r}; there are: {", ".join(known)}')
    columns = _table(root)
    fits = _fits(root)
    sweep = sweep_of(columns, fits)
    said = predictions.every(root)
    drawn: dict[str, str] = {}
    for name, (about, draw, needed) in PICTURES.items():
        if needed and not set(needed) & fits.keys():
            flag = ' or '.join(f'--approach={each}' for each in needed)
            errors.require(
                name not in asked, f'{name} wants a fit: python -m gptjax.scale fit {flag}'
            )
            continue
        if name in asked or (not asked and _is_shown(name, sweep)):
            plots.save(draw(sweep), root, name)
            drawn[name] = about
    if said and (_PREDICTED in asked or not asked):
        plots.save(plots.predicted(said), root, _PREDICTED)
        drawn[_PREDICTED] = 'predictions and what came out'
    files.replace(root / REPORT, _text(columns, fits, said, drawn))
    return [REPORT, *(f'{name}.{kind}' for name in drawn for kind in ('png', 'svg'))]


def _is_shown(name: str, sweep: plots.Sweep) -> bool:
    """Whether a picture that was not asked for shows anything: one size by several settings."""
    if name not in _VARIED:
        return True
    values = sweep.settings[_VARIED[name]]
    sizes = np.unique(sweep.runs.n)
    return any(len(np.unique(values[sweep.runs.n == size])) > 2 for size in sizes)


def sweep_of(columns: table.Columns, fits: Mapping[str, Mapping[str, Any]]) -> plots.Sweep:
    """What is drawn, of a table that collect wrote."""
    counted = next((fit.get('parameters_counted') for fit in fits.values()), None) or 'all'
    n = _numbers(columns, fitting.COUNTS[counted])
    d, c, loss = (_numbers(columns, name) for name in ('d', 'flops', 'loss'))
    train_loss = _numbers(columns, 'train_loss')
    names, state, family = (np.array(columns[name], str) for name in ('point', 'state', 'family'))
    final = np.array([str(cell) == 'True' for cell in columns['final']])
    scored = np.isfinite(loss) & (loss > 0)

    def some(mask: np.ndarray) -> runs_lib.Runs:
        return runs_lib.Runs(names[mask], n[mask], d[mask], c[mask], loss[mask])

    main = 'gpt' if 'gpt' in family else family[0]
    ended = final & scored
    settings = {
        name: _numbers(columns, name)[ended & (family == main)]
        for name in ('peak_lr', 'batch_tokens', 'noise_scale_tokens')
    }
    unfinished = {
        each: np.stack([n, d, c, train_loss], axis=1)[state == each]
        for each in sorted({*state} - {jobs.DONE})
    }
    return plots.Sweep(
        some(ended & (family == main)),
        some(scored & (family == main) & (state == jobs.DONE)),
        settings,
        {each: some(ended & (family == each)) for each in sorted({*family} - {main})},
        unfinished,
        fits,
    )


def _fits(root: buckets.Anywhere) -> dict[str, dict[str, Any]]:
    """Approach -> its result, of those that stand in ROOT."""
    found = {}
    for approach in fits_lib.APPROACHES:
        with contextlib.suppress(documents.Damaged):
            found[approach] = fitting.read(fitting.path_of(root, approach))
    return found


def _table(root: buckets.Anywhere) -> dict[str, list[Any]]:
    path = root / collecting.CSV
    if not path.exists():
        raise errors.InputError(f'{path} is missing: python -m gptjax.scale collect makes it')
    return table.read(path)


def _numbers(columns: table.Columns, name: str) -> np.ndarray:
    return np.array([float(cell) if cell not in ('', None) else math.nan for cell in columns[name]])


def _text(
    columns: table.Columns,
    fits: Mapping[str, Mapping[str, Any]],
    said: list[dict[str, Any]],
    drawn: Mapping[str, str],
) -> str:
    parts = ['# Scaling report', _runs_table(columns)]
    for approach, result in fits.items():
        about = [told.of_fit(result)]
        about += [f'warning: {each}' for each in result['warnings']]
        about += [f'allowed: {each}' for each in result.get('allowed', ())]
        about += [f'made {result["made"]} at commit {result["commit"]}']
        parts.append(f'## Approach {approach}\n\n```\n' + '\n'.join(about) + '\n```')
    if said:
        parts.append(f'## Predictions\n\n{predictions.table(said)}')
    for name, about in drawn.items():
        parts.append(f'## {about[0].upper()}{about[1:]}\n\n![{about}]({name}.png)')
    return '\n\n'.join(parts) + '\n'


def _runs_table(columns: table.Columns) -> str:
    """A row a run: its end, or where it stands."""
    head = ('run', 'state', 'N', 'D', 'FLOPs', 'loss', 'bits a byte', 'seconds')
    lines = [f'| {" | ".join(head)} |', '|---' * len(head) + '|']
    last = {name: row for row, name in enumerate(columns['point'])}
    for name, row in last.items():
        n, d, flops, loss, bits, secs = (
            _numbers(columns, each)[row]
            for each in ('n', 'd', 'flops', 'loss', 'bits_per_byte', 'train_secs')
        )
        shown = [
            '' if math.isnan(value) else f'{value:{form}}'
            for value, form in ((loss, '.4f'), (bits, '.4f'), (secs, '.0f'))
        ]
        cells = [name, columns['state'][row], f'{n:,.0f}', f'{d:,.0f}', f'{flops:.3g}', *shown]
        lines.append(f'| {" | ".join(map(str, cells))} |')
    return '\n'.join(lines)
