# SPDX-License-Identifier: Apache-2.0
"""Runs as the fits take them: parameters, tokens and loss of each, checked."""

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from gptjax.configs import errors

_MOST_NAMED = 3
_BITS = float(np.log(1 / np.log(2)))  # a nat in bits, logarithm


class Runs(NamedTuple):
    """Models that were trained, an array of R numbers for each of these.

    Attributes:
      names: of the runs; rows of one name are one run at several moments.
      n: parameters. d: tokens. c: FLOPs. loss: nats a token.
    """

    names: np.ndarray
    n: np.ndarray
    d: np.ndarray
    c: np.ndarray
    loss: np.ndarray

    def of(self, some: np.ndarray) -> 'Runs':
        """Those that a mask or numbers of rows say."""
        return Runs(*(column[some] for column in self))

    def __len__(self) -> int:
        return len(self.names)

    @property
    def digest(self) -> str:
        """A hash of all numbers, in any order of the rows."""
        rows = sorted(zip(*(column.tolist() for column in self), strict=True))
        return hashlib.sha256(repr(rows).encode()).hexdigest()[:16]


def make(
    names: np.ndarray, n: np.ndarray, d: np.ndarray, loss: np.ndarray, c: np.ndarray | None = None
) -> Runs:
    """Runs whose numbers can be fitted.

    Args:
      c: FLOPs; None = 6 n d.

    Raises:
      InputError: a number is missing, not finite or not above 0; two rows are the same run at the
        same moment.
    """
    columns = {'n': n, 'd': d, 'loss': loss} | ({} if c is None else {'c': c})
    for name, column in columns.items():
        wrong = ~(np.isfinite(column) & (column > 0))
        _check(
            not wrong.any(),
            f'{name} must be above 0 in every row: {_named(names, column, wrong)}; leave such rows '
            'out (--where), or mend them',
        )
    given = (n, d, 6.0 * n * d if c is None else c, loss)
    found = Runs(np.asarray(names, dtype=str), *(np.asarray(x, np.float64) for x in given))
    _check_repeated(found)
    return found


def without_highest(runs: Runs, number: int) -> tuple[Runs, list[str]]:
    """Runs without those of the highest losses, and the names of these."""
    _check(0 <= number < len(runs), f'--drop_highest={number} of {len(runs)} rows leaves none')
    order = np.argsort(runs.loss, kind='stable')
    kept, dropped = order[: len(runs) - number], order[len(runs) - number :]
    return runs.of(np.sort(kept)), [str(name) for name in runs.names[dropped]]


def _check_repeated(runs: Runs) -> None:
    seen: dict[tuple[float, float], int] = {}
    for row, key in enumerate(
        zip(runs.names.tolist(), runs.n.tolist(), runs.d.tolist(), strict=True)
    ):
        _check(
            key not in seen,
            f'rows {seen.get(key, 0) + 1} and {row + 1} are one run at one moment: {key[0]}; keep '
            'one of them',
        )
        seen[key] = row


def check_units(runs: Runs) -> None:
    """Raises InputError where losses are in nats and in bits side by side.

    A rough law explains all of them far better, once some are taken for bits.
    """
    if len(runs) < 8:
        return
    u, v = (np.log(x) - np.log(x).mean() for x in (runs.n, runs.d))
    x = np.stack(
        [np.ones(len(runs)), u, v, u * u, v * v, u * v][: 6 if len(runs) >= 12 else 3], axis=1
    )
    y = np.log(runs.loss)
    plain = _spread(x, y)
    found = [(_spread(x, y - _BITS * bits), bits) for bits in _splits(x, y)]
    spread, bits = min(found, key=lambda each: each[0])
    if plain > 0.05 and spread < 0.35 * plain and 0 < bits.sum() < len(runs):
        name = runs.names[bits][0]
        raise errors.InputError(
            f'{int(bits.sum())} of {len(runs)} losses look like bits a token among nats, 1.44 '
            f'times as high as the others say, as that of {name}; give all of them in nats'
        )


def _splits(x: np.ndarray, y: np.ndarray) -> Iterator[np.ndarray]:
    """Guesses at which losses are in bits, each improved until it stays."""
    rest = y - x @ np.linalg.lstsq(x, y, rcond=None)[0]
    for share in (0.5, 0.7, 0.85, 0.95):
        bits = rest > np.quantile(rest, share)
        for _ in range(20):
            weights = np.linalg.lstsq(x, y - _BITS * bits, rcond=None)[0]
            again = y - x @ weights > 0.5 * _BITS
            if (again == bits).all():
                break
            bits = again
        yield bits


def _spread(x: np.ndarray, y: np.ndarray) -> float:
    rest = y - x @ np.linalg.lstsq(x, y, rcond=None)[0]
    return float(np.sqrt(np.mean(rest**2)))


def _named(names: np.ndarray, column: np.ndarray, wrong: np.ndarray) -> str:
    found = [f'{names[i]} has {column[i]:g}' for i in np.flatnonzero(wrong)[:_MOST_NAMED]]
    more = int(wrong.sum()) - len(found)
    return ', '.join(found) + (f' and {more} more' if more else '')


def _check(condition: object, message: str) -> None:
    if not condition:
        raise errors.InputError(message)
