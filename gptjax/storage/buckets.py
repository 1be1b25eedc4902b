# SPDX-License-Identifier: Apache-2.0
"""Paths in buckets of Google Cloud Storage, with pathlib's verbs.

An object is seen whole or not at all, carries a checksum of its bytes and a generation number; it
cannot be appended to or renamed, and folders are but beginnings of names. Errors are OSErrors that
name the object; what passes is tried again.
"""

import base64
import concurrent.futures
import contextvars
import errno
import fnmatch
import functools
import io
import logging
import os
import pathlib
import posixpath
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

from etils import epath
from etils.epath import gpath, stat_utils

from gptjax.configs import errors
from gptjax.storage import gcs

SCHEME = 'gs://'
CRC32C = 'crc32c:'  # begins a checksum of that kind
_TIMEOUT_SECS = (5.0, 60.0)  # to connect, to wait for bytes
_AT_ONCE = 8  # requests; the connections that are kept open are 10
_STREAMS = 96  # reads of ranges on their way at once; tensorstore's own 32 wait for each other
_CHUNK = 2**24  # bytes that are read at once of what may be large
T = TypeVar('T')


class Object(NamedTuple):
    """What a listing says of an object."""

    size: int
    checksum: str  # CRC32C and base64, as storage says it
    generation: int
    updated: float  # seconds since the epoch, by storage's clock


class Path(gpath.PosixGPath):
    """An address in a bucket: gs://bucket/name."""

    @property
    def bucket(self) -> str:
        return self.parts[2]

    @property
    def key(self) -> str:
        """The name in the bucket."""
        return '/'.join(self.parts[3:])

    def object(self) -> Object | None:
        """What storage says of the object of this name; None where there is none."""
        blob = gcs.tried(
            'looking at',
            self,
            lambda: self._handle.bucket.get_blob(self.key, retry=None, timeout=_TIMEOUT_SECS),
        )
        return None if blob is None else _object(blob)

    def objects(self) -> dict[str, Object]:
        """Every object below this folder, by the rest of its name."""
        start = self._prefix
        found = gcs.tried('listing', self, lambda: list(self._listing(start)))
        return {b.name[len(start) :]: _object(b) for b in found if b.name != start}

    def exists(self) -> bool:
        def found() -> bool:
            beside = self._listing(self.key, delimiter='/')
            return any(b.name == self.key for b in beside) or self._prefix in beside.prefixes

        return gcs.tried('looking at', self, found)

    def is_file(self) -> bool:
        return bool(self.key) and self.object() is not None

    def is_dir(self) -> bool:
        first = {'prefix': self._prefix, 'max_results': 1}
        return bool(gcs.tried('listing', self, lambda: list(self._listing(**first))))

    def is_symlink(self) -> bool:
        return False

    def iterdir(self) -> Iterator['Path']:
        def names() -> list[str]:
            found = self._listing(self._prefix, delimiter='/')
            return [blob.name for blob in found] + list(found.prefixes)

        for name in sorted(gcs.tried('listing', self, names)):
            if name != self._prefix:
                yield self / name[len(self._prefix) :].rstrip('/')

    def rglob(self, pattern: str) -> Iterator['Path']:
        """Objects below this folder, by their last names."""
        found = (self / name for name in self.objects())
        return (path for path in found if fnmatch.fnmatchcase(path.name, pattern))

    def glob(self, pattern: str) -> Iterator['Path']:
        """Args: pattern: of names in this folder."""
        return (path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, pattern))

    def walk(
        self, *, top_down: bool = True, on_error: Callable[[OSError], object] | None = None
    ) -> Iterator[tuple['Path', list[str], list[str]]]:
        """Every folder that has anything below it, with its folders and files."""
        del on_error
        found: dict[str, tuple[set[str], set[str]]] = {'': (set(), set())}
        for name in self.objects():
            above, _, last = name.rpartition('/')
            found.setdefault(above, (set(), set()))[1].add(last)
            while above:
                above, _, last = above.rpartition('/')
                found.setdefault(above, (set(), set()))[0].add(last)
        for folder in sorted(found, reverse=not top_down):
            folders, files = found[folder]
            yield (self / folder if folder else self), sorted(folders), sorted(files)

    def absolute(self) -> 'Path':
        return self

    def resolve(self, strict: bool = False) -> 'Path':
        del strict
        return of(str(self))

    def stat(self) -> stat_utils.StatResult:
        found = self.object()
        if found is None and not self.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        return stat_utils.StatResult(found is None, found.size if found else 0, 0)

    def read_bytes(self) -> bytes:
        return gcs.tried(
            'reading',
            self,
            lambda: self._blob.download_as_bytes(
                checksum='crc32c', retry=None, timeout=_TIMEOUT_SECS
            ),
        )

    def write_bytes(self, data: bytes) -> int:
        self.put(bytes(data))
        return len(data)

    def chunks(self) -> Iterator[bytes]:
        """The content in pieces, for what may not fit into memory."""
        found = self.object()
        if found is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        blob, how = self._blob, {'retry': None, 'timeout': _TIMEOUT_SECS, 'checksum': None}
        how['if_generation_match'] = found.generation
        for start in range(0, found.size, _CHUNK):
            part = {'start': start, 'end': min(start + _CHUNK, found.size) - 1}
            read = functools.partial(blob.download_as_bytes, **part, **how)
            yield gcs.tried('reading', self, read)

    def put(
        self,
        content: bytes | pathlib.Path,
        generation: int | None = None,
        answer_secs: float = _TIMEOUT_SECS[1],
    ) -> Object:
        """Writes an object, of bytes or of a local file.

        Args:
          generation: what is to be replaced; 0 = nothing; None = whatever is there.
          answer_secs: how long an answer is waited for.

        Raises:
          FileExistsError: the generation that is there is another.
        """
        how = {'retry': None, 'timeout': (_TIMEOUT_SECS[0], answer_secs), 'checksum': 'crc32c'}
        how['if_generation_match'] = generation
        blob = self._blob
        if isinstance(content, bytes):
            gcs.tried('writing', self, lambda: blob.upload_from_string(content, **how))
        else:
            gcs.tried('writing', self, lambda: blob.upload_from_filename(str(content), **how))
        return _object(blob)

    def fetch(self, target: pathlib.Path) -> None:
        """Copies an object into a local file, its checksum compared."""
        how = {'retry': None, 'timeout': _TIMEOUT_SECS, 'checksum': 'crc32c'}
        gcs.tried('reading', self, lambda: self._blob.download_to_filename(str(target), **how))

    def open(self, mode: str = 'r', **how: Any) -> io.IOBase:
        """A file in memory, which is written when it is closed.

        Raises:
          ValueError: it is neither read nor written anew: nothing is appended to an object.
        """
        if mode.strip('bt') not in ('r', 'w', 'x'):
            raise ValueError(f'{self}: no object can be opened with mode {mode!r}')
        stream = io.BytesIO(self.read_bytes()) if mode.startswith('r') else _Written(self)
        return stream if 'b' in mode else io.TextIOWrapper(stream, encoding='utf-8')

    def touch(self, mode: int = 0o666, exist_ok: bool = True) -> None:
        if not exist_ok or not self.is_file():
            self.put(b'', None if exist_ok else 0)

    def mkdir(self, mode: int | None = None, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: there are no folders."""

    def rmdir(self) -> None:
        """Nothing."""

    def unlink(self, missing_ok: bool = False, generation: int | None = None) -> None:
        """Args: generation: what is to be removed; None = whatever is there."""
        how = {'if_generation_match': generation, 'retry': None, 'timeout': _TIMEOUT_SECS}
        try:
            gcs.tried('removing', self, lambda: self._blob.delete(**how))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def rmtree(self, missing_ok: bool = False) -> None:
        found = [self / name for name in self.objects()]
        if not found and not missing_ok:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        each(lambda path: path.unlink(missing_ok=True), found)

    def copy(self, dst: 'Path', overwrite: bool = False) -> 'Path':
        """Copies an object, or all below a folder, inside storage."""
        target = type(self)(dst)
        names = [''] if self.is_file() else list(self.objects())
        if not names:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        generation = None if overwrite else 0

        def one(name: str) -> None:
            source = self / name if name else self
            to = target / name if name else target
            how = {'if_generation_match': generation, 'retry': None, 'timeout': _TIMEOUT_SECS}
            bucket = source._handle.bucket
            there = to._handle.bucket
            gcs.tried(
                'copying', source, lambda: bucket.copy_blob(source._blob, there, to.key, **how)
            )

        each(one, names)
        return target

    def rename(self, target: 'Path') -> 'Path':
        """Copies and removes: it may stop halfway."""
        copied = self.copy(target)
        self.unlink() if self.is_file() else self.rmtree(missing_ok=True)
        return copied

    def replace(self, target: 'Path') -> 'Path':
        copied = self.copy(target, overwrite=True)
        self.unlink() if self.is_file() else self.rmtree(missing_ok=True)
        return copied

    @property
    def _prefix(self) -> str:
        return f'{self.key}/' if self.key else ''

    @property
    def _handle(self) -> gcs.Connection:
        return gcs.connection(self.bucket)

    @property
    def _blob(self) -> Any:
        return self._handle.bucket.blob(self.key)

    def _listing(self, prefix: str, **how: Any) -> Any:
        fields = 'items(name,size,crc32c,generation,updated),prefixes,nextPageToken'
        return self._handle.client.list_blobs(
            self.bucket, prefix=prefix, fields=fields, retry=None, timeout=_TIMEOUT_SECS, **how
        )


Anywhere = pathlib.Path | Path  # a path on a disk here, or in a bucket


def of(name: str | os.PathLike) -> Path:
    """The path of a name as gs://bucket/name.

    Raises:
      UsageError: it names no bucket, or another kind of storage; the package is not installed.
    """
    scheme, _, rest = str(name).partition('://')
    errors.require(
        scheme == 'gs',
        f'{name}: buckets of Google Cloud Storage (gs://bucket/folder) can be read and written '
        f'here, {scheme}:// cannot; copy it there, or to a disk',
    )
    whole = posixpath.normpath(rest)
    bucket = rest.partition('/')[0]
    errors.require(
        bucket not in ('', '.', '..') and whole.partition('/')[0] == bucket,
        f'{name} names no bucket; give gs://bucket/folder',
    )
    _set_up()
    return Path(SCHEME + whole)


def each(do: Callable[[Any], T], items: Iterable[Any]) -> list[T]:
    """Calls a function for several items at once. Raises the first error when all have ended."""
    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE, 'storage') as pool:
        asked = [pool.submit(contextvars.copy_context().run, do, item) for item in items]
    return [each_.result() for each_ in asked]


def store(folder: Path) -> Any:
    """A folder as tensorstore's key-value store: many reads of ranges at once, tried again."""
    import tensorstore

    context = tensorstore.Context({'gcs_request_concurrency': {'limit': _STREAMS}})
    return tensorstore.KvStore.open(f'{folder}/', context=context).result()


def crc32c(content: bytes) -> str:
    """The checksum that storage would say of these bytes."""
    found = Crc32c()
    found.update(content)
    return found.checksum()


class Crc32c:
    """The checksum that storage would say of bytes that come one after the other."""

    def __init__(self) -> None:
        import google_crc32c

        self._found = google_crc32c.Checksum()

    def update(self, content: bytes) -> None:
        """Adds bytes behind the others."""
        self._found.update(content)

    def checksum(self) -> str:
        """Of all that were added."""
        return CRC32C + base64.b64encode(self._found.digest()).decode()


def crc32c_of(path: pathlib.Path) -> str:
    """The same, of a local file."""
    found = Crc32c()
    with path.open('rb') as f:
        while content := f.read(2**20):
            found.update(content)
    return found.checksum()


def is_crc32c(checksum: str) -> bool:
    """Whether a checksum is one that storage says."""
    return checksum.startswith(CRC32C)


class _Written(io.BytesIO):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def close(self) -> None:
        if not self.closed:
            self._path.write_bytes(self.getvalue())
        super().close()


@functools.cache
def _set_up() -> None:
    """Makes epath, and so orbax, use Path; says to tensorstore where storage is.

    Raises:
      UsageError: the package is not installed.
    """
    try:
        import google.cloud.storage  # noqa: F401
    except ImportError as e:
        raise errors.UsageError("gs:// needs: pip install 'gptjax[gcs]'") from e
    epath.register_path_cls(SCHEME)(Path)
    for name in ('google', 'urllib3', 'tenacity'):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault('DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA', 'true')
    os.environ.setdefault('GCE_METADATA_TIMEOUT', '2')
    os.environ.setdefault('GCE_METADATA_DETECT_RETRIES', '1')
    if emulator := os.environ.get(gcs.EMULATOR):
        os.environ.setdefault('TENSORSTORE_GCS_HTTP_URL', emulator)
        os.environ.setdefault('GOOGLE_AUTH_TOKEN_FOR_TESTING', 'emulated')


def _object(blob: Any) -> Object:
    at = blob.updated.timestamp()
    return Object(int(blob.size), f'{CRC32C}{blob.crc32c}', int(blob.generation), at)
