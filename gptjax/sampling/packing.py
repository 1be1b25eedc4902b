# SPDX-License-Identifier: Apache-2.0
"""Texts in rows of few sizes, contexts followed by all their continuations: what scoring reads."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

_SPLIT = 256  # tokens; a context's continuations take more than one piece beyond it
_SHARED_ROW = 128  # tokens of rows that several short pieces share
_LEAST = 32  # tokens of a row
_MANY = 4  # batches; from so many on, rows of more sizes are worth their compilation


class Piece(NamedTuple):
    """What is read in one go: texts that begin alike, and the queries that they are parts of."""

    context: tuple[int, ...]
    targets: tuple[tuple[int, ...], ...]
    owners: tuple[int, ...]

    @property
    def length(self) -> int:
        """Tokens read: a target's last one is only looked for."""
        return len(self.context) + sum(len(target) - 1 for target in self.targets)


class Packed(NamedTuple):
    """Rows of tokens, and which of their places are asked about."""

    tokens_BxL: np.ndarray
    positions_BxL: np.ndarray
    text_BxL: np.ndarray  # which piece of its row a token belongs to; -1 = padding
    branch_BxL: np.ndarray  # 0 = its context, else which of its targets
    place_P: np.ndarray  # of each scored token the one before it, rows behind one another
    target_P: np.ndarray
    owner_P: np.ndarray  # its query
    pieces: list[Piece]

    @classmethod
    def of(cls, rows: Sequence[Sequence[Piece]], number: int, size: int, shared: int) -> 'Packed':
        """Rows of pieces as arrays; `shared` tokens of each context stand in the cache."""
        tokens, positions, text, branch = (
            np.full((number, size), x, np.int32) for x in (0, -1, -1, 0)
        )
        place: list[int] = []
        target: list[int] = []
        owner: list[int] = []
        for b, row in enumerate(rows):
            at = 0
            for index, piece in enumerate(row):
                context = piece.context[shared:]
                last = at + len(context) - 1
                for k, part in enumerate([context, *(t[:-1] for t in piece.targets)]):
                    end = at + len(part)
                    begin = shared + (len(context) if k else 0)
                    tokens[b, at:end] = part
                    positions[b, at:end] = np.arange(begin, begin + len(part))
                    text[b, at:end], branch[b, at:end] = index, k
                    if k:
                        whole = piece.targets[k - 1]
                        place += [b * size + i for i in (last, *range(at, end))]
                        target += whole
                        owner += [piece.owners[k - 1]] * len(whole)
                    at = end
        pieces = [piece for row in rows for piece in row]
        asked = (np.array(x, np.int32) for x in (place, target, owner))
        return cls(tokens, positions, text, branch, *asked, pieces)


def split(
    context: tuple[int, ...], texts: Sequence[tuple[tuple[int, ...], int]]
) -> Iterator[Piece]:
    """Targets of one context, in as many pieces as rows of a modest size want."""
    most = max(_SPLIT, 2 * len(context))
    some: list[tuple[tuple[int, ...], int]] = []
    length = len(context)
    for target, owner in texts:
        if some and length + len(target) - 1 > most:
            yield Piece(context, *zip(*some, strict=True))
            some, length = [], len(context)
        some.append((target, owner))
        length += len(target) - 1
    yield Piece(context, *zip(*some, strict=True))


def batches(
    pieces: Sequence[Piece], batch_tokens: int, multiple: int, shared: int, together: bool
) -> Iterator[Packed]:
    """Pieces in rows and rows in batches of about `batch_tokens`, the longest first.

    Args:
      multiple: batches have a multiple of so many rows.
      shared: tokens at the beginning of every context that stand in the cache.
      together: whether a row can hold several pieces.
    """
    total = sum(piece.length - shared for piece in pieces)
    fine = total >= _MANY * batch_tokens
    by_size: dict[int, list[list[Piece]]] = {}
    for size, row in _rows(pieces, shared, together, fine):
        by_size.setdefault(size, []).append(row)
    planned, left = [], []
    for size in sorted(by_size):  # rows that fill no batch go with the next size
        rows = by_size[size] + left
        number = max(1, batch_tokens // size // multiple) * multiple
        whole = len(rows) // number * number
        if size == max(by_size):
            whole = len(rows)
        even = -(-whole // max(1, -(-whole // number)))  # rows, where batches are of equal size
        planned.append((size, -(-even // multiple) * multiple, rows[:whole]))
        left = rows[whole:]
    for size, number, rows in reversed(planned):
        for start in range(0, len(rows), max(number, 1)):
            some = rows[start : start + number]
            yield Packed.of(some, number, size, shared)


def _rows(
    pieces: Sequence[Piece], shared: int, together: bool, fine: bool
) -> Iterator[tuple[int, list[Piece]]]:
    """(size, pieces) of rows: first fit, the longest pieces first."""
    steps = 4 if fine else 2
    rows: list[list[Piece]] = []
    sizes: list[int] = []
    free: list[int] = []
    for piece in sorted(pieces, key=lambda piece: -piece.length):
        need = piece.length - shared
        fits = (b for b in range(max(len(rows) - 512, 0), len(rows)) if free[b] >= need)
        b = next(fits, None) if together else None
        if b is None:
            shared_row = together and 2 * need <= _SHARED_ROW
            size = _rounded(need, _SHARED_ROW if shared_row else _LEAST, steps)
            b = len(rows)
            rows.append([])
            sizes.append(size)
            free.append(size)
        rows[b].append(piece)
        free[b] -= need
    yield from zip(sizes, rows, strict=True)


def _rounded(number: int, least: int, steps: int) -> int:
    """The smallest of few sizes: least times 1, 2, 4, ..., and `steps` - 1 between each two."""
    size = least
    while size < number:
        size *= 2
    if size == least:
        return size
    between = (size // 2 * (steps + i) // steps for i in range(steps + 1))
    return next(s for s in between if s >= number)
