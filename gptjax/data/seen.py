# SPDX-License-Identifier: Apache-2.0
"""Which hashes have been seen, in 16 bytes each."""

import numpy as np
from jaxtyping import Bool, UInt64


class Seen:
    """A set of pairs of numbers: sorted arrays, each at least twice as long as the next one."""

    def __init__(self) -> None:
        self._levels: list[np.ndarray] = []  # (N 2), by their first numbers, which all differ
        self._others: set[tuple[int, ...]] = set()  # whose first number another pair has, too

    def add(self, pairs_Nx2: UInt64[np.ndarray, 'N 2']) -> Bool[np.ndarray, ' N']:
        """Adds pairs; whether each is new."""
        order_N = np.lexsort(pairs_Nx2.T[::-1])  # stable: of equal ones the first stands first
        ordered_Nx2 = pairs_Nx2[order_N]
        differs_N = np.ones(len(pairs_Nx2), bool)
        differs_N[1:] = (ordered_Nx2[1:] != ordered_Nx2[:-1]).any(axis=1)
        order, pairs = order_N[differs_N], ordered_Nx2[differs_N]
        shares, known = np.zeros(len(pairs), bool), np.zeros(len(pairs), bool)
        shares[1:] = pairs[1:, 0] == pairs[:-1, 0]
        for level in self._levels:
            place = np.minimum(np.searchsorted(level[:, 0], pairs[:, 0]), len(level) - 1)
            same = level[place] == pairs
            known |= same.all(axis=1)
            shares |= same[:, 0]
        for i in np.flatnonzero(shares & ~known):
            pair = tuple(pairs[i].tolist())
            known[i] = pair in self._others
            self._others.add(pair)
        self._grow(pairs[~known & ~shares])
        new_N = np.zeros(len(pairs_Nx2), bool)
        new_N[order[~known]] = True
        return new_N

    def _grow(self, level: np.ndarray) -> None:
        while self._levels and len(self._levels[-1]) < 2 * len(level):
            level = np.concatenate([self._levels.pop(), level])
            level = level[np.argsort(level[:, 0], kind='stable')]
        if len(level):
            self._levels.append(level)
