# SPDX-License-Identifier: Apache-2.0
"""Pictures of sweeps and fits, after those of Kaplan et al. 2020 and Hoffmann et al. 2022."""

import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib import colors, ticker
from matplotlib import figure as figure_lib

from gptjax.scaling import frontier, laws, profiles, published
from gptjax.scaling import runs as runs_lib
from gptjax.storage import buckets, files

# Colour-blind safe (Okabe and Ito 2008); of ordered things viridis.
_COLOURS = {'1': '#009E73', '2': '#E69F00', '3': '#0072B2', 'kaplan': '#CC79A7'}
_MARKERS = {'gpt': 'o', 'rnn': 's', 'ngram': '^'}
_FAMILIES = {'gpt': 'GPT', 'rnn': 'LSTM', 'ngram': 'n-gram'}
_GREY, _BAND = '#666666', 0.2
_STYLE = {'font.size': 12, 'axes.grid': True, 'grid.alpha': 0.25, 'svg.hashsalt': 'gptjax'}
_FORMATS = ('png', 'svg')
N, D, C = 'parameters', 'training tokens', 'training FLOPs'
LOSS = 'held-out loss, nats a token'


class Sweep(NamedTuple):
    """What is drawn.

    Attributes:
      runs: that are done, of the family that is fitted. curves: all of their evaluations.
      settings: column -> a number a run: peak_lr, batch_tokens, noise_scale_tokens (nan = not
        measured).
      others: family -> runs of other models, on the same axes.
      unfinished: state -> (n, d, c, loss) of runs that did not get to their end; loss of training.
      fits: approach -> result.
    """

    runs: runs_lib.Runs
    curves: runs_lib.Runs
    settings: Mapping[str, np.ndarray]
    others: Mapping[str, runs_lib.Runs]
    unfinished: Mapping[str, np.ndarray]
    fits: Mapping[str, Mapping[str, Any]]


def save(drawn: figure_lib.Figure, folder: buckets.Anywhere, name: str) -> list[str]:
    """Writes a figure as PNG and as SVG. Returns the names of the files."""
    names = []
    for kind in _FORMATS:
        content = io.BytesIO()
        with matplotlib.rc_context(_STYLE):
            drawn.savefig(content, format=kind, dpi=130, metadata=_NO_DATE.get(kind))
        files.replace(folder / f'{name}.{kind}', content.getvalue())
        names.append(f'{name}.{kind}')
    return names


def laws_of_one(sweep: Sweep) -> figure_lib.Figure:
    """Loss over FLOPs, tokens and parameters (Kaplan et al. 2020, figure 1)."""
    drawn, axes = _figure(3, (13.5, 4.4))
    for axis, (column, label) in zip(axes, (('c', C), ('d', D), ('n', N)), strict=True):
        x = getattr(sweep.runs, column)
        _points(axis, x, sweep.runs.loss, 'gpt', label='GPT')
        for family, runs in sweep.others.items():
            there = getattr(runs, column) > 0
            if there.any():
                _points(
                    axis,
                    getattr(runs, column)[there],
                    runs.loss[there],
                    family,
                    label=_FAMILIES.get(family, family),
                )
        _unfinished(axis, sweep, column)
        if column in sweep.fits:
            _law_line(axis, sweep.fits[column], x)
        axis.set(xlabel=label, xscale='log', yscale='log')
        _plain_ticks(axis)
    axes[0].set_ylabel(LOSS)
    axes[1].legend()  # where n-gram models stand, too: they have no FLOPs
    return drawn


def grid(sweep: Sweep) -> figure_lib.Figure:
    """Loss over tokens, a line a size, with the joint law (Kaplan et al. 2020, figure 4)."""
    drawn, (axis,) = _figure(1, (8, 5.2))
    sizes = np.unique(sweep.runs.n)
    colours = _ordered(len(sizes))
    law = next((sweep.fits[name] for name in ('3', 'kaplan') if name in sweep.fits), None)
    for size, colour in zip(sizes, colours, strict=True):
        some = sweep.runs.of(sweep.runs.n == size)
        axis.plot(some.d, some.loss, 'o', color=colour, label=f'{_short(size)} parameters')
        if law:
            d = np.geomspace(sweep.runs.d.min(), sweep.runs.d.max(), 100)
            middle, low, high = _of_law(law, np.full_like(d, size), d)
            axis.plot(d, middle, color=colour, linewidth=1)
            axis.fill_between(d, low, high, color=colour, alpha=_BAND, linewidth=0)
    axis.set(xlabel=D, ylabel=LOSS, xscale='log', yscale='log')
    _plain_ticks(axis)
    axis.legend(fontsize=10)
    return drawn


def isoflop(sweep: Sweep) -> figure_lib.Figure:
    """Profiles at each budget, and the best size and length over budgets (Hoffmann, figure 3)."""
    drawn, (left, middle, right) = _figure(3, (14, 4.6))
    groups = profiles.budgets(sweep.runs)
    for rows, colour in zip(groups, _ordered(len(groups)), strict=True):
        some = sweep.runs.of(rows[np.argsort(sweep.runs.n[rows])])
        left.plot(some.n, some.loss, 'o', color=colour, label=f'{some.c.mean():.3g}')
        if len(np.unique(some.n)) >= 3:
            bend = np.polyfit(np.log(some.n), some.loss, 2)
            x = np.geomspace(some.n.min(), some.n.max(), 100)
            left.plot(x, np.polyval(bend, np.log(x)), color=colour, linewidth=1)
    _unfinished(left, sweep, 'n')
    left.set(xlabel=N, ylabel=LOSS, xscale='log')
    left.legend(title='FLOPs', fontsize=10)
    result = sweep.fits['2']
    for axis, name, label in ((middle, 'n', f'best {N}'), (right, 'd', f'best {D}')):
        c = np.array(result['optima']['c'])
        axis.plot(c, result['optima'][name], 'o', color=_COLOURS['2'])
        _power_line(axis, result, name, c)
        axis.set(xlabel=C, ylabel=label, xscale='log', yscale='log')
        axis.legend(fontsize=10)
    return drawn


def curves(sweep: Sweep) -> figure_lib.Figure:
    """Losses along training with their envelope, and what is best (Hoffmann, figure 2)."""
    drawn, (left, middle, right) = _figure(3, (14, 4.6))
    sizes = np.unique(sweep.curves.n)
    colour_of = dict(zip(sizes, _ordered(len(sizes)), strict=True))
    for name in np.unique(sweep.curves.names):
        some = sweep.curves.of(sweep.curves.names == name)
        some = some.of(np.argsort(some.c))
        left.plot(some.c, some.loss, color=colour_of[some.n[0]], linewidth=1)
    for size in sizes[:: max(1, len(sizes) // 6)]:
        left.plot([], [], color=colour_of[size], label=_short(size))
    left.set(xlabel=C, ylabel=LOSS, xscale='log')
    left.legend(title=N, fontsize=10)
    result = sweep.fits['1']
    best = result['optima']
    left.plot(best['c'], best['loss'], 'k.', markersize=4)
    for axis, name, label in ((middle, 'n', f'best {N}'), (right, 'd', f'best {D}')):
        axis.plot(best['c'], best[name], '.', color=_COLOURS['1'])
        _power_line(axis, result, name, np.array(best['c']))
        axis.set(xlabel=C, ylabel=label, xscale='log', yscale='log')
        axis.legend(fontsize=10)
    return drawn


def parametric(sweep: Sweep) -> figure_lib.Figure:
    """Contours of the fitted loss with its efficient frontier, and slices (Hoffmann, figure 4)."""
    result = sweep.fits['3']
    drawn, (left, right) = _figure(2, (12, 5))
    c = np.geomspace(sweep.runs.c.min() / 3, sweep.runs.c.max() * 30, 160)
    n = np.geomspace(sweep.runs.n.min() / 2, sweep.runs.n.max() * 4, 160)
    whole_c, whole_n = np.meshgrid(c, n)
    height = laws.Chinchilla.loss(result, whole_n, whole_c / (frontier.FLOPS * whole_n))
    levels = np.geomspace(*np.quantile(height, [0.002, 0.9]), 14)
    scale = colors.Normalize(levels[0], levels[-1])
    lines = left.contour(whole_c, whole_n, height, levels, cmap='viridis', norm=scale)
    left.clabel(lines, lines.levels[::3], fmt='%.2f', fontsize=10)
    best = np.array([frontier.optimum('chinchilla', result, each).n for each in c])
    left.plot(c, best, color=_COLOURS['3'], linewidth=2, label='efficient frontier')
    drawn_as = {'c': sweep.runs.loss, 'cmap': 'viridis', 'norm': scale, 'zorder': 3}
    shown = left.scatter(sweep.runs.c, sweep.runs.n, edgecolors='white', s=45, **drawn_as)
    drawn.colorbar(shown, ax=left, label=LOSS)
    left.set(xlabel=C, ylabel=N, xscale='log', yscale='log', ylim=(n[0], n[-1]))
    left.legend(loc='upper left', fontsize=10)
    budgets = np.geomspace(sweep.runs.c.min(), sweep.runs.c.max() * 10, 5)
    for budget, colour in zip(budgets, _ordered(5), strict=True):
        near, low, high = _of_law(result, n, budget / (frontier.FLOPS * n))
        right.plot(n, near, color=colour, label=f'{budget:.2g}')
        right.fill_between(n, low, high, color=colour, alpha=_BAND, linewidth=0)
    right.plot(sweep.runs.n, sweep.runs.loss, 'o', color=_GREY, markersize=4, label='runs')
    span = sweep.runs.loss.max() - sweep.runs.loss.min()
    right.set(xlabel=N, ylabel=LOSS, xscale='log')
    right.set_ylim(height.min() - 0.1 * span, sweep.runs.loss.max() + 0.3 * span)
    right.legend(title='FLOPs', fontsize=10)
    return drawn


def optima(sweep: Sweep) -> figure_lib.Figure:
    """Best size and length over budgets, of every approach (Hoffmann, figures 1 and A3)."""
    drawn, axes = _figure(2, (12, 5))
    c = np.geomspace(sweep.runs.c.min(), sweep.runs.c.max() * 100, 60)
    for axis, name, label in zip(axes, ('n', 'd'), (f'best {N}', f'best {D}'), strict=True):
        for approach in ('1', '2'):
            if approach in sweep.fits:
                result = sweep.fits[approach]
                exponent = result[f'exponent_{name}']
                y = result['coefficients'][name] * c**exponent
                shown = f'approach {approach}: $C^{{{exponent:.2f}}}$'
                axis.plot(c, y, color=_COLOURS[approach], label=shown)
        for approach in ('3', 'kaplan'):
            if approach in sweep.fits:
                _frontier_band(axis, sweep.fits[approach], name, c)
        known = published.LAWS['chinchilla']
        at = [getattr(frontier.optimum(known.law, known.numbers, each), name) for each in c]
        axis.plot(c, at, ':', color=_GREY, label='Hoffmann et al., approach 3')
        axis.plot(
            sweep.runs.c, getattr(sweep.runs, name), '.', color=_GREY, alpha=0.5, label='runs'
        )
        axis.set(xlabel=C, ylabel=label, xscale='log', yscale='log')
        axis.legend(fontsize=10)
    return drawn


def rates(sweep: Sweep) -> figure_lib.Figure:
    """Loss over learning rates, a line a size, the best of each marked (Yang et al., figure 1)."""
    drawn, (axis,) = _figure(1, (8, 5.2))
    sizes = np.unique(sweep.runs.n)
    for size, colour in zip(sizes, _ordered(len(sizes)), strict=True):
        rows = np.flatnonzero(sweep.runs.n == size)
        rows = rows[np.argsort(sweep.settings['peak_lr'][rows])]
        x, y = sweep.settings['peak_lr'][rows], sweep.runs.loss[rows]
        axis.plot(x, y, 'o-', color=colour, label=f'{_short(size)} parameters')
        axis.plot(x[np.argmin(y)], y.min(), '*', color='#D55E00', markersize=14)
    axis.plot([], [], '*', color='#D55E00', markersize=12, label='best')
    axis.set(xlabel='peak learning rate', ylabel=LOSS, xscale='log')
    axis.legend(fontsize=10)
    return drawn


def batches(sweep: Sweep) -> figure_lib.Figure:
    """Loss over the batch; the noise scale over the loss, beside Kaplan's critical batch."""
    drawn, (left, right) = _figure(2, (12, 5))
    order = np.argsort(sweep.settings['batch_tokens'])
    batch, loss = sweep.settings['batch_tokens'][order], sweep.runs.loss[order]
    left.plot(batch, loss, 'o-', color=_COLOURS['3'])
    left.set(xlabel='batch, tokens', ylabel=LOSS, xscale='log')
    noise = sweep.settings['noise_scale_tokens'][order]
    there = np.isfinite(noise) & (noise > 0)
    right.plot(loss[there], noise[there], 'o', color=_COLOURS['3'], label='gradient noise scale')
    line = np.linspace(loss.min(), loss.max(), 50)
    if 'batch' in sweep.fits:
        right.plot(line, laws.Power.loss(sweep.fits['batch'], line), color='black', label='fit')
    kaplan = published.loss('kaplan_batch', line)
    right.plot(line, kaplan, ':', color=_GREY, label='Kaplan et al., critical batch')
    right.set(xlabel=LOSS, ylabel='tokens', yscale='log')
    right.legend(fontsize=10)
    return drawn


def predicted(found: Sequence[Mapping[str, Any]]) -> figure_lib.Figure:
    """Predictions with their intervals, and what was measured since."""
    drawn, (axis,) = _figure(1, (8, 1.4 + 0.6 * len(found)))
    for row, each in enumerate(found):
        for level, width in (('90', 2), ('50', 6)):
            axis.plot(each['intervals'][level], [row, row], color=_COLOURS['3'], linewidth=width)
        axis.plot(each['value'], row, '|', color='white', markersize=12)
        if 'score' in each:
            axis.plot(each['score']['loss'], row, 'D', color='#D55E00', markersize=8)
    axis.plot([], [], color=_COLOURS['3'], linewidth=6, label='predicted, 50 and 90 %')
    axis.plot([], [], 'D', color='#D55E00', label='measured')
    axis.set(xlabel=LOSS, ylim=(-0.6, len(found) - 0.4))
    axis.set_yticks(range(len(found)), [each['name'] for each in found])
    axis.legend(fontsize=10, loc='upper center', bbox_to_anchor=(0.5, -0.3), ncol=2)
    return drawn


_NO_DATE = {'svg': {'Date': None}}


def _figure(columns: int, size: tuple[float, float]) -> tuple[figure_lib.Figure, np.ndarray]:
    with matplotlib.rc_context(_STYLE):
        drawn = figure_lib.Figure(figsize=size, layout='constrained')
        axes = drawn.subplots(1, columns, squeeze=False)[0]
    return drawn, axes


def _points(axis: Any, x: np.ndarray, y: np.ndarray, family: str, label: str) -> None:
    colour = {'gpt': '#0072B2', 'rnn': '#E69F00', 'ngram': '#009E73'}.get(family, _GREY)
    axis.plot(x, y, _MARKERS.get(family, 'v'), color=colour, label=label, markersize=6)


def _unfinished(axis: Any, sweep: Sweep, column: str) -> None:
    """Runs that did not get to their end, by their last loss of training."""
    place = {'n': 0, 'd': 1, 'c': 2}[column]
    for state, at in sweep.unfinished.items():
        there = at[np.isfinite(at[:, 3]) & (at[:, place] > 0)]
        if len(there):
            axis.plot(there[:, place], there[:, 3], 'x', color='#D55E00', label=f'{state}: x')


def _law_line(axis: Any, result: Mapping[str, Any], x: np.ndarray) -> None:
    """A law of one column with its band."""
    kind = laws.LAWS[result['law']]
    line = np.geomspace(x.min(), x.max() * 3, 100)
    samples = _samples(result)
    drawn = kind.loss({k: v[:, None] for k, v in samples.items()}, line[None])
    axis.plot(line, kind.loss(result, line), color='black', linewidth=1.2)
    axis.fill_between(line, *np.quantile(drawn, [0.05, 0.95], axis=0), color='black', alpha=_BAND)
    axis.set_title(rf'$\alpha$ = {result["alpha"]:.3f}', fontsize=12)


def _power_line(axis: Any, result: Mapping[str, Any], name: str, c: np.ndarray) -> None:
    """Of approaches 1 and 2, beyond the last budget."""
    line = np.geomspace(c.min(), c.max() * 10, 50)
    exponent = result[f'exponent_{name}']
    low, high = result['intervals']['90'][f'exponent_{name}']
    label = f'$C^{{{exponent:.2f}}}$, 90 %: {low:.2f} to {high:.2f}'
    axis.plot(line, result['coefficients'][name] * line**exponent, 'k-', linewidth=1.2, label=label)


def _frontier_band(axis: Any, result: Mapping[str, Any], name: str, c: np.ndarray) -> None:
    middle = [getattr(frontier.optimum(result['law'], result, each), name) for each in c]
    drawn = [getattr(frontier.optimum(result['law'], _samples(result), each), name) for each in c]
    low, high = np.quantile(np.array(drawn), [0.05, 0.95], axis=1)
    exponent = result['exponents'][name]
    what = 'Kaplan form' if result['approach'] == 'kaplan' else 'approach 3'
    colour = _COLOURS[result['approach']]
    axis.plot(c, middle, color=colour, label=f'{what}: $C^{{{exponent:.2f}}}$')
    axis.fill_between(c, low, high, color=colour, alpha=_BAND, linewidth=0)


def _of_law(result: Mapping[str, Any], n: np.ndarray, d: np.ndarray) -> tuple:
    """Losses of a law, and the ends of their middle 90 %."""
    kind = laws.LAWS[result['law']]
    samples = {name: values[:, None] for name, values in _samples(result).items()}
    low, high = np.quantile(kind.loss(samples, n[None], d[None]), [0.05, 0.95], axis=0)
    return kind.loss(result, n, d), low, high


def _samples(result: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {name: np.array(values) for name, values in result['samples'].items()}


def _ordered(number: int) -> list[Any]:
    return [matplotlib.colormaps['viridis'](x) for x in np.linspace(0, 0.9, number)]


def _short(number: float) -> str:
    for unit, name in ((1e9, 'B'), (1e6, 'M'), (1e3, 'k')):
        if number >= unit:
            return f'{number / unit:.3g}{name}'
    return f'{number:.0f}'


def _plain_ticks(axis: Any) -> None:
    """Losses on a logarithmic axis as numbers, not powers of ten."""
    low, high = axis.get_ylim()
    places = [x for x in ticker.MaxNLocator(5).tick_values(low, high) if low <= x <= high]
    axis.set_yticks(places, [f'{x:g}' for x in places])
    axis.yaxis.set_minor_locator(ticker.NullLocator())
