# SPDX-License-Identifier: Apache-2.0
"""Which size is best at a budget, read off runs: approaches 1 and 2 of Hoffmann et al. 2022.

Approach 1 (section 3.1): at every budget the run whose loss is lowest there, of models that were
scored along their training. Approach 2 (section 3.2): at each of a few budgets the vertex of a
parabola through losses over log N. Both end in N* = k_N C^a and D* = k_D C^b.
"""

from typing import NamedTuple

import numpy as np

from gptjax.configs import errors
from gptjax.scaling import runs as runs_lib

SAME_BUDGET = 0.08  # runs that differ by less are of one budget: they end after whole steps
_PLACES = 1500  # of the envelope (section 3.1)
_LEAST = 3  # sizes of a parabola; budgets, or sizes, of a power law


class Optima(NamedTuple):
    """The best size and length at each of B budgets; S samples, the first of all runs.

    Attributes:
      loss_SxB: there; nats a token. Where a sample gives none, nan.
    """

    c_B: np.ndarray
    n_SxB: np.ndarray
    d_SxB: np.ndarray
    loss_SxB: np.ndarray


class PowerLaw(NamedTuple):
    """y = exp(log_scale) * x ** exponent, of each sample."""

    exponent_S: np.ndarray
    log_scale_S: np.ndarray

    def at(self, x: float) -> np.ndarray:
        """y of each sample."""
        return np.exp(self.log_scale_S + self.exponent_S * np.log(x))


def budgets(runs: runs_lib.Runs) -> list[np.ndarray]:
    """The rows of each budget, by rising budget."""
    order = np.argsort(runs.c, kind='stable')
    ends = np.flatnonzero(np.diff(np.log(runs.c[order])) > np.log1p(SAME_BUDGET)) + 1
    return np.split(order, ends)


def vertices(runs: runs_lib.Runs, weights_SxR: np.ndarray) -> tuple[Optima, list[str]]:
    """Approach 2: the vertex of each budget's parabola, and what is wrong with budgets left out.

    Args:
      weights_SxR: how often each run counts in each sample; the first are those of all runs.

    Raises:
      InputError: fewer than three budgets have a vertex among their sizes.
    """
    kept, columns, said = [], [], []
    for rows in budgets(runs):
        budget = f'{np.exp(np.log(runs.c[rows]).mean()):.3g} FLOPs'
        sizes = len(np.unique(runs.n[rows]))
        if sizes < _LEAST:
            said.append(f'{budget}: {sizes} sizes, a parabola wants {_LEAST}')
            continue
        log_n, log_d = np.log(runs.n[rows]), np.log(runs.d[rows])
        n, loss = _vertex(log_n, runs.loss[rows], weights_SxR[:, rows])
        d, _ = _vertex(log_d, runs.loss[rows], weights_SxR[:, rows])
        if not (log_n.min() <= n[0] <= log_n.max()):
            said.append(f'{budget}: the lowest loss is at an end of its sizes, or beyond')
            continue
        kept.append(np.exp(np.log(runs.c[rows]).mean()))
        columns.append((np.exp(n), np.exp(d), loss))
    _check_enough(len(kept), 'budgets have a vertex among their sizes', said)
    return Optima(np.array(kept), *(np.stack(x, axis=1) for x in zip(*columns, strict=True))), said


def envelope(runs: runs_lib.Runs, weights_SxR: np.ndarray) -> Optima:
    """Approach 1: at 1,500 budgets, the size and length of the run with the lowest loss there.

    Budgets at which the smallest or the largest model is the best are left out: a still smaller or
    larger one might be better.

    Args:
      runs: several rows a run, along its training.

    Raises:
      InputError: runs have single rows, or fewer than three sizes are anywhere the best.
    """
    names = np.unique(runs.names)
    curves = [np.flatnonzero(runs.names == name) for name in names]
    curves = [rows[np.argsort(runs.c[rows])] for rows in curves]
    if max(map(len, curves)) < 2:
        raise errors.InputError(
            'approach 1 reads losses along training, and every run has one row alone; give a table '
            'with a row for each evaluation, rows of a run under one name'
        )
    curves = [rows for rows in curves if len(rows) > 1]
    ends = np.log(np.concatenate([runs.c[rows] for rows in curves]))
    places = np.linspace(ends.min(), ends.max(), _PLACES)
    losses = np.stack([_along(places, np.log(runs.c[rows]), runs.loss[rows]) for rows in curves])
    log_d = np.stack(
        [_along(places, np.log(runs.c[rows]), np.log(runs.d[rows])) for rows in curves]
    )
    sizes = np.array([runs.n[rows[0]] for rows in curves])
    drawn = np.stack([weights_SxR[:, rows[0]] for rows in curves], axis=1) > 0
    found = []
    for some in drawn:
        known = np.where(some[:, None], losses, np.inf)
        best = np.argmin(known, axis=0)
        at = np.take_along_axis(known, best[None], axis=0)[0]
        n = sizes[best]
        inner = np.isfinite(at) & (n > sizes[some].min()) & (n < sizes[some].max())
        d = np.exp(np.take_along_axis(log_d, best[None], axis=0)[0])
        found.append([np.where(inner, x, np.nan) for x in (n, d, at)])
    n, d, loss = (np.stack(each) for each in zip(*found, strict=True))
    _check_enough(len(np.unique(n[0][~np.isnan(n[0])])), 'sizes are the best at some budget', [])
    there = ~np.isnan(n[0])
    return Optima(np.exp(places[there]), n[:, there], d[:, there], loss[:, there])


def power_law(x_B: np.ndarray, y_SxB: np.ndarray) -> PowerLaw:
    """Least squares of log y over log x, sample by sample; of what is there of each."""
    log_x, log_y = np.log(x_B), np.log(y_SxB)
    there = np.isfinite(log_y)
    count = np.maximum(there.sum(axis=1), 1)
    x = np.where(there, log_x, 0.0)
    y = np.where(there, log_y, 0.0)
    x_mean, y_mean = x.sum(axis=1) / count, y.sum(axis=1) / count
    x = np.where(there, log_x - x_mean[:, None], 0.0)
    spread = (x * x).sum(axis=1)
    enough = (spread > 0) & (there.sum(axis=1) >= _LEAST)
    slope = np.where(enough, (x * y).sum(axis=1) / np.where(enough, spread, 1.0), np.nan)
    return PowerLaw(slope, y_mean - slope * x_mean)


def _vertex(x_R: np.ndarray, y_R: np.ndarray, weights_SxR: np.ndarray) -> tuple:
    """(place, height) of the lowest point of weighted parabolas, each (S,); nan of hills."""
    x = x_R - x_R.mean()
    powers = np.stack([np.ones_like(x), x, x * x], axis=1)
    normal = np.einsum('sr,rp,rq->spq', weights_SxR, powers, powers)
    right = np.einsum('sr,rp,r->sp', weights_SxR, powers, y_R)
    distinct = np.array([len(np.unique(x_R[w > 0])) for w in weights_SxR])
    fine = distinct >= _LEAST
    normal[~fine] = np.eye(3)
    c0, c1, c2 = np.linalg.solve(normal, right[..., None])[..., 0].T
    fine &= c2 > 0
    c2 = np.where(fine, c2, 1.0)
    place, height = -c1 / (2 * c2), c0 - c1 * c1 / (4 * c2)
    return np.where(fine, place + x_R.mean(), np.nan), np.where(fine, height, np.nan)


def _along(places: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Straight lines between points; inf outside them."""
    return np.interp(places, x, y, left=np.inf, right=np.inf)


def _check_enough(there: int, what: str, said: list[str]) -> None:
    if there < _LEAST:
        why = f' ({"; ".join(said)})' if said else ''
        raise errors.InputError(
            f'{there} {what}, and a power law wants {_LEAST}{why}; run more of them'
        )
