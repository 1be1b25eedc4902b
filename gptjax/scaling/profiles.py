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


def vertices(runs: runs_lib.Runs, samples: int, seed: int) -> tuple[Optima, list[str]]:
    """Approach 2: the vertex of each budget's parabola, and what is wrong with budgets left out.

    Samples have the same sizes, and losses of the parabolas with residuals drawn from those of all
    budgets, as shares of the loss and widened for what the parabolas took up: five sizes, drawn
    again as they are, would often be too few for a parabola.

    Args:
      samples: behind the first, which is of the losses as they are.

    Raises:
      InputError: fewer than three budgets have a vertex among their sizes.
    """
    kept, said = [], []
    for rows in budgets(runs):
        profile = _Profile(runs.of(rows))
        why = profile.wrong()
        said += [f'{profile.c:.3g} FLOPs: {why}'] if why else []
        kept += [] if why else [profile]
    _check_enough(len(kept), 'budgets have a vertex among their sizes', said)
    pool = np.concatenate([profile.residuals() for profile in kept])
    free = max(sum(len(profile.runs) - 3 for profile in kept), 3)
    pool *= np.sqrt(free / (free - 2))  # their own spread is known from few: Student's t
    rng = np.random.default_rng(seed)
    columns = []
    for profile in kept:
        drawn = rng.choice(pool, (samples, len(profile.runs)))
        losses = np.concatenate([profile.runs.loss[None], profile.fitted * (1 + drawn)])
        columns.append(profile.optimum(losses))
    places = (np.stack(x, axis=1) for x in zip(*columns, strict=True))
    return Optima(np.array([profile.c for profile in kept]), *places), said


class _Profile:
    """The runs of a budget, and a parabola through their losses over log N."""

    def __init__(self, runs: runs_lib.Runs) -> None:
        self.runs, self.c = runs, float(np.exp(np.log(runs.c).mean()))
        self._powers = _powers(np.log(runs.n))
        self._hat = self._powers @ np.linalg.pinv(self._powers)
        self.fitted = self._hat @ runs.loss

    def wrong(self) -> str:
        """Why it has no vertex; '' = it has one."""
        sizes = len(np.unique(self.runs.n))
        if sizes < _LEAST:
            return f'{sizes} sizes, and a parabola wants {_LEAST}'
        n = self.optimum(self.runs.loss[None])[0][0]
        inside = self.runs.n.min() <= n <= self.runs.n.max()
        return '' if inside else 'the lowest loss is at an end of its sizes, or beyond'

    def residuals(self) -> np.ndarray:
        """As shares of the loss, and as wide as those of new runs are (leverages taken out)."""
        free = np.maximum(1 - np.diag(self._hat), 1e-9)
        rest = (self.runs.loss - self.fitted) / self.fitted
        return np.where(free > 1e-6, rest / np.sqrt(free), 0.0)

    def optimum(self, losses_SxR: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Size, length and loss at the vertex of parabolas through losses; nan of hills."""
        n, loss = _vertex(np.log(self.runs.n), losses_SxR)
        d, _ = _vertex(np.log(self.runs.d), losses_SxR)
        return np.exp(n), np.exp(d), loss


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
    there = np.isfinite(y_SxB) & (y_SxB > 0)
    log_x, log_y = np.log(x_B), np.log(np.where(there, y_SxB, 1.0))
    count = np.maximum(there.sum(axis=1), 1)
    x = np.where(there, log_x, 0.0)
    y = np.where(there, log_y, 0.0)
    x_mean, y_mean = x.sum(axis=1) / count, y.sum(axis=1) / count
    x = np.where(there, log_x - x_mean[:, None], 0.0)
    spread = (x * x).sum(axis=1)
    enough = (spread > 0) & (there.sum(axis=1) >= _LEAST)
    slope = np.where(enough, (x * y).sum(axis=1) / np.where(enough, spread, 1.0), np.nan)
    return PowerLaw(slope, y_mean - slope * x_mean)


def _powers(x_R: np.ndarray) -> np.ndarray:
    x = x_R - x_R.mean()
    return np.stack([np.ones_like(x), x, x * x], axis=1)


def _vertex(x_R: np.ndarray, y_SxR: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Place and height of the lowest points of parabolas, each (S,); nan of hills."""
    c0, c1, c2 = (y_SxR @ np.linalg.pinv(_powers(x_R)).T).T
    fine = c2 > 0
    c2 = np.where(fine, c2, 1.0)
    place, height = x_R.mean() - c1 / (2 * c2), c0 - c1 * c1 / (4 * c2)
    return np.where(fine, place, np.nan), np.where(fine, height, np.nan)


def _along(places: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Straight lines between points; inf outside them."""
    return np.interp(places, x, y, left=np.inf, right=np.inf)


def _check_enough(there: int, what: str, said: list[str]) -> None:
    if there < _LEAST:
        why = f' ({"; ".join(said)})' if said else ''
        raise errors.InputError(
            f'{there} {what}, and a power law wants {_LEAST}{why}; run more of them'
        )
