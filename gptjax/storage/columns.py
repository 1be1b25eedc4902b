# SPDX-License-Identifier: Apache-2.0
"""Arrays on disk that are longer than memory: columns, and rows of them that are sorted.

Rows are sorted in memory so many at a time, written as runs, and merged.
"""

import errno
import itertools
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from gptjax.storage import files

Rows = tuple[np.ndarray, ...]  # of unsigned integers: they compare by the first, then by the next


class Column:
    """One axis of numbers in a file, written from the front, then read anywhere.

    The file is open while it is written to or read: there may be thousands of them.
    """

    def __init__(self, path: pathlib.Path, dtype: np.dtype | type) -> None:
        self.path, self.dtype, self._length = path, np.dtype(dtype), 0
        with files.naming(path):
            path.touch(exist_ok=False)

    def __len__(self) -> int:
        return self._length

    def append(self, array: np.ndarray) -> None:
        """Adds numbers behind the others."""
        with files.naming(self.path), self.path.open('ab') as file:
            file.write(np.ascontiguousarray(array, self.dtype).data)
        self._length += len(array)

    def read(self, start: int, stop: int) -> np.ndarray:
        """The numbers from start to stop, or to the end."""
        stop = min(stop, self._length)
        found = np.empty(max(stop - start, 0), self.dtype)
        with files.naming(self.path), self.path.open('rb') as file:
            file.seek(start * self.dtype.itemsize)
            if file.readinto(found.view(np.uint8)) != found.nbytes:
                raise OSError(errno.EIO, 'is shorter than what was written', str(self.path))
        return found

    def mapped(self) -> np.ndarray:
        """All numbers, in pages that the system may give up."""
        if not self._length:
            return np.zeros(0, self.dtype)
        return np.memmap(self.path, self.dtype, 'r')

    def remove(self) -> None:
        """Gives the disk back."""
        self.path.unlink()


class Table:
    """Columns of the same length: those of a row's key, then of what belongs to it."""

    def __init__(self, path: pathlib.Path, *dtypes: np.dtype | type) -> None:
        """Args: path: begins the names of the files."""
        places = (path.with_name(f'{path.name}.{number}') for number in range(len(dtypes)))
        self.columns = [Column(*each) for each in zip(places, dtypes, strict=True)]

    def __len__(self) -> int:
        return len(self.columns[0])

    def append(self, *arrays: np.ndarray) -> None:
        """Adds rows."""
        for column, array in zip(self.columns, arrays, strict=True):
            column.append(array)

    def read(self, start: int, stop: int) -> list[np.ndarray]:
        """The columns of the rows from start to stop, or to the end."""
        return [column.read(start, stop) for column in self.columns]

    def remove(self) -> None:
        """Gives the disk back."""
        for column in self.columns:
            column.remove()


class Sorter:
    """Takes rows in any order, gives them sorted."""

    def __init__(self, path: pathlib.Path, rows: int, add: bool) -> None:
        """Where and how.

        Args:
          path: begins the names of the files.
          rows: so many are in memory at once.
          add: values of equal keys become one, their sum; else all of them stay, in any order.
        """
        self._path, self._rows, self._add = path, rows, add
        self._held: list[tuple[np.ndarray, ...]] = []
        self._n_held = 0
        self._runs: list[Table] = []

    def put(self, keys: Rows, values: np.ndarray) -> None:
        """Takes rows; each call at most as many as are held at once."""
        self._held.append((*keys, values))
        self._n_held += len(values)
        if self._n_held >= self._rows:
            self._write()

    def blocks(self) -> Iterator[tuple[Rows, np.ndarray]]:
        """All rows, sorted; equal keys are never in two blocks. What was on disk is removed."""
        if not self._runs:
            if self._held:
                yield self._sorted()
            return
        if self._held:
            self._write()
        at = [0] * len(self._runs)
        usual = share = max(1, self._rows // (2 * len(self._runs)))  # with what is sorted already
        while any(start < len(run) for start, run in zip(at, self._runs, strict=True)):
            blocks = [run.read(i, i + share) for i, run in zip(at, self._runs, strict=True)]
            # What is read of a run may end among equal rows: those up to the first such end wait.
            ends = (
                key_of(block[:-1], -1)
                for start, run, block in zip(at, self._runs, blocks, strict=True)
                if start + share < len(run)
            )
            end = min(ends, default=None)
            stops = [len(b[0]) if end is None else _before(b, end) for b in blocks]
            at = [start + stop for start, stop in zip(at, stops, strict=True)]
            if any(stops):
                parts = zip(blocks, stops, strict=True)
                self._held = [tuple(column[:stop] for column in block) for block, stop in parts]
                del blocks
                yield self._sorted()
            share = usual if any(stops) else 2 * share
        for run in self._runs:
            run.remove()
        self._runs.clear()

    def _sorted(self) -> tuple[Rows, np.ndarray]:
        columns = [np.concatenate(parts) for parts in zip(*self._held, strict=True)]
        self._held.clear()
        self._n_held = 0
        order = _order_of(columns[:-1])
        for number, column in enumerate(columns):
            columns[number] = column[order]
        *keys, values = columns
        if self._add:
            first = np.flatnonzero(is_new(keys))
            keys = [key[first] for key in keys]
            values = np.add.reduceat(values, first, dtype=values.dtype)
        return tuple(keys), values

    def _write(self) -> None:
        keys, values = self._sorted()
        path = self._path.with_name(f'{self._path.name}-{len(self._runs)}')
        run = Table(path, *(key.dtype for key in keys), values.dtype)
        run.append(*keys, values)
        self._runs.append(run)


def is_new(keys: Sequence[np.ndarray]) -> np.ndarray:
    """Of sorted rows: whether each differs from the one before it."""
    new = np.zeros(len(keys[0]), bool)
    new[:1] = True
    for key in keys:
        new[1:] |= key[1:] != key[:-1]
    return new


def places(table: Sequence[np.ndarray], asked: Sequence[np.ndarray]) -> np.ndarray:
    """Where sorted rows, all of which are there, stand in a table of sorted, distinct ones."""
    if len(table) == 1:
        return np.searchsorted(table[0], asked[0])
    joined = [np.concatenate(each) for each in zip(table, asked, strict=True)]
    order = np.lexsort(joined[::-1])  # stable: the table's row stands before those that ask for it
    is_table = order < len(table[0])
    return (np.cumsum(is_table) - 1)[~is_table]


def key_of(keys: Sequence[np.ndarray], row: int) -> tuple[int, ...]:
    """The key of a row, to be compared."""
    return tuple(int(key[row]) for key in keys)


def chunks(length: int, size: int) -> Iterator[tuple[int, int]]:
    """From 0 to length, so many at a time."""
    return itertools.pairwise([*range(0, length, size), length])


def pieces(ends: np.ndarray, most: int) -> Iterator[tuple[int, int]]:
    """Consecutive parts of what ends at these places: at most so much each, or one alone."""
    start, begun = 0, 0
    while start < len(ends):
        stop = max(start + 1, int(np.searchsorted(ends, begun + most, side='right')))
        yield start, stop
        start, begun = stop, int(ends[stop - 1])


def _order_of(keys: Sequence[np.ndarray]) -> np.ndarray:
    """The order in which rows are sorted."""
    order = np.argsort(keys[-1])
    for key in keys[-2::-1]:
        order = order[np.argsort(key[order], kind='stable')]
    return order


def _before(block: Sequence[np.ndarray], key: tuple[int, ...]) -> int:
    """How many rows of a sorted block are below a key."""
    low, high = 0, len(block[0])
    while low < high:
        middle = (low + high) // 2
        if key_of(block[:-1], middle) < key:
            low = middle + 1
        else:
            high = middle
    return low
