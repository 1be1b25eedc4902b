# SPDX-License-Identifier: Apache-2.0
"""From runs to a result that can be written: numbers, intervals, frontier; or why there is none.

A result is a dict as its JSON has it: what was fitted to what, by which objective and outlier rule,
the law's numbers, their intervals, and the bootstrap samples that predictions are made from.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gptjax.configs import errors
from gptjax.scaling import bootstrap, frontier, laws, parametric, profiles
from gptjax.scaling import runs as runs_lib

APPROACHES = {
    '1': 'envelope of losses along training',
    '2': 'isoFLOP profiles',
    '3': 'E + A / N^alpha + B / D^beta',
    'kaplan': '((N_c / N)^(alpha_N / alpha_D) + D_c / D)^alpha_D',
    'n': 'lowest loss over parameters',
    'd': 'lowest loss over tokens',
    'c': 'lowest loss over FLOPs',
    'batch': 'gradient noise scale in tokens over the loss, (x_c / L)^alpha',
}
_OF_TWO = {'3': laws.Chinchilla, 'kaplan': laws.Kaplan}
_OF_ONE = {'power': laws.Power, 'offset': laws.Offset}
LAWS_OF_ONE = tuple(_OF_ONE)
_WIDEST = 10.0  # an interval of 90 % whose ends differ by a larger factor holds no number
_MOST_LOST = 0.2  # of bootstrap samples that give no fit
_LEAST_SIZES = 3
_DIGITS = 10  # of samples
BIAS = (
    'parabolas are biased where the grid of sizes is wide or off its vertex and alpha is not beta, '
    'on data without noise too (arXiv 2603.22339); approach 3 is not'
)


class Unsupported(errors.InputError):
    """Data that do not hold the numbers of a law."""


@dataclasses.dataclass(frozen=True)
class Options:
    """How a fit is made.

    Attributes:
      approach: one of APPROACHES.
      law: of approaches n, d and c: power, or offset with an irreducible loss.
      unit: what the bootstrap draws: points, rows by themselves; or runs, all rows of a name.
        Approach 1 draws runs, approach 2 residuals.
      budgets: FLOPs at which the frontier is told.
      allow_wide: give exponents and irreducible losses whose intervals are wide, too. Scales (A, B,
        N_c, ...) are given in any case, with a warning: they stand for the height of the curve, and
        are as wide as their exponents make them.
    """

    approach: str
    objective: parametric.Objective = 'huber_sum'
    method: parametric.Method = 'lbfgs'
    law: str = 'power'
    unit: str = 'points'
    samples: int = 1000
    seed: int = 0
    budgets: Sequence[float] = ()
    allow_wide: bool = False

    def __post_init__(self) -> None:
        for name, known in (
            ('approach', tuple(APPROACHES)),
            ('objective', parametric.OBJECTIVES),
            ('method', parametric.METHODS),
            ('law', LAWS_OF_ONE),
            ('unit', bootstrap.UNITS),
        ):
            errors.require_choice(self, name, known)
        errors.require_between(self, 20, 10**6, 'samples')


def fit(runs: runs_lib.Runs, options: Options) -> dict[str, Any]:
    """The result of an approach.

    Args:
      runs: of approach batch, `c` is the loss and `loss` the noise scale.

    Raises:
      Unsupported: too few runs or sizes, a number at the end of where it may be, an interval wider
        than a factor of 10. InputError: what the approach says.
    """
    if options.approach == 'batch':
        return _common(runs, options) | _of_law(runs, options, laws.Power(runs.c, runs.loss))
    runs_lib.check_units(runs)
    common = _common(runs, options)
    if options.approach in ('1', '2'):
        return common | _of_optima(runs, options)
    if options.approach in _OF_TWO:
        return common | _of_law(runs, options, _OF_TWO[options.approach](*_columns(runs, 'nd')))
    runs = _pareto(runs) if options.approach == 'c' else _lowest(runs, options.approach)
    common['n_points'] = len(runs)
    column = _columns(runs, options.approach)
    return common | _of_law(runs, options, _OF_ONE[options.law](*column))


def _common(runs: runs_lib.Runs, options: Options) -> dict[str, Any]:
    """What every result says of what was fitted."""
    return {
        'approach': options.approach,
        'form': APPROACHES[options.approach],
        'n_points': len(runs),
        'data_digest': runs.digest,
        'bootstrap': {
            'unit': {'1': 'runs', '2': 'residuals'}.get(options.approach, options.unit),
            'samples': options.samples,
            'seed': options.seed,
        },
        'ranges': {
            name: [float(column.min()), float(column.max())]
            for name, column in zip(('n', 'd', 'c', 'loss'), runs[1:], strict=True)
        },
    }


def _columns(runs: runs_lib.Runs, names: str) -> list[np.ndarray]:
    """The columns of a law, and the losses. Raises Unsupported where one hardly varies."""
    found = []
    for name in names:
        column = getattr(runs, name)
        different = len(np.unique(column))
        if different < _LEAST_SIZES:
            what = {'n': 'sizes', 'd': 'lengths', 'c': 'budgets'}[name]
            raise Unsupported(
                f'{different} {what} among {len(runs)} runs do not show how the loss depends on '
                f'{name}; {_LEAST_SIZES} are the least'
            )
        found.append(column)
    return [*found, runs.loss]


def _of_law(runs: runs_lib.Runs, options: Options, law: laws.Law) -> dict[str, Any]:
    found = parametric.fit(law, options.objective, options.method)
    if found.at_bounds:
        raise Unsupported(
            f'the fit runs to where {" and ".join(found.at_bounds)} may not go further: the '
            f'{len(runs)} runs do not hold it; add sizes or lengths farther apart'
        )
    groups = runs.names if options.unit == 'runs' else np.arange(len(runs)).astype(str)
    drawn = bootstrap.draws(groups, options.samples, options.seed)
    samples = bootstrap.numbers(law, found, drawn)
    lost = float(np.isnan(samples[law.names[0]]).mean())
    _check_lost(lost)
    held = {name: samples[name] for name in law.names if name not in laws.SCALES}
    warnings = _wide(held, options)
    scales = {name: samples[name] for name in law.names if name in laws.SCALES}
    warnings += _wide(scales, dataclasses.replace(options, allow_wide=True))
    two = options.approach in _OF_TWO
    more: dict[str, Any] = {}
    if two:
        best, of_samples = (
            functools.partial(frontier.optimum, found.law, numbers)
            for numbers in (found.numbers, samples)
        )
        places = [_place(c, best(c), of_samples(c), options) for c in options.budgets]
        exponents = _exponents(best(1.0).exponent, of_samples(1.0).exponent)
        more = {'exponents': exponents, 'flops': '6 N D', 'frontier': places}
    return {
        'law': found.law,
        'objective': found.objective,
        'delta': parametric.DELTA,
        'method': found.method,
        'value': found.value,
        'gradient': found.gradient,
        'scale': found.scale,
        **found.numbers,
        'intervals': bootstrap.intervals(samples),
        'lost_samples': lost,
        'warnings': warnings,
        **more,
        'residuals': found.residual_R.tolist(),
        'samples': {name: _rounded(values) for name, values in samples.items()},
    }


def _of_optima(runs: runs_lib.Runs, options: Options) -> dict[str, Any]:
    said: list[str] = []
    if options.approach == '2':
        optima, said = profiles.vertices(runs, options.samples, options.seed)
        said = [f'left out: {each}' for each in said] + [BIAS]
    else:
        groups = runs.names  # a curve is one run
        drawn = bootstrap.draws(groups, options.samples, options.seed)
        optima = profiles.envelope(runs, np.concatenate([np.ones((1, len(runs))), drawn]))
    n = profiles.power_law(optima.c_B, optima.n_SxB)
    d = profiles.power_law(optima.c_B, optima.d_SxB)
    loss = profiles.power_law(optima.c_B, optima.loss_SxB)
    lost = float(np.isnan(n.exponent_S[1:]).mean())
    _check_lost(lost)
    samples = {
        'exponent_n': n.exponent_S,
        'exponent_d': d.exponent_S,
        'exponent_loss': loss.exponent_S,
    }
    budgets = options.budgets or (float(optima.c_B[-1]),)
    places = []
    for c in budgets:
        at = [law.at(c) for law in (n, d, loss)]
        first, rest = ([x[0] for x in at], [x[1:] for x in at])
        of_first = frontier.Optimum(*first, n.exponent_S[0])
        of_rest = frontier.Optimum(*rest, n.exponent_S[1:])
        places.append(_place(c, of_first, of_rest, options))
    few = slice(None, None, max(1, len(optima.c_B) // 50))
    return {
        **{name: float(values[0]) for name, values in samples.items()},
        'coefficients': {
            name: float(np.exp(law.log_scale_S[0])) for name, law in (('n', n), ('d', d))
        },
        'intervals': bootstrap.intervals({name: x[1:] for name, x in samples.items()}),
        'lost_samples': lost,
        'warnings': said + _wide({name: x[1:] for name, x in samples.items()}, options),
        'optima': {
            'c': optima.c_B[few].tolist(),
            'n': optima.n_SxB[0][few].tolist(),
            'd': optima.d_SxB[0][few].tolist(),
            'loss': optima.loss_SxB[0][few].tolist(),
        },
        'frontier': places,
    }


def _lowest(runs: runs_lib.Runs, column: str) -> runs_lib.Runs:
    """Of each size, or of each length, the run with the lowest loss."""
    x = getattr(runs, column)
    order = np.lexsort((runs.loss, x))
    first = np.concatenate([[True], np.diff(x[order]) > 0])
    return runs.of(order[first])


def _pareto(runs: runs_lib.Runs) -> runs_lib.Runs:
    """Runs that none with fewer FLOPs beats."""
    order = np.lexsort((runs.loss, runs.c))
    best = np.minimum.accumulate(runs.loss[order])
    first = np.concatenate([[True], best[1:] < best[:-1]])
    return runs.of(order[first])


def _exponents(n: laws.Values, samples: np.ndarray) -> dict[str, Any]:
    """Of N* over C, and of D*: together they are 1."""
    of_samples = {'n': samples, 'd': 1 - samples}
    return {'n': float(n), 'd': 1 - float(n), 'intervals': bootstrap.intervals(of_samples)}


def _place(
    c: float, found: frontier.Optimum, samples: frontier.Optimum, options: Options
) -> dict[str, Any]:
    """What is best at a budget; None for what is not known to a factor of 10."""
    values = {
        'n': found.n,
        'd': found.d,
        'loss': found.loss,
        'tokens_per_parameter': found.d / found.n,
    }
    drawn = {
        'n': samples.n,
        'd': samples.d,
        'loss': samples.loss,
        'tokens_per_parameter': samples.d / samples.n,
    }
    wide = {name for name, values in drawn.items() if _is_wide(values) and not options.allow_wide}
    told = {name: None if name in wide else float(value) for name, value in values.items()}
    return {'c': float(c), **told, 'intervals': bootstrap.intervals(drawn)}


def _wide(samples: Mapping[str, np.ndarray], options: Options) -> list[str]:
    """What is known to a factor of 10 at best. Raises Unsupported, unless that is allowed."""
    found = [name for name, values in samples.items() if _is_wide(values)]
    said = []
    for name in found:
        low, high = bootstrap.interval(samples[name], 0.9)
        said.append(f'{name} lies between {low:.3g} and {high:.3g}')
    if said and not options.allow_wide:
        raise Unsupported(
            f'the runs do not hold these numbers: {"; ".join(said)} (90 % of the bootstrap, wider '
            f'than a factor of {_WIDEST:g}); add runs farther apart, or say --allow_wide, and the '
            'result says so'
        )
    return said


def _is_wide(values: np.ndarray) -> bool:
    low, high = bootstrap.interval(values, 0.9)
    same_sign = low * high > 0
    return not same_sign or max(abs(low), abs(high)) > _WIDEST * min(abs(low), abs(high))


def _check_lost(lost: float) -> None:
    if lost > _MOST_LOST:
        raise Unsupported(
            f'{lost:.0%} of the bootstrap samples give no fit: too few runs hold these numbers'
        )


def _rounded(values: np.ndarray) -> list[float]:
    return [float(f'{value:.{_DIGITS}g}') for value in values if np.isfinite(value)]
