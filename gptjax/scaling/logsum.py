# SPDX-License-Identifier: Apache-2.0
"""log L = s * log sum_k exp(t_k), each t_k linear in parameters: the form of all scaling laws here.

Fitted under Huber's function of the residuals of log L, many fits at once: from many starts, of
many bootstrap samples. Newton's method with the exact second derivatives, damped; Huber's delta
comes down from 0.1, as for robust regression by Madsen and Nielsen (1993).
"""

import dataclasses
import math
from typing import NamedTuple

import numpy as np

Array = np.ndarray
_FIRST_DELTA, _SHRINK = 0.1, 0.2
_MOST_STEPS = 60  # of one delta
_ON_THE_WAY = 1e-6  # of the gradient, where a smaller delta comes next
FLAT = 1e-9  # of the gradient: nothing is left to do; a fit may be called converged from here on:
CONVERGED = 1e-6
_CHUNK = 2**21  # numbers in the largest temporary


@dataclasses.dataclass(frozen=True)
class Form:
    """What is fitted, for R runs, K terms and P parameters.

    Attributes:
      terms_KxRxP: t = terms @ parameters + known.
      known_KxR: what of the terms is given; (S, K, R) where every start has its own.
      power: which parameter is s; -1: s is 1.
      low_P, high_P: where parameters may be.
    """

    terms_KxRxP: np.ndarray
    known_KxR: np.ndarray
    power: int
    low_P: np.ndarray
    high_P: np.ndarray

    def of(self, some: np.ndarray | slice) -> 'Form':
        """Of some of the starts."""
        own = self.known_KxR.ndim == 3
        return dataclasses.replace(self, known_KxR=self.known_KxR[some]) if own else self

    def log_loss(self, x_xP: Array) -> Array:
        """log L at every run, (..., R)."""
        log_sum = np.logaddexp.reduce(self._t(x_xP), axis=-2)
        return log_sum if self.power < 0 else log_sum * x_xP[..., self.power, None]

    def derivatives(self, x_SxP: Array) -> tuple[Array, Array, '_Second']:
        """log L (S, R), its gradient (S, R, P), and what its second derivatives are made of."""
        t_SxKxR = self._t(x_SxP)
        log_sum = np.logaddexp.reduce(t_SxKxR, axis=1)
        share_SxKxR = np.exp(t_SxKxR - log_sum[:, None])
        mean_SxRxP = np.einsum('skr,krp->srp', share_SxKxR, self.terms_KxRxP)
        if self.power < 0:
            return log_sum, mean_SxRxP, _Second(share_SxKxR, mean_SxRxP, None)
        s = x_SxP[:, self.power, None]
        slope = mean_SxRxP * s[..., None]
        slope[..., self.power] += log_sum
        return log_sum * s, slope, _Second(share_SxKxR, mean_SxRxP, s)

    def curvature(self, second: '_Second', by_SxR: Array) -> Array:
        """The second derivatives of log L, summed over runs with weights: (S, P, P)."""
        share_SxKxR, mean_SxRxP, s = second
        by = by_SxR if s is None else by_SxR * s
        spread = np.einsum(
            'sr,skr,krp,krq->spq',
            by,
            share_SxKxR,
            self.terms_KxRxP,
            self.terms_KxRxP,
            optimize=True,
        ) - np.einsum('sr,srp,srq->spq', by, mean_SxRxP, mean_SxRxP, optimize=True)
        if s is not None:
            cross = np.einsum('sr,srp->sp', by_SxR, mean_SxRxP)
            spread[:, self.power, :] += cross
            spread[:, :, self.power] += cross
        return spread

    def _t(self, x_xP: Array) -> Array:
        return np.einsum('krp,...p->...kr', self.terms_KxRxP, x_xP) + self.known_KxR


class _Second(NamedTuple):
    share_SxKxR: np.ndarray
    mean_SxRxP: np.ndarray
    s: np.ndarray | None


class Found(NamedTuple):
    """Minima, one a start.

    Attributes:
      value_S: of the objective, the weighted sum of Huber's function.
      gradient_S: its norm at the end, as a share of the most it can be; parameters at a bound
        aside.
    """

    x_SxP: np.ndarray
    value_S: np.ndarray
    gradient_S: np.ndarray


def huber(residual: Array, delta: float) -> tuple[Array, Array, Array]:
    """Huber's function, its slope, and its curvature."""
    size = np.abs(residual)
    inner = size <= delta
    rho = np.where(inner, 0.5 * residual * residual, delta * (size - 0.5 * delta))
    return rho, np.clip(residual, -delta, delta), inner.astype(np.float64)


def minimise(
    form: Form,
    log_loss_R: Array,
    starts_SxP: Array,
    delta: float,
    weights_SxR: Array | None = None,
    flat: float = FLAT,
) -> Found:
    """The minimum near each start.

    Args:
      delta: Huber's.
      weights_SxR: of the runs, for each start; None = 1.
      flat: the gradient, as a share of the most it can be, at which a start has come to its end.
    """
    runs, starts = len(log_loss_R), len(starts_SxP)
    if weights_SxR is None:
        weights_SxR = np.ones((starts, runs))
    at_once = max(1, _CHUNK // (runs * form.terms_KxRxP.shape[0] * form.terms_KxRxP.shape[2]))
    parts = []
    for some in (slice(i, i + at_once) for i in range(0, starts, at_once)):
        given = starts_SxP[some], delta, weights_SxR[some], flat
        parts.append(_minimised(form.of(some), log_loss_R, *given))
    return Found(*(np.concatenate(each) for each in zip(*parts, strict=True)))


def _minimised(
    form: Form, log_loss_R: Array, x: Array, delta: float, weights: Array, flat: float
) -> Found:
    x = np.clip(x, form.low_P, form.high_P)
    deltas = [delta]
    while deltas[-1] < _FIRST_DELTA:
        deltas.append(min(deltas[-1] / _SHRINK, _FIRST_DELTA))
    for each in reversed(deltas):
        steps = _MOST_STEPS * (5 if each == delta else 1)
        problem = _Problem(form, log_loss_R, each, weights)
        x = _descended(problem, x, steps, flat if each == delta else _ON_THE_WAY)
    problem = _Problem(form, log_loss_R, delta, weights)
    value, slope, _ = problem.derivatives(x)
    most = delta * weights.sum(axis=1)
    return Found(x, value, np.linalg.norm(_free(form, x, slope), axis=1) / most)


class _Problem(NamedTuple):
    form: Form
    log_loss_R: np.ndarray
    delta: float
    weights_SxR: np.ndarray

    def value(self, x: Array) -> Array:
        rho, _, _ = huber(self.form.log_loss(x) - self.log_loss_R, self.delta)
        return (self.weights_SxR * rho).sum(axis=1)

    def derivatives(self, x: Array) -> tuple[Array, Array, Array]:
        """The objective, its gradient and its second derivatives."""
        fitted, slope_SxRxP, second = self.form.derivatives(x)
        rho, by, bend = huber(fitted - self.log_loss_R, self.delta)
        weights = self.weights_SxR
        gradient = np.einsum('sr,srp->sp', weights * by, slope_SxRxP)
        outer = np.einsum(
            'sr,srp,srq->spq', weights * bend, slope_SxRxP, slope_SxRxP, optimize=True
        )
        curved = outer + self.form.curvature(second, weights * by)
        return (weights * rho).sum(axis=1), gradient, curved

    def of(self, some: np.ndarray | slice) -> '_Problem':
        return self._replace(form=self.form.of(some), weights_SxR=self.weights_SxR[some])


def _descended(whole: _Problem, x: Array, steps: int, flat: float) -> Array:
    """Damped Newton steps, each start by itself, until none moves."""
    form, delta = whole.form, whole.delta
    x, damping = x.copy(), np.full(len(x), 1e-3)
    active = np.arange(len(x))
    for _ in range(steps):
        problem = whole.of(active)
        here = x[active]
        value, slope, curved = problem.derivatives(here)
        free = _free(form, here, slope)
        step = _newton(free, curved, damping[active], delta * problem.weights_SxR.sum(axis=1))
        there = np.clip(here + step, form.low_P, form.high_P)
        with np.errstate(over='ignore', invalid='ignore'):
            better = problem.value(there) < value
        x[active[better]] = there[better]
        damping[active] = np.where(better, damping[active] * 0.2, damping[active] * 5)
        size = np.linalg.norm(free, axis=1) / (delta * problem.weights_SxR.sum(axis=1))
        # Where even the smallest steps are no better, numbers have no more digits.
        goes_on = (size > flat) & (damping[active] < 1e12)
        active = active[goes_on]
        if not len(active):
            break
    return x


def _newton(slope: Array, curved: Array, damping: Array, scale: Array) -> Array:
    """Steps: along every eigenvector downhill, by the size of its curvature and the damping."""
    fixed = slope == 0
    curved = np.where(fixed[:, :, None] | fixed[:, None, :], 0.0, curved)
    bends, ways = np.linalg.eigh(curved)
    along = np.einsum('spq,sp->sq', ways, slope)
    bends = np.abs(bends) + (damping * scale)[:, None]
    return -np.einsum('spq,sq->sp', ways, along / np.maximum(bends, 1e-300))


def _free(form: Form, x: Array, slope: Array) -> Array:
    """The gradient without what pushes a parameter over its bound."""
    held = ((x <= form.low_P) & (slope > 0)) | ((x >= form.high_P) & (slope < 0))
    return np.where(held, 0.0, slope)


def scale_of(residual_R: Array, delta: float, weights_R: Array | None = None) -> float:
    """The scale that maximises the likelihood of residuals under Huber's density.

    Where the sum of slope(z) z is the number of runs, z = residual / scale; that falls with the
    scale, and is found by bisection.
    """
    weights = np.ones_like(residual_R) if weights_R is None else weights_R

    def excess(log_scale: float) -> float:
        z = residual_R / math.exp(log_scale)
        return float((weights * (np.clip(z, -delta, delta) * z)).sum() - weights.sum())

    low, high = -60.0, 10.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return math.exp((low + high) / 2)
