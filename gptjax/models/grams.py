# SPDX-License-Identifier: Apache-2.0
"""n-grams as sortable words; how many different ones a text has, before they are counted.

The number is estimated from those whose hash is small, as many as are kept (Bar-Yossef et al. 2002,
algorithm 2): exact up to 2^16 of an order, within 1 % or so beyond.
"""

import dataclasses
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager

import numpy as np

from gptjax.configs import errors
from gptjax.storage import columns

MOST = 2**31 - 1  # n-grams of an order: they are numbered in int32
_KEPT = 1 << 16  # hashes
_BLOCK = 1 << 20  # tokens
# What is done, how much of what unit -> a block told how much more of it is done.
Stages = Callable[[str, int | None, str], AbstractContextManager[Callable[[int], None]]]


class Keys:
    """k-grams as words, with whole tokens at their right ends: rows sort as their tokens do."""

    def __init__(self, order: int, n_vocab: int) -> None:
        self.order, self.boundary = order, n_vocab
        self._bits = max(1, int(n_vocab).bit_length())
        self._full = 64 // self._bits  # tokens of every word but the first
        n_words = -(-order // self._full)
        self._in_first = order - (n_words - 1) * self._full
        bits = [self._bits * self._in_first] + [64] * (n_words - 1)
        self.dtypes = [np.min_scalar_type(2**n - 1) for n in bits]

    def shorter(self) -> 'Keys':
        """Of n-grams with one token less."""
        return Keys(self.order - 1, self.boundary)

    def pack(self, joined: np.ndarray) -> columns.Rows:
        """The n-grams that end at each token but the first order - 1."""
        found, column = [], 0
        sizes = [self._in_first] + [self._full] * (len(self.dtypes) - 1)
        for dtype, tokens in zip(self.dtypes, sizes, strict=True):
            word = np.zeros(len(joined) - self.order + 1, dtype)
            for place in range(tokens):
                part = joined[column : column + len(word)].astype(dtype)
                word |= part << (self._bits * (tokens - 1 - place))
                column += 1
            found.append(word)
        return tuple(found)

    def without_first(self, rows: Sequence[np.ndarray]) -> columns.Rows:
        """The last k - 1 tokens of each."""
        if self._in_first == 1:
            return tuple(rows[1:])
        rest = rows[0] & ((1 << self._bits * (self._in_first - 1)) - 1)
        return rest.astype(self.shorter().dtypes[0]), *rows[1:]

    def without_last(self, rows: Sequence[np.ndarray]) -> columns.Rows:
        """The first k - 1 tokens of each."""
        found = [rows[0] >> self._bits]
        for before, word in zip(rows, rows[1:], strict=False):
            carried = (before & self._token).astype(np.uint64) << self._bits * (self._full - 1)
            found.append(word >> self._bits | carried)
        found = found[1:] if self._in_first == 1 else found
        dtypes = self.shorter().dtypes
        return tuple(word.astype(dtype) for word, dtype in zip(found, dtypes, strict=True))

    def last(self, rows: Sequence[np.ndarray]) -> np.ndarray:
        """The last token of each."""
        return (rows[-1] & self._token).astype(np.int32)

    def is_at_start(self, rows: Sequence[np.ndarray]) -> np.ndarray:
        """Whether the first token of each is the boundary."""
        return rows[0] >> self._bits * (self._in_first - 1) == self.boundary

    @property
    def _token(self) -> int:
        return (1 << self._bits) - 1


@dataclasses.dataclass(frozen=True)
class Size:
    """What is to be counted.

    Attributes:
      n_grams: about how many different ones there are, of orders 1 to n.
    """

    tokens: int
    n_vocab: int
    n_grams: tuple[int, ...]

    @property
    def order(self) -> int:
        return len(self.n_grams)

    @property
    def dtype(self) -> np.dtype:
        """Of counts."""
        return np.dtype(np.uint32 if self.tokens < 2**32 else np.uint64)

    def disk_bytes(self, held: int) -> int:
        """About what counting takes at its peak, and then a checkpoint of the tables.

        Args:
          held: n-grams in memory at once.
        """
        keys = [sum(d.itemsize for d in Keys(k, self.n_vocab).dtypes) for k in range(1, 65)]
        order, count, n_top = self.order, self.dtype.itemsize, self.n_grams[-1]

        def runs(rows: int, distinct: int, width: int) -> int:
            number = -(-rows // held)
            return width * min(rows, number * distinct) if number > 1 else 0

        kept = n_top * (4 + count)  # token and count of every order so far, above, first
        peaks = [runs(self.tokens, n_top, keys[order - 1] + count) + kept + n_top * keys[order - 1]]
        for k in range(order - 1, 0, -1):
            n, above = self.n_grams[k - 1], self.n_grams[k]
            kept += n * (4 + 4 + 4) + above * 4
            rows = above * keys[k] + n * keys[k - 1]
            peaks.append(runs(above, above, keys[k - 1] + 4) + kept + rows)
        tables = 16 * sum(self.n_grams) - 8 * n_top
        smoothing = kept + 24 * n_top  # probabilities, those sent to them, and their shares
        return max(*peaks, smoothing, 2 * tables)

    def check(self, folder: pathlib.Path, held: int) -> None:
        """Raises InputError where there are too many, or the disk will not do."""
        for n in self.n_grams:
            check_number(n, 'about ')
        needed, free = self.disk_bytes(held), shutil.disk_usage(folder).free
        if needed > free:
            raise errors.InputError(
                f'counting {self.tokens:,} tokens up to order {self.order}, with about '
                f'{sum(self.n_grams):,} different n-grams, takes {needed / 1e9:,.1f} GB of disk at '
                f'{folder}, where {free / 1e9:,.1f} GB are free: make room, or lower '
                'model.order or the number of tokens'
            )


def check_number(n: int, about: str = '') -> None:
    """Raises InputError where an order has more n-grams than can be numbered."""
    if n > MOST:
        raise errors.InputError(
            f'an order has {about}{n:,} different n-grams, and at most {MOST:,} can be numbered; '
            'lower model.order or the number of tokens'
        )


def rows(
    sequences: Iterable[Iterable[np.ndarray]], keys: Keys, most: int
) -> Iterator[columns.Rows]:
    """The n-gram that ends at each token, so many at a time at most."""
    return map(keys.pack, _joined(sequences, keys.order, keys.boundary, most))


def survey(
    sequences: Iterable[Iterable[np.ndarray]], order: int, n_vocab: int, stages: Stages
) -> Size:
    """Goes through texts once. Raises InputError: there is no token, or an id is out of range."""
    odd = np.random.default_rng(0).integers(2**62, 2**63, order + 1, np.uint64) * 2 + 1
    numbers = [_Distinct() for _ in range(order)]
    tokens = 0
    with stages('survey', None, ' tokens') as advance:
        for joined in _joined(sequences, order, n_vocab, _BLOCK):
            n = len(joined) - order + 1
            hashes = np.zeros(n, np.uint64)
            for depth, number in enumerate(numbers):
                first = order - 1 - depth
                hashes += joined[first : first + n].astype(np.uint64) * odd[depth]
                number.add((hashes ^ hashes >> np.uint64(32)) * odd[-1])
            tokens += n
            advance(n)
    if not tokens:
        raise errors.InputError('there is no token to count')
    return Size(tokens, n_vocab, (n_vocab, *(number.estimate() for number in numbers[1:])))


class _Distinct:
    """Counts different hashes, by the small ones."""

    def __init__(self) -> None:
        self._limit = 2**64 - 1
        self._kept = np.zeros(0, np.uint64)
        self._new: list[np.ndarray] = []

    def add(self, hashes: np.ndarray) -> None:
        self._new.append(hashes[hashes <= np.uint64(self._limit)])
        if sum(map(len, self._new)) > 4 * _KEPT:
            self._settle()

    def estimate(self) -> int:
        self._settle()
        return round(len(self._kept) * 2**64 / (self._limit + 1))

    def _settle(self) -> None:
        kept = np.sort(np.concatenate([self._kept, *self._new]))
        self._kept = kept[columns.is_new([kept])]
        self._new.clear()
        while len(self._kept) > _KEPT:
            self._limit >>= 1
            self._kept = self._kept[self._kept <= np.uint64(self._limit)]


def _joined(
    sequences: Iterable[Iterable[np.ndarray]], order: int, boundary: int, most: int
) -> Iterator[np.ndarray]:
    """Pieces of the texts with the order - 1 tokens before each, boundaries before a text."""
    for sequence in sequences:
        before = np.full(order - 1, boundary, np.int64)
        for whole in sequence:
            for start, stop in columns.chunks(len(whole), most):
                piece = np.asarray(whole[start:stop], np.int64)
                if not 0 <= piece.min() <= piece.max() < boundary:
                    raise errors.InputError(
                        f'a token id is outside 0 .. {boundary - 1}; use a larger n_vocab'
                    )
                joined = np.concatenate([before, piece])
                before = joined[len(joined) - (order - 1) :]
                yield joined
