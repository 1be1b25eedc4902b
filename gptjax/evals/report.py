# SPDX-License-Identifier: Apache-2.0
"""Results as people look at them: a Markdown table beside the papers' numbers, and pictures."""

import collections
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from gptjax.evals import fewshot, papers, suite
from gptjax.runtime import plots
from gptjax.storage import documents, files

Row = dict[str, Any]
RESULTS, TABLE = 'results.jsonl', 'results.md'
_UNITS = ('perplexity', 'bits_per', 'words')  # what is not a share of a hundred


def write(
    workdir: pathlib.Path,
    rows: Sequence[Row],
    absent: Mapping[str, str],
    comparisons: Sequence[Row],
) -> list[pathlib.Path]:
    """Writes results.jsonl and results.md.

    Args:
      rows: of every seed; those over several seeds are added.
      absent: tasks that are not scored -> why.

    Returns:
      the files written.
    """
    whole = suite.over_seeds(rows)
    every = [*(row for row in rows if row not in whole), *whole]
    files.replace(workdir / RESULTS, documents.lines(every))
    files.replace(workdir / TABLE, _table(whole, absent, comparisons))
    return [workdir / RESULTS, workdir / TABLE]


def draw(
    workdir: pathlib.Path, rows: Sequence[Row], beside: Sequence[Sequence[Row]]
) -> list[pathlib.Path]:
    """Draws the pictures there are points for; arguments and value as write().

    Args:
      beside: rows of other workdirs.
    """
    return _pictures(workdir, [suite.over_seeds(rows), *beside])


def read(workdir: pathlib.Path) -> list[Row]:
    """The rows of a workdir's results; [] where there are none.

    Raises:
      Damaged: a line is not what was written.
    """
    path = workdir / RESULTS
    found = documents.read_lines(path, ('task', 'metric', 'value'))
    if found.bad or found.cut:
        said = ', '.join(map(str, found.bad)) or 'the last'
        raise documents.Damaged(
            f'{path} is damaged, lines: {said}; run the evaluation of {workdir} again'
        )
    return found.rows


def _table(rows: Sequence[Row], absent: Mapping[str, str], comparisons: Sequence[Row]) -> str:
    """Markdown: one line for every task, K and metric of the task's own; protocols below."""
    lines = ['| task | K | metric | value | s.e. | n | papers |', '|---|---|---|---|---|---|---|']
    notes: dict[str, list[str]] = collections.defaultdict(list)
    for row in rows:
        if row['metric'] not in fewshot.find(row['task']).metrics:
            continue
        error = '' if row['stderr'] is None else f'{row["stderr"]:.2f}'
        seeds = f' (s.d. of seeds {_shown(row["seed_std"])})' if 'seed_std' in row else ''
        clean = f' (clean {_shown(row["clean"])}, n {row["n_clean"]})' if 'clean' in row else ''
        lines.append(
            f'| {row["task"]} | {row["k"]} | {row["metric"]} '
            f'| {_shown(row["value"])}{seeds}{clean} | {error} | {row["n"]} '
            f'| {_papers(row["paper"])} |'
        )
        counts = ', '.join(
            f'{row[f"n_{name}"]} {said}' for name, said in _COUNTS.items() if row.get(f'n_{name}')
        )
        note = row['protocol'] + (f' ({counts})' if counts else '')
        if note not in notes[row['task']]:
            notes[row['task']].append(note)
    text = '\n'.join(lines)
    if comparisons:
        text += (
            '\n\n| task | K | metric | n | difference | 95 % | p | beside |\n' + '|---' * 8 + '|\n'
        )
        text += '\n'.join(
            f'| {c["task"]} | {c["k"]} | {c["metric"]} | {c["n"]} | {c["difference"]:+.2f} '
            f'| {c["low"]:+.2f} to {c["high"]:+.2f} | {c["p"]:.3f} | {c["beside"]} |'
            for c in comparisons
        )
    if absent:
        text += '\n\nNot scored:\n\n' + '\n'.join(f'- {t}: {why}' for t, why in absent.items())
    text += '\n\nProtocols:\n\n' + '\n'.join(
        f'- {task}: {note}' for task, some in notes.items() for note in some
    )
    weights = rows[0]['weights'] if rows else ''
    return f'# Evaluation of {weights}\n\n{text}\n'


_COUNTS = {
    'straddles': 'with a token of context and answer',
    'truncated': 'with a context cut at its beginning',
    'dropped': 'with fewer examples, as more did not fit',
}


def _papers(printed: Mapping[str, float]) -> str:
    """The smallest and the largest of each of the papers' models."""
    ends = []
    for family in ('GPT-2', 'GPT-3'):
        some = [f'{name}: {value:g}' for name, value in printed.items() if name.startswith(family)]
        ends += list(dict.fromkeys([*some[:1], *some[-1:]]))
    return ', '.join(ends)


def _shown(value: float | None) -> str:
    return '' if value is None else f'{value:.2f}'


def _pictures(workdir: pathlib.Path, runs: Sequence[Sequence[Row]]) -> list[pathlib.Path]:
    """Score against K, parameters and compute; each only where there are two points."""
    drawn = []
    shares = [[row for row in rows if _is_share(row)] for rows in runs]
    by_k: dict[str, list[tuple]] = collections.defaultdict(list)
    for row in _whole(shares[0]):
        by_k[row['task']].append((row['k'], row['value'], row['stderr'] or 0.0))
    by_k = {task: sorted(points) for task, points in by_k.items() if len(points) > 1}
    if by_k:
        every = set.intersection(*({k for k, _, _ in points} for points in by_k.values()))
        mean = [
            (k, sum(y for points in by_k.values() for x, y, _ in points if x == k) / len(by_k), 0.0)
            for k in sorted(every)
        ]
        path = workdir / 'in_context.png'
        plots.lines(
            by_k,
            'examples in the context (K)',
            'score, percent',
            path,
            bold={f'mean of {len(by_k)} tasks': mean} if len(mean) > 1 else {},
            scale='symlog',
        )
        drawn.append(path)
    for field, label, name in (
        ('parameters', 'parameters', 'by_size.png'),
        ('train_flops', 'training FLOPs', 'by_compute.png'),
    ):
        series: dict[str, set[tuple]] = collections.defaultdict(set)
        for rows in shares:
            for row in _whole(rows):
                if row.get(field):
                    key = f'{row["task"]}, K = {row["k"]}'
                    series[key].add((row[field], row['value'], row['stderr'] or 0.0))
        printed = _printed(shares[0]) if field == 'parameters' else {}
        points = {key: sorted(some) for key, some in series.items() if len(some) > 1}
        if points or printed:
            points = points or {
                key: sorted(some) for key, some in series.items() if f'{key} (paper)' in printed
            }
            path = workdir / name
            plots.lines(points, label, 'score, percent', path, faint=printed, scale='log')
            drawn.append(path)
    return drawn


def _is_share(row: Row) -> bool:
    """Whether it is a task's own metric, and one in percent."""
    own = row['metric'] == fewshot.find(row['task']).metrics[0]
    return own and row['value'] is not None and not any(u in row['metric'] for u in _UNITS)


def _whole(rows: Sequence[Row]) -> list[Row]:
    """The row over all seeds of every task and K."""
    last = {(row['task'], row['k']): row for row in rows}
    return list(last.values())


def _printed(rows: Sequence[Row]) -> dict[str, list[tuple]]:
    """The papers' curves over sizes of the tasks that were scored."""
    found = {}
    for row in _whole(rows):
        curve = [
            (papers.PARAMETERS[name.split()[0]][name.split()[1]], value, 0.0)
            for name, value in row['paper'].items()
        ]
        if len(curve) > 1:
            found[f'{row["task"]}, K = {row["k"]} (paper)'] = sorted(curve)
    return found
