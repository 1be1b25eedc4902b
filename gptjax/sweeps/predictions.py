# SPDX-License-Identifier: Apache-2.0
"""Predictions that are written before a run, and scored when it has ended.

ROOT/predictions/NAME.json holds one: its value and intervals, the fit it is from, when it was made,
whether the run had begun by then; and, once it is scored, what came out.
"""

import contextlib
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from gptjax.configs import errors
from gptjax.runtime import program, results
from gptjax.scaling import bootstrap, laws
from gptjax.storage import buckets, documents

FOLDER = 'predictions'
_SAME_SIZE = 0.02  # of N and of D, between a prediction and its run
_OF_FIT = ('approach', 'form', 'law', 'objective', 'n_points', 'data_digest', 'parameters_counted')
_HEAD = (
    *('made', 'name', 'N', 'D', 'predicted', '90 %', 'measured', 'inside 90 %', 'sigmas'),
    'before the run',
)
_SEED = 0  # of the residuals that are drawn


def predict(
    fit: Mapping[str, Any], n: float, d: float, name: str, run: buckets.Anywhere | None
) -> dict[str, Any]:
    """The prediction of a fit for a model of n parameters trained on d tokens.

    Its spread is that of the fit's bootstrap samples, and of runs around the law: each sample gets
    a residual, drawn from those of the fit and widened by the root of R / (R - P). It is as wide as
    the law allows; that the law is another one, where no run was, is not in it.

    Args:
      run: the workdir it is for; None = not known yet.

    Raises:
      InputError: the fit is of an approach that predicts no losses.
    """
    if 'samples' not in fit:
        raise errors.InputError(
            f'approach {fit["approach"]} says which size is best, and no losses; predict from '
            'approach 3 or kaplan'
        )
    law = laws.LAWS[fit['law']]
    if law.uses != ('n', 'd'):
        raise errors.InputError(
            f'a fit over one column, {fit["approach"]}, does not know the other'
        )
    value = float(law.loss(fit, n, d))
    samples = {name_: np.array(values) for name_, values in fit['samples'].items()}
    rest = np.array(fit['residuals'])
    wider = math.sqrt(len(rest) / max(len(rest) - len(law.names), 1))
    drawn = np.random.default_rng(_SEED).choice(rest - rest.mean(), len(samples[law.names[0]]))
    outcomes = law.loss(samples, n, d) * np.exp(-wider * drawn)
    began = results.began(run) if run is not None else ''
    return {
        'name': name,
        'made': results.now(),
        'n': float(n),
        'd': float(d),
        'value': value,
        'intervals': {
            f'{level:.0%}'.rstrip('%'): list(bootstrap.interval(outcomes, level))
            for level in bootstrap.LEVELS
        },
        'sigma': float(np.std(np.log(outcomes))),  # of the logarithm of the loss
        'beyond_tokens': float(d / fit['ranges']['d'][1]),
        'beyond_flops': float(6 * n * d / fit['ranges']['c'][1]),
        'fit': {key: fit[key] for key in _OF_FIT if key in fit},
        'commit': program.commit(),
        'run': '' if run is None else str(run),
        'run_began': began,
        'made_before_run': not began,
    }


def write(root: buckets.Anywhere, said: Mapping[str, Any]) -> Any:
    """Writes a prediction; one that stands there under its name is never changed.

    Raises:
      InputError: there is one.
    """
    path = _path(root, said['name'])
    if path.exists():
        raise errors.InputError(f'{path} is a prediction already; give another --name')
    path.parent.mkdir(parents=True, exist_ok=True)
    documents.write(path, said)
    return path


def read(root: buckets.Anywhere, name: str) -> dict[str, Any]:
    """A prediction. Raises Damaged where there is none, or it was changed."""
    return documents.read(
        _path(root, name),
        dict,
        'python -m gptjax.scale predict makes one',
        ('value', 'made', 'n', 'd'),
    )


def every(root: buckets.Anywhere) -> list[dict[str, Any]]:
    """All of them, by date; damaged ones left out."""
    found = []
    folder = root / FOLDER
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        with contextlib.suppress(documents.Damaged):
            found.append(documents.read(path, dict, '', ('value', 'made')))
    return sorted(found, key=lambda each: (each['made'], each['name']))


def score(
    root: buckets.Anywhere, said: Mapping[str, Any], row: Mapping[str, Any], run: pathlib.Path | str
) -> dict[str, Any]:
    """The prediction with what came out, which is written.

    Args:
      row: the finished run's: n by the count of the fit, d, loss, began.
      run: its workdir.

    Raises:
      InputError: the run is not of that size and length.
    """
    for field in ('n', 'd'):
        if abs(math.log(row[field] / said[field])) > _SAME_SIZE:
            raise errors.InputError(
                f'{run} has {field} = {row[field]:,.0f}, and the prediction {said["name"]} is for '
                f'{said[field]:,.0f}: another run'
            )
    inside = {level: low <= row['loss'] <= high for level, (low, high) in said['intervals'].items()}
    off = math.log(row['loss'] / said['value'])
    began = row['began'] or said['run_began']
    scored = {
        **said,
        'made_before_run': said['made_before_run'] and not (began and began < said['made']),
        'run': str(run),
        'run_began': began,
        'score': {
            'loss': row['loss'],
            'difference': row['loss'] - said['value'],
            'inside': inside,
            'sigmas': off / said['sigma'] if said['sigma'] else None,
            'scored': results.now(),
        },
    }
    documents.write(_path(root, said['name']), scored)
    return scored


def table(found: list[dict[str, Any]]) -> str:
    """Predictions as a table in Markdown."""
    lines = [f'| {" | ".join(_HEAD)} |', '|---' * len(_HEAD) + '|']
    for each in found:
        low, high = each['intervals']['90']
        ended = each.get('score')
        measured = ('not yet', '', '')
        if ended:
            sigmas = '' if ended['sigmas'] is None else f'{ended["sigmas"]:+.1f}'
            measured = (f'{ended["loss"]:.4f}', 'yes' if ended['inside']['90'] else 'no', sigmas)
        before = 'yes' if each['made_before_run'] else f'no, it began {each["run_began"]}'
        cells = (
            each['made'][:16].replace('T', ' '),
            each['name'],
            f'{each["n"]:,.0f}',
            f'{each["d"]:,.0f}',
            f'{each["value"]:.4f}',
            f'{low:.4f} to {high:.4f}',
            *measured,
            before,
        )
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines) + '\n'


def check_name(name: str) -> None:
    """Raises UsageError where it is none of a file."""
    fine = bool(name) and all(c.isalnum() or c in '.=,+-_' for c in name) and name[0] != '.'
    errors.require(fine, f'--name={name} must be letters, digits and . = , + - _')


def _path(root: buckets.Anywhere, name: str) -> Any:
    check_name(name)
    return root / FOLDER / f'{name}.json'
