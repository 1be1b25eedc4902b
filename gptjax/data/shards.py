# SPDX-License-Identifier: Apache-2.0
"""Token shards, opened: windows are read from a disk, or by ranges of an object's bytes.

Files are read, not mapped: windows are drawn at random, and what a system reads ahead of a page of
a map is a hundred times what is wanted. A few are open at once, however many there are.
"""

import abc
import concurrent.futures
import contextlib
import errno
import functools
import io
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from gptjax.configs import errors
from gptjax.data import token_manifest as manifest_lib
from gptjax.storage import buckets, files, retry

_MOST_OPEN = 128  # files at once
_PATIENCE_SECS = 1200.0  # with storage that fails while tokens are streamed


class Shard(abc.ABC):
    """An open shard."""

    def __init__(self, folder: buckets.Anywhere, record: manifest_lib.Record) -> None:
        self._folder, self._record = folder, record
        self.path = folder / record.name
        self.n_tokens = record.tokens

    @abc.abstractmethod
    def request(self, start: int, stop: int) -> Callable[[], np.ndarray]:
        """Tokens start .. stop - 1, once they are called for. Raises InputError, also then."""

    def table(self) -> np.ndarray:
        """Of the documents. Raises InputError where it is not what the record says."""
        path, record = self._folder / self._record.table, self._record
        remedy = manifest_lib.remedy(self._folder)
        try:
            found = np.lib.format.read_array(io.BytesIO(path.read_bytes()), allow_pickle=False)
            if found.dtype != np.int64:
                raise ValueError(f'its numbers are {found.dtype}')
        except (OSError, ValueError, EOFError) as e:
            raise errors.InputError(f'{path} is damaged ({e}); {remedy}') from e
        sums = [record.tokens, record.text_bytes, record.words]
        if found.shape != (record.documents, 3) or found.sum(axis=0).tolist() != sums:
            raise errors.InputError(f'{path} is not the table of {record.name}; {remedy}')
        return found

    def _changed(self) -> errors.InputError:
        return errors.InputError(
            f'{self.path} was changed while it was read; {manifest_lib.remedy(self._folder)}'
        )


def open_all(
    folder: buckets.Anywhere, records: Sequence[manifest_lib.Record], dtype: np.dtype
) -> list[Shard]:
    """Opens shards. Raises InputError where one is missing, or has another size."""
    if isinstance(folder, buckets.Path):
        store, there = buckets.store(folder), folder.objects()
        sizes = {name: found.size for name, found in there.items()}
    else:
        paths = [folder / record.name for record in records]
        sizes = {path.name: path.stat().st_size for path in paths if path.exists()}
    opened: list[Shard] = []
    for record in records:
        path, size = folder / record.name, sizes.get(record.name, 0)
        if size != record.tokens * dtype.itemsize:
            raise errors.InputError(
                f'token shard {path} has {size} bytes where its manifest says '
                f'{record.tokens * dtype.itemsize}; {manifest_lib.remedy(folder)}'
            )
        if isinstance(folder, buckets.Path):
            opened.append(_Streamed(folder, record, dtype, store, there[record.name]))
        else:
            opened.append(_OnDisk(folder, record, dtype))
    return opened


def damages(
    folder: buckets.Anywhere, records: Sequence[manifest_lib.Record], remember: bool = True
) -> Iterator[str]:
    """What is wrong with each shard in turn; '' = nothing. Bytes are compared by their hashes.

    Of objects in a bucket storage says the checksum; they are read only where the record has none.

    Args:
      remember: hashes of files that were not changed since they were compared.
    """
    there = folder.objects() if isinstance(folder, buckets.Path) else {}
    digest_of = files.remembered_sha256 if remember else files.sha256

    def is_whole(name: str, digest: str, crc32c: str) -> bool:
        if crc32c and name in there:
            return there[name].checksum == crc32c
        if isinstance(folder, buckets.Path):
            return files.sha256(folder / name) == digest
        return digest_of(folder / name) == digest

    def one(record: manifest_lib.Record) -> str:
        for name, digest in record.files().items():
            try:
                if not is_whole(name, digest, record.checksums()[name]):
                    return f'{folder / name} does not have the bytes that were written'
            except OSError as e:
                return f'{folder / name} cannot be read: {e.strerror}'
        return ''

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(one, records)


class _Open:
    """A file, open until nobody holds it; what is read is not read ahead of."""

    def __init__(self, path: pathlib.Path, state: tuple[int, int]) -> None:
        """Args: state: of the file that is meant; is_it says whether this is that one."""
        self._number = -1
        self._number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.is_it = _state(os.fstat(self._number)) == state
        with contextlib.suppress(OSError, AttributeError):  # of file systems, of systems
            os.posix_fadvise(self._number, 0, 0, os.POSIX_FADV_RANDOM)

    def read(self, start: int, size: int) -> bytes:
        """`size` bytes from `start` on: fewer where the file ends."""
        found = os.pread(self._number, size, start)
        while len(found) < size and (more := os.pread(self._number, size, start + len(found))):
            found += more[: size - len(found)]
        return found

    def __del__(self) -> None:
        if self._number >= 0:
            os.close(self._number)


_opened = functools.lru_cache(_MOST_OPEN)(_Open)


class _OnDisk(Shard):
    """A shard on a disk, and the file's size and time when it was opened."""

    def __init__(self, folder: pathlib.Path, record: manifest_lib.Record, dtype: np.dtype) -> None:
        super().__init__(folder, record)
        self._dtype = dtype
        try:
            self._seen = _state(self.path.stat())
            _Open(self.path, self._seen)
        except OSError as e:
            mend = 'let more files be open (ulimit -n)' if _is_limit(e) else ''
            raise errors.InputError(
                f'token shard {self.path} cannot be read ({e}); '
                f'{mend or manifest_lib.remedy(folder)}'
            ) from e

    def request(self, start: int, stop: int) -> Callable[[], np.ndarray]:
        return functools.partial(self._read, start, stop)

    def _read(self, start: int, stop: int) -> np.ndarray:
        size, now = self._dtype.itemsize, self._seen
        try:
            file = _opened(self.path, self._seen)
            content = file.read(start * size, (stop - start) * size)
            with contextlib.suppress(FileNotFoundError):  # what is open stays
                now = _state(self.path.stat())
        except OSError as e:
            mend = 'let more files be open (ulimit -n)' if _is_limit(e) else 'put it back'
            raise errors.InputError(
                f'token shard {self.path} cannot be read any more ({e.strerror}); {mend}, and run '
                'the same command again'
            ) from e
        if not file.is_it or now != self._seen or len(content) != (stop - start) * size:
            raise self._changed()
        return np.frombuffer(content, self._dtype)


def _is_limit(error: OSError) -> bool:
    """Whether too many files are open, in this process or on this machine."""
    return error.errno in (errno.EMFILE, errno.ENFILE)


def _state(found: os.stat_result) -> tuple[int, int]:
    return found.st_size, found.st_mtime_ns


class _Streamed(Shard):
    """A shard in a bucket, as it was when it was opened."""

    def __init__(
        self,
        folder: buckets.Path,
        record: manifest_lib.Record,
        dtype: np.dtype,
        store: Any,
        opened: buckets.Object,
    ) -> None:
        """Args: store: buckets.store() of the folder."""
        super().__init__(folder, record)
        self._dtype, self._store, self._opened = dtype, store, opened.generation
        self._stamps: set[bytes] = set()  # by which tensorstore names that generation

    def request(self, start: int, stop: int) -> Callable[[], np.ndarray]:
        size = self._dtype.itemsize
        where = slice(start * size, stop * size)
        asked = [self._store.read(self._record.name, byte_range=where)]

        def answer() -> Any:
            on_its_way = asked.pop() if asked else None
            again = on_its_way or self._store.read(self._record.name, byte_range=where)
            try:
                return again.result()
            except Exception:
                with retry.patience(0.0):
                    now = self.path.object()
                if now is None or now.generation != self._opened:
                    raise self._changed() from None  # which waiting does not mend
                raise

        def found() -> np.ndarray:
            try:
                with retry.patience(_PATIENCE_SECS):  # training has nothing to do meanwhile
                    read = retry.call(f'reading {self.path}', answer, Exception)
            except errors.InputError:
                raise
            except Exception as e:  # tensorstore's, of many kinds
                raise errors.InputError(
                    f'{self.path} cannot be read: {" ".join(str(e).split())[:200]}; mend that, and '
                    'run the same command again'
                ) from e
            content = read.value
            if len(content) != (stop - start) * size or not self._is_opened(read.stamp.generation):
                raise self._changed()
            return np.frombuffer(content, self._dtype)

        return found

    def _is_opened(self, stamp: bytes) -> bool:
        """Whether what was read is what was opened: asked once, of every stamp that is new."""
        if stamp not in self._stamps:
            now = self.path.object()
            if now is None or now.generation != self._opened:
                return False
            self._stamps.add(stamp)
        return True
