# SPDX-License-Identifier: Apache-2.0
"""A lease on a disk that locks nothing, with what a bucket promises of an object.

See storage/leases.py. A lease is a numbered file, and the highest number counts: only one process
can create the next. It stays when it is given back, so that numbers only rise: who was slow, and
creates one that has been, finds a higher one beside it.
"""

import os
import pathlib
import re
import uuid
from typing import NamedTuple

from gptjax.storage import files

_FREE = b'free'  # what it says once it is given back


class Object(NamedTuple):
    """As buckets.Object, of a file."""

    generation: int
    updated: float  # seconds since the epoch, by the file system's clock


class Path:
    """The files of a lease: NAME-1, NAME-2 ..."""

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path

    def __str__(self) -> str:
        return str(self._path)

    def read_bytes(self) -> bytes:
        """What the one that counts says."""
        return self._file(self._highest()).read_bytes()

    def object(self) -> Object | None:
        """The one that counts; None where it is free."""
        number = self._highest()
        try:
            return None if self._is_free(number) else self._object(number)
        except FileNotFoundError:  # another has followed it
            return self.object()

    def now(self) -> float:
        """By the file system's clock, seconds since the epoch."""
        probe = self._path.with_name(f'{self._path.name}-{uuid.uuid4().hex}')
        with files.open_(probe, 'xb'):
            found = probe.stat().st_mtime
        probe.unlink()
        return found

    def put(self, content: bytes, generation: int, answer_secs: float = 0.0) -> Object:
        """Writes the one that counts, where that generation is there; 0 = none.

        Raises:
          FileExistsError: another one is there. FileNotFoundError: none is.
        """
        del answer_secs
        number = self._highest()
        self._check(number, generation)
        if generation and self._file(number).read_bytes() == content:  # renewed by who holds it
            os.utime(self._file(number))
            return self._object(number)
        with files.open_(self._file(number + 1), 'xb') as file:
            file.write(content)
        if self._highest() > number + 1:
            self._file(number + 1).unlink(missing_ok=True)
            raise FileExistsError(f'{self} is another one by now')
        self._file(number).unlink(missing_ok=True)
        return self._object(number + 1)

    def unlink(self, generation: int) -> None:
        """Gives that generation back. Errors as of put()."""
        number = self._highest()
        self._check(number, generation)
        with files.open_(self._file(number), 'r+b') as file:
            file.write(_FREE)
            file.truncate()

    def _check(self, number: int, generation: int) -> None:
        free = self._is_free(number)
        if free and generation:
            raise FileNotFoundError(f'{self} is given back')
        if (0 if free else self._object(number).generation) != generation:
            raise FileExistsError(f'{self} is another one by now')

    def _is_free(self, number: int) -> bool:
        return not number or self._file(number).read_bytes() == _FREE

    def _object(self, number: int) -> Object:
        written = self._file(number).stat().st_mtime_ns
        return Object((number << 64) + written, written / 1e9)

    def _file(self, number: int) -> pathlib.Path:
        return self._path.with_name(f'{self._path.name}-{number}')

    def _highest(self) -> int:
        """0 where there is none."""
        name = re.compile(rf'{re.escape(self._path.name)}-(\d+)')
        found = (name.fullmatch(path.name) for path in self._path.parent.iterdir())
        return max((int(match[1]) for match in found if match), default=0)
