# SPDX-License-Identifier: Apache-2.0
"""The few pictures that programs draw."""

import io
import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from gptjax.runtime import metrics
from gptjax.storage import files

# Colour-blind safe (Okabe and Ito 2008).
_BLUE, _ORANGE = '#0072B2', '#D55E00'
_COLOURS = ('#009E73', _ORANGE, _BLUE, '#CC79A7')


class Run(NamedTuple):
    """One model of a comparison."""

    workdir: pathlib.Path
    bits_per_byte: float  # held-out, at the end
    tokens_per_sec: float  # of training


def loss_curve(workdir: pathlib.Path, eval_name: str, path: pathlib.Path) -> None:
    """Training loss and held-out bits per byte against tokens, as a PNG.

    Args:
      eval_name: the metric of the held-out curve, as eval/tokens/bits_per_byte.
    """
    plt = _pyplot()
    train: list[tuple[float, float]] = []
    held_out: list[tuple[float, float]] = []
    for row in metrics.rows(workdir):
        for points, name in ((train, 'train/loss'), (held_out, eval_name)):
            if name in row:
                points.append((row['tokens'], row[name]))
    figure, axis = plt.subplots(figsize=(7, 4), layout='constrained')
    axis.plot(*zip(*train, strict=True), color=_BLUE, linewidth=1)
    axis.set_xlabel('training tokens')
    axis.set_ylabel('training loss, nats per token', color=_BLUE)
    axis.grid(alpha=0.3)
    _in_tokens(axis)
    if held_out:
        other = axis.twinx()
        other.plot(*zip(*held_out, strict=True), color=_ORANGE, marker='o', markersize=3)
        other.set_ylabel('held-out bits per byte', color=_ORANGE)
    _save(figure, path)


def comparison(runs: Mapping[str, Run], eval_name: str, path: pathlib.Path) -> None:
    """Held-out bits per byte against training tokens, and training speed, as a PNG.

    A run that logged no steps (an n-gram model is counted) is a level line.

    Args:
      runs: by the name shown.
      eval_name: the metric of the curves, as eval/tokens/bits_per_byte.
    """
    plt = _pyplot()
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10, 4), layout='constrained', width_ratios=(3, 2)
    )
    for (name, run), colour in zip(runs.items(), itertools.cycle(_COLOURS), strict=False):
        rows = (row for row in metrics.rows(run.workdir) if eval_name in row)
        points = [(row['tokens'], row[eval_name]) for row in rows]
        label = f'{name}: {run.bits_per_byte:.2f}'
        if points:
            tokens, bits = zip(*points, strict=True)
            left.plot(tokens, bits, color=colour, marker='o', markersize=3, label=label)
        else:
            left.axhline(run.bits_per_byte, color=colour, linestyle='--', label=label)
    left.set(xlabel='training tokens', ylabel='held-out bits per byte')
    left.grid(alpha=0.3)
    left.legend()
    _in_tokens(left)
    speeds = [run.tokens_per_sec for run in runs.values()]
    bars = right.barh(
        list(runs), speeds, color=list(itertools.islice(itertools.cycle(_COLOURS), len(runs)))
    )
    right.bar_label(bars, [f'{speed:,.0f}' for speed in speeds], padding=3)
    right.set(xlabel='training tokens/s', xscale='log')
    right.set_xlim(right=max(speeds) * 6)
    right.invert_yaxis()
    _save(figure, path)


def forgetting(runs: Mapping[str, Mapping[str, Any]], path: pathlib.Path) -> None:
    """Loss by length of context, and gradient by distance relative to the nearest token's.

    Args:
      runs: name -> 'nats_by_context_tokens' and, where it has one, 'gradient_norm_by_distance'.
    """
    plt = _pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout='constrained')
    for (name, run), colour in zip(
        runs.items(), itertools.cycle((_BLUE, _ORANGE, '#009E73', '#CC79A7')), strict=False
    ):
        losses = run['nats_by_context_tokens']
        left.plot(list(losses), list(losses.values()), color=colour, marker='o', label=name)
        if 'gradient_norm_by_distance' in run:
            norms = run['gradient_norm_by_distance']
            distances = range(1, len(norms) + 1)
            right.plot(distances, [norm / norms[0] for norm in norms], color=colour, label=name)
    left.set(xlabel='tokens of context shown', ylabel='nats per target')
    left.set_xscale('log', base=2)
    right.set(xlabel='distance in tokens', ylabel='gradient norm / that of the nearest token')
    right.set_xscale('log', base=2)
    right.set_yscale('log')
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend()
    _save(figure, path)


def lines(
    series: Mapping[str, Sequence[tuple[float, float, float]]],
    xlabel: str,
    ylabel: str,
    path: pathlib.Path,
    bold: Mapping[str, Sequence[tuple[float, float, float]]] | None = None,
    faint: Mapping[str, Sequence[tuple[float, float, float]]] | None = None,
    scale: str = 'linear',
) -> None:
    """Named lines of (x, y, standard error) points, as a PNG.

    Args:
      bold: lines that stand out. faint: dashed ones without error bars.
      scale: of x: linear, log, or symlog (linear from 0 to 1).
    """
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(9, 5), layout='constrained')
    colours = [plt.get_cmap('tab20')(i) for i in range(20)]
    for (name, points), colour in zip(series.items(), itertools.cycle(colours), strict=False):
        x, y, error = zip(*points, strict=True)
        axis.errorbar(
            x, y, error, label=name, color=colour, marker='o', markersize=3, linewidth=1, capsize=2
        )
    for name, points in (bold or {}).items():
        x, y, _ = zip(*points, strict=True)
        axis.plot(x, y, label=name, color='black', linewidth=3)
    for (name, points), colour in zip(
        (faint or {}).items(), itertools.cycle(colours), strict=False
    ):
        x, y, _ = zip(*points, strict=True)
        axis.plot(x, y, label=name, color=colour, linestyle='--', linewidth=1, alpha=0.8)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    if scale == 'symlog':
        axis.set_xscale('symlog', base=2, linthresh=1)
        ticks = sorted({x for points in series.values() for x, _, _ in points})
        axis.set_xticks(ticks, [f'{x:g}' for x in ticks])
    else:
        axis.set_xscale(scale)
    axis.grid(alpha=0.3)
    figure.legend(loc='outside right upper', fontsize='small')
    _save(figure, path)


def _save(figure: Any, path: pathlib.Path) -> None:
    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix[1:], dpi=130)
    files.replace(path, drawn.getvalue())
    _pyplot().close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    return pyplot


def _in_tokens(axis: Any) -> None:
    from matplotlib import ticker

    axis.xaxis.set_major_formatter(ticker.EngFormatter())
