# SPDX-License-Identifier: Apache-2.0
"""Intervals by the bootstrap (Efron 1979): runs are drawn again, with replacement, and fitted."""

from collections.abc import Mapping

import numpy as np

from gptjax.scaling import laws, logsum, parametric

LEVELS = (0.5, 0.9)
UNITS = ('points', 'runs')


def draws(groups: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """How often each row is drawn, (samples, R).

    Args:
      groups: a name a row; rows of one name are drawn together.
    """
    names, rows = np.unique(groups, return_inverse=True)
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=samples)
    return counts[:, rows].astype(np.float64)


def numbers(law: laws.Law, fit: parametric.Fit, weights_SxR: np.ndarray) -> dict[str, np.ndarray]:
    """A law's numbers in each sample, each (S,): every fit begins at that of all runs.

    Samples whose fit did not converge are nan.
    """
    delta = parametric.DELTA * (fit.scale or 1.0)
    starts = np.repeat(fit.x_P[None], len(weights_SxR), axis=0)
    found = logsum.minimise(law.form, law.log_loss_R, starts, delta, weights_SxR)
    unsettled = found.gradient_S > 1e3 * logsum.CONVERGED
    named = law.named(found.x_SxP)
    return {name: np.where(unsettled, np.nan, values) for name, values in named.items()}


def interval(samples_xS: np.ndarray, level: float) -> tuple[float, float]:
    """The middle share of samples, by percentiles; nan ones aside."""
    low, high = np.nanquantile(samples_xS, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def intervals(samples: Mapping[str, np.ndarray]) -> dict[str, dict[str, list[float]]]:
    """Level in percent -> name -> low and high."""
    return {
        f'{level:.0%}'.rstrip('%'): {
            name: list(interval(values, level)) for name, values in samples.items()
        }
        for level in LEVELS
    }
