# SPDX-License-Identifier: Apache-2.0
"""Estimating an n-gram model: interpolated modified Kneser-Ney smoothing.

Chen and Goodman 1998 (TR-10-98, section 3): the highest order is discounted from its counts, each
lower one from the number of distinct tokens that precede an n-gram. The empty context falls back to
the uniform distribution, so that no token is impossible. Text begins with a boundary that counts as
a preceding token but is never predicted.
"""

import contextlib
import dataclasses
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Integer

from gptjax.configs import errors
from gptjax.storage import files

# Where a count of counts is zero or a discount leaves its range, these are used for that order, as
# by KenLM's --discount_fallback: for counts of 1, 2, and 3 or more.
FALLBACK = (0.5, 1.0, 1.5)
MERGE_ROWS = 1 << 20  # rows of each run that are merged at once


@dataclasses.dataclass(frozen=True)
class Config:
    """The ngram section of configs/base.py."""

    memory_tokens: int

    def __post_init__(self) -> None:
        errors.require_positive(self, 'memory_tokens')


def estimate(
    sequences: Iterable[Iterable[np.ndarray]],
    order: int,
    n_vocab: int,
    memory_tokens: int,
    folder: pathlib.Path | None = None,
    progress: Callable[[int], None] = lambda tokens: None,
) -> dict[str, dict[str, np.ndarray]]:
    """The parameters of ngram.NGram.

    Args:
      sequences: texts that are not joined, each in pieces of token ids.
      order: n; at least 1.
      n_vocab: ids are below it.
      memory_tokens: n-grams counted in memory at once; more are sorted in runs on disk and merged.
        The distinct n-grams themselves must fit.
      folder: where the runs go, in a folder that nobody else uses; None = the system's temporary
        one.
      progress: is told the tokens counted.

    Raises:
      InputError: there is no token, or an id is out of range.
    """
    keys = _Keys(order, n_vocab)
    rows, counts = _count(sequences, keys, memory_tokens, folder, progress)
    tables = _tables(rows, counts, keys)
    return _smooth(tables, n_vocab)


def discounts(adjusted: Integer[np.ndarray, ' N']) -> tuple[float, float, float]:
    """Discounts of counts of 1, 2 and 3 or more, one order (Chen and Goodman 1998, equation 26)."""
    t1, t2, t3, t4 = (int(np.count_nonzero(adjusted == k)) for k in (1, 2, 3, 4))
    if not (t1 and t2 and t3 and t4):
        return FALLBACK
    y = t1 / (t1 + 2 * t2)
    found = (1 - 2 * y * t2 / t1, 2 - 3 * y * t3 / t2, 3 - 4 * y * t4 / t3)
    in_range = all(0 < d <= k for k, d in enumerate(found, 1))  # none: nothing left for others
    return found if in_range else FALLBACK


class _Keys:
    """n-grams as sortable words: as many tokens in each uint64 as fit, earlier tokens first."""

    def __init__(self, order: int, n_vocab: int) -> None:
        self.order, self.boundary = order, n_vocab
        self._bits = max(1, int(n_vocab).bit_length())
        self._per_word = 64 // self._bits
        self.words = -(-order // self._per_word)

    def pack(self, rows: np.ndarray) -> np.ndarray:
        packed = np.zeros((len(rows), self.words), np.uint64)
        for column in range(self.order):
            word, place = divmod(column, self._per_word)
            shift = np.uint64(self._bits * (self._per_word - 1 - place))
            packed[:, word] |= rows[:, column].astype(np.uint64) << shift
        return packed

    def column(self, packed: np.ndarray, column: int) -> np.ndarray:
        word, place = divmod(column, self._per_word)
        shift = np.uint64(self._bits * (self._per_word - 1 - place))
        return ((packed[:, word] >> shift) & np.uint64((1 << self._bits) - 1)).astype(np.int64)


def _count(
    sequences: Any, keys: Any, memory_tokens: int, folder: Any, progress: Callable[[int], None]
) -> tuple[np.ndarray, np.ndarray]:
    """Distinct n-grams, packed and sorted, and how often each occurs."""
    with _runs_folder(folder) as runs:
        paths: list[pathlib.Path] = []
        held: list[np.ndarray] = []
        for rows in _rows(sequences, keys, memory_tokens):
            held.append(rows)
            progress(len(rows))
            if sum(map(len, held)) >= memory_tokens:
                paths.append(_write_run(pathlib.Path(runs), len(paths), _distinct(keys, held)))
                held.clear()
        if not paths:
            if not held:
                raise errors.InputError('there is no token to count')
            return _distinct(keys, held)
        if held:
            paths.append(_write_run(pathlib.Path(runs), len(paths), _distinct(keys, held)))
        merged = list(_merge([_Run(path) for path in paths]))
    return np.concatenate([r for r, _ in merged]), np.concatenate([c for _, c in merged])


@contextlib.contextmanager
def _runs_folder(folder: pathlib.Path | None) -> Iterator[str]:
    """A folder for runs, removed afterwards; what an ended process left of it goes first."""
    if folder is None:
        with tempfile.TemporaryDirectory(prefix='ngrams-') as runs:
            yield runs
        return
    own = folder / '.ngrams'
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir(parents=True)
    try:
        yield str(own)
    finally:
        shutil.rmtree(own, ignore_errors=True)


def _rows(sequences: Any, keys: Any, memory_tokens: int) -> Iterator[np.ndarray]:
    """The n-gram that ends at each token, boundaries in front of each sequence."""
    for sequence in sequences:
        before = np.full(keys.order - 1, keys.boundary, np.int64)
        for whole in sequence:
            for start in range(0, len(whole), memory_tokens):
                piece = np.asarray(whole[start : start + memory_tokens], np.int64)
                if piece.size and not 0 <= piece.min() <= piece.max() < keys.boundary:
                    raise errors.InputError(
                        f'a token id is outside 0 .. {keys.boundary - 1}; use a larger n_vocab'
                    )
                joined = np.concatenate([before, piece])
                before = joined[len(joined) - (keys.order - 1) :]
                yield np.lib.stride_tricks.sliding_window_view(joined, keys.order)


def _distinct(keys: _Keys, held: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    packed = np.concatenate([keys.pack(rows) for rows in held])
    return _reduce(packed, np.ones(len(packed), np.int64))


def _reduce(packed: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorts rows; equal ones become one, their counts added."""
    order = np.lexsort(packed.T[::-1])
    packed, counts = packed[order], counts[order]
    new = np.ones(len(packed), bool)
    new[1:] = (packed[1:] != packed[:-1]).any(axis=1)
    first = np.flatnonzero(new)
    return packed[first], np.add.reduceat(counts, first)


def _write_run(folder: pathlib.Path, number: int, found: tuple) -> pathlib.Path:
    path = folder / f'{number:06d}'
    for array, name in zip(found, ('rows', 'counts'), strict=True):
        part = path.with_suffix(f'.{name}.npy')
        with files.naming(part):
            np.save(part, array)
    return path


class _Run:
    """A sorted run on disk, read in blocks."""

    def __init__(self, path: pathlib.Path) -> None:
        self._rows = np.load(path.with_suffix('.rows.npy'), mmap_mode='r')
        self._counts = np.load(path.with_suffix('.counts.npy'), mmap_mode='r')
        self._at = 0

    def last(self) -> tuple | None:
        """The largest row of the next block; None at the end of the run."""
        stop = min(self._at + MERGE_ROWS, len(self._rows))
        return tuple(self._rows[stop - 1].tolist()) if self._at < stop else None

    def take(self, upto: tuple) -> tuple[np.ndarray, np.ndarray]:
        """The rows of the next block that are at most `upto`."""
        stop = min(self._at + MERGE_ROWS, len(self._rows))
        block = np.asarray(self._rows[self._at : stop])
        low, high = 0, len(block)
        while low < high:
            middle = (low + high) // 2
            if tuple(block[middle].tolist()) <= upto:
                low = middle + 1
            else:
                high = middle
        counts = np.asarray(self._counts[self._at : self._at + low])
        self._at += low
        return block[:low], counts


def _merge(runs: list[_Run]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    while lasts := [last for run in runs if (last := run.last()) is not None]:
        parts = [run.take(min(lasts)) for run in runs if run.last() is not None]
        yield _reduce(np.concatenate([r for r, _ in parts]), np.concatenate([c for _, c in parts]))


@dataclasses.dataclass
class _Table:
    """The distinct k-grams, sorted by their first k - 1 tokens (the parent), then by the last."""

    parent: np.ndarray  # among the (k-1)-grams
    token: np.ndarray
    suffix: np.ndarray  # the last k - 1 tokens, among the (k-1)-grams
    count: np.ndarray  # adjusted


def _tables(rows: np.ndarray, counts: np.ndarray, keys: _Keys) -> list[_Table]:
    """The tables of orders 1 .. n, from the distinct n-grams."""
    order, n_vocab = keys.order, keys.boundary
    columns = [keys.column(rows, column) for column in range(order)]
    everything = np.arange(n_vocab)
    nothing = np.zeros(n_vocab, np.int64)
    tables = [_Table(nothing, everything, nothing, nothing.copy())]
    sorted_keys = [everything]
    suffix = columns[-1]  # of every row: its last k tokens, among the k-grams
    for k in range(2, order + 1):
        real = columns[order - k] != n_vocab
        parent = columns[order - k][real]
        for depth in range(1, k - 1):
            found = parent * n_vocab + columns[order - k + depth][real]
            parent = np.searchsorted(sorted_keys[depth], found)
        key, first, inverse = np.unique(
            parent * n_vocab + columns[-1][real], return_index=True, return_inverse=True
        )
        lower = suffix[real][first]
        # Each k-gram is one more token that precedes its suffix; so is the boundary.
        tables[-1].count += np.bincount(lower, minlength=len(tables[-1].token))
        at_start = ~real & (columns[order - k + 1] != n_vocab)
        tables[-1].count[np.unique(suffix[at_start])] += 1
        sorted_keys.append(key)
        tables.append(_Table(key // n_vocab, key % n_vocab, lower, np.zeros(len(key), np.int64)))
        suffix = np.full(len(rows), -1)
        suffix[real] = inverse
    np.add.at(tables[-1].count, suffix[suffix >= 0], counts[suffix >= 0])
    return tables


def _smooth(tables: list[_Table], n_vocab: int) -> dict[str, dict[str, np.ndarray]]:
    lower = np.full(1, 1 / n_vocab)  # below the unigrams: uniform
    found: dict[str, dict[str, Any]] = {}
    if max(len(table.token) for table in tables) > np.iinfo(np.int32).max:
        raise errors.InputError('more than 2**31 - 1 n-grams of one order; use a lower order')
    for k, table in enumerate(tables, 1):
        count = table.count
        discount = np.array([0.0, *discounts(count)])[np.minimum(count, 3)]
        n_parents = len(lower)
        total = np.bincount(table.parent, count, n_parents)
        given_up = np.bincount(table.parent, discount, n_parents)
        has_children = total > 0
        backoff = np.ones(n_parents)
        backoff[has_children] = given_up[has_children] / total[has_children]
        prob = (count - discount) / np.maximum(total, 1)[table.parent]
        prob += backoff[table.parent] * lower[table.suffix]
        if k > 1:
            above = found[f'order_{k - 1}']
            with np.errstate(divide='ignore'):
                above['log_backoff'] = np.log(backoff).astype(np.float32)
            above['first'] = np.searchsorted(table.parent, np.arange(n_parents + 1)).astype(
                np.int32
            )
        found[f'order_{k}'] = {
            'token': table.token.astype(np.int32),
            'log_prob': np.log(prob).astype(np.float32),
        }
        lower = prob
    return found
