# SPDX-License-Identifier: Apache-2.0
"""Laws of the loss: which numbers each has, and how it is a sum of exponentials of logarithms.

chinchilla  E + A / N^alpha + B / D^beta                        Hoffmann et al. 2022, equation 2
kaplan      ((N_c / N)^(alpha_N / alpha_D) + D_c / D)^alpha_D   Kaplan et al. 2020, equation 1.5
power       (x_c / x)^alpha                                     the same, equations 1.1 to 1.3
offset      E + A / x^alpha                                     with an irreducible loss

Losses are in nats a token; N in parameters, D in tokens, x in either or in FLOPs.
"""

import abc
import itertools
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from gptjax.scaling import logsum

Values = np.ndarray | np.floating | float
Numbers = Mapping[str, Any]  # a law's, by name: Values, one or one a sample
_RANGE = (1e-3, 4.0)  # of exponents
_STEEPEST = 30.0  # of a power law: that of the critical batch over the loss is 1 / 0.21
_LEAST = -20.0  # of the logarithm of a term, beside the loss: what is as good as nothing
# Where a term would be 1 nat, far from all data: no more than a name for the height of the curve
# (Kaplan et al. 2020, section 1.2: they "do not have a fundamental meaning").
SCALES = frozenset({'A', 'B', 'N_c', 'D_c', 'x_c'})


class Law(abc.ABC):
    """A law on data: the same numbers, as they are known and as they are fitted.

    What is fitted is centred at the means of the logarithms of the data.

    Attributes:
      names: of its numbers. uses: the columns it is of.
    """

    names: ClassVar[tuple[str, ...]]
    uses: ClassVar[tuple[str, ...]]
    form: logsum.Form
    log_loss_R: np.ndarray  # as it is fitted

    @abc.abstractmethod
    def starts(self) -> np.ndarray:
        """Where to begin, (S, P)."""

    @abc.abstractmethod
    def named(self, x_SxP: np.ndarray) -> dict[str, np.ndarray]:
        """The numbers of fits, each (S,)."""

    @staticmethod
    @abc.abstractmethod
    def loss(numbers: Numbers, *columns: Values) -> Values:
        """Nats a token; numbers and columns broadcast."""

    def at_bounds(self, x_P: np.ndarray) -> list[str]:
        """What is wrong with a fit: numbers that ran to the end of where they may be."""
        low, high = self.form.low_P, self.form.high_P
        held = (x_P <= low + 1e-9) | (x_P >= high - 1e-9)
        return [name for name, at in zip(self._fitted, held, strict=True) if at]

    _fitted: ClassVar[tuple[str, ...]]


class Chinchilla(Law):
    """E + A / N^alpha + B / D^beta."""

    names = ('E', 'A', 'B', 'alpha', 'beta')
    uses = ('n', 'd')
    _fitted = ('A', 'B', 'E', 'alpha', 'beta')

    def __init__(self, n: np.ndarray, d: np.ndarray, loss: np.ndarray) -> None:
        self.at = np.log(n).mean(), np.log(d).mean(), np.log(loss).mean()
        u, v = np.log(n) - self.at[0], np.log(d) - self.at[1]
        one, none = np.ones_like(u), np.zeros_like(u)
        terms = (
            (one, none, none, -u, none),
            (none, one, none, none, -v),
            (none, none, one, none, none),
        )
        self.form = logsum.Form(
            np.stack([np.stack(term, axis=-1) for term in terms]),
            np.zeros((3, len(u))),
            -1,
            np.array([_LEAST] * 3 + [_RANGE[0]] * 2),
            np.array([5.0] * 3 + [_RANGE[1]] * 2),
        )
        self.log_loss_R = np.log(loss) - self.at[2]

    def starts(self) -> np.ndarray:
        shares = ((-1.5, -1.5, -0.5), (-1.0, -3.0, -1.0), (-3.0, -1.0, -1.0), (-2.0, -2.0, -3.0))
        exponents = itertools.product((0.1, 0.3, 0.6, 1.2), repeat=2)
        found = itertools.product(shares, exponents)
        return np.array([[*share, *pair] for share, pair in found])

    def named(self, x_SxP: np.ndarray) -> dict[str, np.ndarray]:
        a, b, e, alpha, beta = x_SxP.T
        log_n, log_d, log_loss = self.at
        scales = e + log_loss, a + log_loss + alpha * log_n, b + log_loss + beta * log_d
        return dict(zip(self.names, (*map(np.exp, scales), alpha, beta), strict=True))

    @staticmethod
    def loss(numbers: Numbers, *columns: Values) -> Values:
        n, d = columns
        e, a, b, alpha, beta = (numbers[name] for name in Chinchilla.names)
        return e + a * n**-alpha + b * d**-beta


class Kaplan(Law):
    """((N_c / N)^(alpha_N / alpha_D) + D_c / D)^alpha_D."""

    names = ('alpha_N', 'alpha_D', 'N_c', 'D_c')
    uses = ('n', 'd')
    _fitted = ('N_c', 'alpha_N', 'D_c', 'alpha_D')

    def __init__(self, n: np.ndarray, d: np.ndarray, loss: np.ndarray) -> None:
        self.at = np.log(n).mean(), np.log(d).mean()
        u, v = np.log(n) - self.at[0], np.log(d) - self.at[1]
        one, none = np.ones_like(u), np.zeros_like(u)
        terms = ((one, -u, none, none), (none, none, one, none))
        self.form = logsum.Form(
            np.stack([np.stack(term, axis=-1) for term in terms]),
            np.stack([none, -v]),
            3,
            np.array([-1e3, 1e-3, -1e3, _RANGE[0]]),
            np.array([1e3, 1e3, 1e3, _RANGE[1]]),
        )
        self.log_loss_R = np.log(loss)

    def starts(self) -> np.ndarray:
        found = []
        middle = self.log_loss_R.mean()
        for s, ratio, share in itertools.product(
            (0.05, 0.1, 0.3), (0.3, 0.8, 2.0), (0.1, 0.5, 0.9)
        ):
            whole = middle / s
            found.append([whole + np.log(share), ratio, whole + np.log1p(-share), s])
        return np.array(found)

    def named(self, x_SxP: np.ndarray) -> dict[str, np.ndarray]:
        p, ratio, q, s = x_SxP.T
        scales = np.exp(p / ratio + self.at[0]), np.exp(q + self.at[1])
        return dict(zip(self.names, (ratio * s, s, *scales), strict=True))

    @staticmethod
    def loss(numbers: Numbers, *columns: Values) -> Values:
        n, d = columns
        of_n, of_d, n_c, d_c = (numbers[name] for name in Kaplan.names)
        return ((n_c / n) ** (of_n / of_d) + d_c / d) ** of_d


class Power(Law):
    """(x_c / x)^alpha."""

    names = ('alpha', 'x_c')
    uses = ('x',)
    _fitted = ('x_c', 'alpha')

    def __init__(self, x: np.ndarray, loss: np.ndarray) -> None:
        self.at = np.log(x).mean()
        u = np.log(x) - self.at
        terms = np.stack([np.ones_like(u), -u], axis=-1)[None]
        low, high = np.array([-1e3, _RANGE[0]]), np.array([1e3, _STEEPEST])
        self.form = logsum.Form(terms, np.zeros((1, len(u))), -1, low, high)
        self.log_loss_R = np.log(loss)

    def starts(self) -> np.ndarray:
        return np.array([[self.log_loss_R.mean(), alpha] for alpha in (0.05, 0.3)])

    def named(self, x_SxP: np.ndarray) -> dict[str, np.ndarray]:
        a, alpha = x_SxP.T
        return {'alpha': alpha, 'x_c': np.exp(a / alpha + self.at)}

    @staticmethod
    def loss(numbers: Numbers, *columns: Values) -> Values:
        return (numbers['x_c'] / columns[0]) ** numbers['alpha']


class Offset(Law):
    """E + A / x^alpha."""

    names = ('E', 'A', 'alpha')
    uses = ('x',)
    _fitted = ('A', 'E', 'alpha')

    def __init__(self, x: np.ndarray, loss: np.ndarray) -> None:
        self.at = np.log(x).mean(), np.log(loss).mean()
        u = np.log(x) - self.at[0]
        one, none = np.ones_like(u), np.zeros_like(u)
        terms = np.stack([np.stack([one, none, -u], axis=-1), np.stack([none, one, none], axis=-1)])
        low, high = (np.array([end, end, exponent]) for end, exponent in _ENDS)
        self.form = logsum.Form(terms, np.zeros((2, len(u))), -1, low, high)
        self.log_loss_R = np.log(loss) - self.at[1]

    def starts(self) -> np.ndarray:
        shares = ((-0.7, -0.7), (-2.0, -0.2), (-0.2, -2.0))
        return np.array([[*share, alpha] for share in shares for alpha in (0.05, 0.2, 0.5, 1.0)])

    def named(self, x_SxP: np.ndarray) -> dict[str, np.ndarray]:
        a, e, alpha = x_SxP.T
        scale = np.exp(a + self.at[1] + alpha * self.at[0])
        return {'E': np.exp(e + self.at[1]), 'A': scale, 'alpha': alpha}

    @staticmethod
    def loss(numbers: Numbers, *columns: Values) -> Values:
        return numbers['E'] + numbers['A'] * columns[0] ** -numbers['alpha']


_ENDS = ((_LEAST, _RANGE[0]), (5.0, _RANGE[1]))
LAWS: dict[str, type[Law]] = {
    'chinchilla': Chinchilla,
    'kaplan': Kaplan,
    'power': Power,
    'offset': Offset,
}
