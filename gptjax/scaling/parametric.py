# SPDX-License-Identifier: Apache-2.0
"""A law fitted to runs: its numbers, how they were found, and whether the runs support them.

Objectives, of the residuals r = log L - log loss:
- 'huber_sum': the sum of Huber's function with delta 1e-3 (Hoffmann et al. 2022, section 3.3; a
  mean in its place made an optimiser stop early: Besiroglu et al. 2024);
- 'huber_scaled': minus the log likelihood of the density that belongs to it, its scale fitted too,
  as Besiroglu et al. maximise it.

Methods, which agree: 'lbfgs', all numbers at once by L-BFGS from a grid of starts; 'projection' (of
chinchilla), E, A and B inside, from non-negative least squares on, and a search over alpha and beta
outside (Golub and Pereyra 1973). Newton's method gives the last digits of both, and no more: a
search that stopped before its minimum is an error.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from scipy import optimize

from gptjax.configs import errors
from gptjax.scaling import laws, logsum

DELTA = 1e-3
OBJECTIVES, METHODS = ('huber_sum', 'huber_scaled'), ('lbfgs', 'projection')
Objective = Literal['huber_sum', 'huber_scaled']
Method = Literal['lbfgs', 'projection']
# Of starts (Hoffmann et al. 2022, section D.3): a, b, e, alpha, beta.
GRID = (
    (0, 5, 10, 15, 20, 25),
    (0, 5, 10, 15, 20, 25),
    (-1, -0.5, 0, 0.5, 1),
    (0, 0.5, 1, 1.5, 2),
    (0, 0.5, 1, 1.5, 2),
)
_DESCENTS = 8  # by L-BFGS
_COARSE = 1e-5  # of the gradient inside a grid
_SIDE, _FINEST = 7, 1e-5  # of the grids over alpha and beta, each around the best of the last
_KINKED = 1e-6  # a delta below which the objective is one of absolute values in effect
_SAME = 1e-8  # of the objective, between the end of a search and the minimum
_EXACT = 1e-12  # of residuals: there are none but by rounding
_ROUNDS = 20  # of delta and scale of 'huber_scaled'
_NORM = math.sqrt(2 * math.pi) * math.erf(DELTA / math.sqrt(2)) + 2 / DELTA * math.exp(
    -(DELTA**2) / 2
)


class Fit(NamedTuple):
    """A law's numbers, and how they were found.

    Attributes:
      value: of the objective.
      gradient: its norm at the end, as a share of the most it can be: at most logsum.CONVERGED.
      scale: of the residuals, fitted; 0 of 'huber_sum'.
      at_bounds: numbers that ran to the end of where they may be: the data do not hold them.
      residual_R: log L - log loss.
    """

    law: str
    numbers: dict[str, float]
    objective: str
    method: str
    value: float
    gradient: float
    scale: float
    n_points: int
    at_bounds: list[str]
    residual_R: np.ndarray
    x_P: np.ndarray  # as it was fitted

    def loss(self, *columns: laws.Values) -> laws.Values:
        """Nats a token, of other columns."""
        return laws.LAWS[self.law].loss(self.numbers, *columns)


def fit(law: laws.Law, objective: Objective = 'huber_sum', method: Method = 'lbfgs') -> Fit:
    """The minimum of an objective for a law on its data.

    Raises:
      InputError: there are fewer runs than numbers, or the fit did not converge.
    """
    runs, numbers = len(law.log_loss_R), len(law.names)
    if runs < numbers + 1:
        raise errors.InputError(
            f'{runs} runs do not support a law of {numbers} numbers; {numbers + 1} are the least'
        )
    search = _by_lbfgs if method == 'lbfgs' else _by_projection
    delta, scale = DELTA, 0.0
    x = search(law, delta)
    if objective == 'huber_scaled':
        x, scale = _scaled(law, x, search)
        delta *= scale
    x, gradient = _settled(law, x, delta)
    residual = law.form.log_loss(x) - law.log_loss_R
    value = _value(residual, scale)
    named = {name: float(value_S[0]) for name, value_S in law.named(x[None]).items()}
    name = next(name for name, kind in laws.LAWS.items() if isinstance(law, kind))
    return Fit(
        name, named, objective, method, value, gradient, scale, runs, law.at_bounds(x), residual, x
    )


def _value(residual: np.ndarray, scale: float) -> float:
    """Of the objective."""
    rho, _, _ = logsum.huber(residual / (scale or 1.0), DELTA)
    return float(rho.sum() + (len(residual) * math.log(scale * _NORM) if scale else 0.0))


def _scaled(
    law: laws.Law, x: np.ndarray, search: Callable[..., np.ndarray]
) -> tuple[np.ndarray, float]:
    """The minimum where the scale is fitted, too: each in turn until both stay.

    The second search is of a delta so small that absolute values are summed in effect, and their
    minimum hardly moves with the scale any more.
    """
    scale, found = 0.0, search
    for _ in range(_ROUNDS):
        before = scale
        residual = law.form.log_loss(x) - law.log_loss_R
        scale = logsum.scale_of(residual, DELTA)
        if np.abs(residual).max() < _EXACT or abs(scale - before) <= 1e-9 * scale:
            break
        x = found(law, DELTA * scale, x)
        found = _refined
    return x, scale


def _refined(law: laws.Law, delta: float, x: np.ndarray) -> np.ndarray:
    return logsum.minimise(law.form, law.log_loss_R, x[None], delta).x_SxP[0]


def _by_lbfgs(law: laws.Law, delta: float, x: np.ndarray | None = None) -> np.ndarray:
    """From the grid of starts, or from one, to the lowest minimum."""
    form, y = law.form, law.log_loss_R

    def objective(x: np.ndarray) -> tuple[float, np.ndarray]:
        fitted, slope, _ = form.derivatives(x[None])
        rho, by, _ = logsum.huber(fitted[0] - y, delta)
        return float(rho.sum()) / delta, by @ slope[0] / delta

    bounds = list(zip(form.low_P, form.high_P, strict=True))
    options = {'maxiter': 2_000, 'maxfun': 5_000, 'ftol': 0.0, 'gtol': 1e-10, 'maxcor': 20}
    ends = [
        optimize.minimize(
            objective, start, jac=True, method='L-BFGS-B', bounds=bounds, options=options
        )
        for start in (_starts(law, delta) if x is None else x[None])
    ]
    # Its line search gives up early in narrow valleys: Newton's method goes on from every end.
    places = np.array([end.x for end in ends])
    if x is None:
        places = np.concatenate([places, law.starts()])
    found = logsum.minimise(form, y, places, delta)
    return found.x_SxP[np.argmin(found.value_S)]


def _starts(law: laws.Law, delta: float) -> np.ndarray:
    """Some of the law's own; of chinchilla the best of the paper's grid, unlike in exponents."""
    if not isinstance(law, laws.Chinchilla):
        return law.starts()[::4]
    log_n, log_d, log_loss = law.at
    a, b, e, alpha, beta = np.array(list(itertools.product(*GRID)), np.float64).T
    centred = (a - alpha * log_n - log_loss, b - beta * log_d - log_loss, e - log_loss, alpha, beta)
    grid = np.clip(np.stack(centred, axis=1), law.form.low_P, law.form.high_P)
    values = np.concatenate(
        [
            logsum.huber(law.form.log_loss(part) - law.log_loss_R, delta)[0].sum(axis=1)
            for part in np.array_split(grid, 1 + grid.size * len(law.log_loss_R) // 2**21)
        ]
    )
    best: dict[tuple[float, float], int] = {}
    for row in np.argsort(values, kind='stable'):
        best.setdefault((alpha[row], beta[row]), int(row))
    return grid[list(best.values())[:_DESCENTS]]


def _by_projection(law: laws.Law, delta: float, x: np.ndarray | None = None) -> np.ndarray:
    """Over alpha and beta alone; the three scales are at their minimum for each pair."""
    if not isinstance(law, laws.Chinchilla):
        raise errors.UsageError('--method=projection is of the law chinchilla')
    kinked = delta < _KINKED
    pair = _searched(law, delta, x, _FINEST * (1e-6 if kinked else 1.0))
    if not kinked:  # the slope has digits where the objective has none any more
        slope = functools.partial(_slope, law, delta)
        ended = optimize.root(slope, pair, options={'xtol': 1e-13}).x
        ends = [pair, np.clip(ended, law.form.low_P[3:], law.form.high_P[3:])]
        pair = min(ends, key=lambda end: np.linalg.norm(slope(end)))
    return np.concatenate([_inside(law, delta, pair[None]).x_SxP[0], pair])


def _searched(
    law: laws.Chinchilla, delta: float, x: np.ndarray | None, finest: float
) -> np.ndarray:
    """Grids of alpha and beta, each finer and around the best of the last; x: where to begin."""
    low, high = law.form.low_P[3:], law.form.high_P[3:]
    middle, width = (np.array([0.6, 0.6]), 0.55) if x is None else (x[3:], 0.05)
    steps = np.array(list(itertools.product(np.linspace(-1, 1, _SIDE), repeat=2)))
    while width > finest:
        pairs = np.clip(middle + width * steps, low, high)
        best = int(np.argmin(_inside(law, delta, pairs, _COARSE).value_S))
        middle = pairs[best]
        inside = np.abs(steps[best]).max() < 1  # else the minimum may lie outside
        width *= 2.5 / (_SIDE - 1) if inside else 1.5
    return middle


def _inside(
    law: laws.Chinchilla, delta: float, pairs_Sx2: np.ndarray, flat: float = logsum.FLAT
) -> logsum.Found:
    """The logarithms of A, B and E, none of them negative, where each alpha and beta is given."""
    terms, bounds = law.form.terms_KxRxP, (law.form.low_P[:3], law.form.high_P[:3])
    known = np.einsum('krp,sp->skr', terms[:, :, 3:], pairs_Sx2)
    loss = np.exp(law.log_loss_R)  # least squares of residuals as shares of it
    held = [optimize.nnls(np.exp(each).T / loss[:, None], np.ones_like(loss))[0] for each in known]
    starts = np.log(np.maximum(held, np.exp(bounds[0])))
    form = logsum.Form(terms[:, :, :3], known, -1, *bounds)
    return logsum.minimise(form, law.log_loss_R, starts, delta, flat=flat)


def _slope(law: laws.Chinchilla, delta: float, pair: np.ndarray) -> np.ndarray:
    """Of the objective by alpha and beta: the three scales, at their minimum, add nothing."""
    pair = np.clip(pair, law.form.low_P[3:], law.form.high_P[3:])
    three = _inside(law, delta, pair[None]).x_SxP[0]
    fitted, slope, _ = law.form.derivatives(np.concatenate([three, pair])[None])
    _, by, _ = logsum.huber(fitted[0] - law.log_loss_R, delta)
    return (by @ slope[0])[3:] / delta


def _settled(law: laws.Law, x: np.ndarray, delta: float) -> tuple[np.ndarray, float]:
    """The minimum that a search has come to, in its last digits, and the gradient there.

    Raises:
      InputError: the search has stopped before it: the objective falls further, or is not flat.
    """

    def height(x: np.ndarray) -> float:
        return float(logsum.huber(law.form.log_loss(x) - law.log_loss_R, delta)[0].sum())

    found = logsum.minimise(law.form, law.log_loss_R, x[None], delta)
    end, gradient = found.x_SxP[0], float(found.gradient_S[0])
    if np.abs(law.form.log_loss(end) - law.log_loss_R).max() < _EXACT:
        return end, gradient  # rounding is all that it is of
    if height(end) < height(x) * (1 - _SAME) or gradient > logsum.CONVERGED:
        raise errors.InputError(
            f'the fit did not converge: its gradient is {gradient:.1e} of the most it can be, '
            f'{logsum.CONVERGED:.0e} are allowed; --objective=huber_sum is easier than huber_scaled'
        )
    return end, gradient
