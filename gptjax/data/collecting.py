# SPDX-License-Identifier: Apache-2.0
"""What sources hold, made into the lines of a corpus, a piece at a time.

Parts of a source are read side by side; each piece is a file, and all of them, joined in order, are
the corpus, however many processes made them.
"""

import hashlib
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from gptjax.configs import lookup
from gptjax.data import documents
from gptjax.storage import files

_PIECE_BYTES, _PIECE_BAD = 2**26, 1000


class Job(NamedTuple):
    """Part of what a set holds, for a process to read."""

    set: str
    path: str
    part: Any  # one of the set's parts(path); None = all of it
    text_field: str
    stem: pathlib.Path  # begins the names of its files

    def run(self, advance: Callable[[int], None]) -> Iterator[documents.Piece]:
        """The pieces, in order."""
        del advance
        dataset = lookup.module('gptjax.data.sets', self.set)
        if self.part is None:
            found = dataset.documents_of(self.path, self.text_field)
        else:
            found = dataset.documents_in(self.part, self.text_field)
        return pieces(found, self.stem)


def jobs(config: documents.Config, folder: pathlib.Path) -> list[Job]:
    """What is to be read, in order; the pieces' files go to a folder."""
    dataset = lookup.module('gptjax.data.sets', config.set)
    parts = dataset.parts(config.path) if hasattr(dataset, 'parts') else [None]
    return [
        Job(config.set, config.path, part, config.text_field, folder / f'{number:06}')
        for number, part in enumerate(parts)
    ]


def pieces(
    found: Iterable[documents.Document | documents.Bad], stem: pathlib.Path
) -> Iterator[documents.Piece]:
    """The documents of a source, and what is wrong there."""
    number, piece = 1, _Piece(stem.with_name(f'{stem.name}-0'))
    try:
        for one in found:
            if isinstance(one, documents.Document):
                try:
                    piece.add(one)
                except UnicodeEncodeError as e:
                    why = f'holds a lone surrogate, U+{ord(one.text[e.start]):04X}'
                    one = documents.Bad(f'document {number}', f'{why} at character {e.start}')
            if isinstance(one, documents.Bad):
                piece.drop()
                piece.bad.append(one)
            elif one.more:
                continue
            else:
                piece.end()
            number += 1
            if piece.is_full():
                yield piece.close()
                piece = _Piece(stem.with_name(f'{stem.name}-{number}'))
        yield piece.close()
    finally:
        piece.file.close()


class _Piece:
    """Writes documents, each in one or several parts, to a file."""

    def __init__(self, path: pathlib.Path) -> None:
        self._path, self.bad, self._empty = path, [], 0
        with files.naming(path):
            self.file = path.open('xb')
        self._digests: list[bytes] = []
        self._sizes: list[int] = []
        self._ends = [0]
        self._begin()

    def _begin(self) -> None:
        self._size, self._is_blank = 0, True
        self._digest = hashlib.blake2b(digest_size=documents.DIGEST_BYTES)

    def add(self, part: documents.Document) -> None:
        """Adds a part. Raises UnicodeEncodeError where it is no text."""
        text = part.text.encode()
        with files.naming(self._path):
            self.file.write(documents.line(part))
        self._digest.update(text)
        self._size += len(text)
        self._is_blank = self._is_blank and not part.text.strip()

    def drop(self) -> None:
        """Takes the parts of a document that has not ended back."""
        with files.naming(self._path):
            self.file.seek(self._ends[-1])
            self.file.truncate()
        self._begin()

    def end(self) -> None:
        """Ends a document; one without text is taken back."""
        if self._is_blank:
            self._empty += 1
            self.drop()
            return
        self._digests.append(self._digest.digest())
        self._sizes.append(self._size)
        self._ends.append(self.file.tell())
        self._begin()

    def is_full(self) -> bool:
        return self._ends[-1] >= _PIECE_BYTES or len(self.bad) >= _PIECE_BAD

    def close(self) -> documents.Piece:
        with files.naming(self._path):
            self.file.close()
        digests = np.frombuffer(b''.join(self._digests), np.uint64).reshape(-1, 2)
        numbers = (np.array(x, np.int64) for x in (self._sizes, self._ends[1:]))
        return documents.Piece(self._path, digests, *numbers, self.bad, self._empty)
