# SPDX-License-Identifier: Apache-2.0
"""Files that a reader sees whole or not at all, what they hold as text, and what they hash to.

Our own files are opened without following links: a link of their name leads nowhere we may write.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import IO, Any

from gptjax.configs import checksum, errors
from gptjax.storage import buckets

_MARKS = {  # how texts of these encodings begin, the longer ones first
    b'\xff\xfe\x00\x00': 'utf-32',
    b'\x00\x00\xfe\xff': 'utf-32',
    b'\xff\xfe': 'utf-16',
    b'\xfe\xff': 'utf-16',
}


def encoding_of(start: bytes) -> str:
    """What the byte-order mark at the start of a file says; UTF-8 where there is none."""
    return next((name for mark, name in _MARKS.items() if start.startswith(mark)), 'utf-8-sig')


def decoded(content: bytes) -> str:
    """The text of a file, without its byte-order mark. Raises UnicodeDecodeError."""
    return content.decode(encoding_of(content))


def json_object(content: bytes, name: str) -> dict[str, Any]:
    """The JSON object that is the content of a file, whatever its byte-order mark.

    Raises:
      InputError: it is none; the message begins with the name.
    """
    try:
        found = json.loads(decoded(content))
        wrong = '' if isinstance(found, dict) else f'it is a {type(found).__name__}'
    except (ValueError, RecursionError) as e:
        wrong = str(e)
    if wrong:
        raise errors.InputError(f'{name} is no JSON object: {wrong}; mend or remove it')
    return found


def content(path: pathlib.Path, most: int = 2**27) -> bytes:
    """The bytes of a vocabulary, a config or the like, which somebody else made.

    Raises:
      InputError: there are more than any of its kind has.
    """
    with path.open('rb') as file:
        found = file.read(most + 1)
    if len(found) > most:
        raise errors.InputError(f'{path} has more bytes than any of its kind: {most:,}')
    return found


def replace(path: buckets.Anywhere, content: str | bytes) -> None:
    """Writes a file so that, whatever happens, its old or its new content is there.

    Raises:
      OSError: it cannot be written; it names the file. InputError: a folder stands there.
    """
    content = content.encode() if isinstance(content, str) else content
    if isinstance(path, buckets.Path):
        path.put(content)
        return
    with replacing(path) as file:
        file.write(content)


def remove_tree(folder: buckets.Anywhere) -> None:
    """Removes a folder and all in it. Raises OSError where something stays."""
    folder.rmtree() if isinstance(folder, buckets.Path) else shutil.rmtree(folder)


@contextlib.contextmanager
def replacing(path: pathlib.Path, mode: str = 'xb') -> Iterator[IO]:
    """A file to write, which takes its place when the block ends; errors as of replace()."""
    partial = path.with_name(f'{path.name}.{os.getpid()}.partial')
    with naming(path):
        partial.unlink(missing_ok=True)  # a link is not followed
        try:
            with open_(partial, mode) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except IsADirectoryError as e:
            raise errors.InputError(f'{path} is a folder; move it away') from e
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)  # of what failed


def open_(path: pathlib.Path, mode: str, **how: Any) -> IO:
    """open() for files of ours: a symbolic link is refused, so that nothing else is written.

    Raises:
      OSError: it cannot be opened, or is a link; it names the file.
    """

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW, 0o666)

    encoding = {} if 'b' in mode else {'encoding': 'utf-8'}
    with naming(path):
        return open(path, mode, opener=opener, **encoding, **how)


def appended(file: IO, text: str, path: pathlib.Path) -> None:
    """Adds to an open file and flushes it. Raises OSError that names the file."""
    with naming(path):
        file.write(text)
        file.flush()


def check_writable(folder: pathlib.Path) -> None:
    """Makes a folder where it is missing, and tries to write there, before long work is begun.

    Raises:
      InputError: it cannot be made, or written.
    """
    probe = folder / f'.writable-{os.getpid()}'
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open_(probe, 'xb'):
            pass
        probe.unlink()
    except OSError as e:
        raise errors.InputError(
            f'{folder} cannot be written ({e.strerror or e}); choose another --workdir, or mend '
            'that'
        ) from e


def plain_name(name: object, said_by: str | buckets.Anywhere) -> str:
    """A name that a document gives of a file beside it.

    Raises:
      InputError: it is none, or leads elsewhere.
    """
    wrong = not isinstance(name, str) or name in ('', '.', '..') or bool({*'/\\\0'} & {*name})
    if wrong:
        raise errors.InputError(
            f'{said_by} names the file {name!r}, which is not in its folder; it is damaged, or not '
            'to be trusted'
        )
    return name


def sha256(path: buckets.Anywhere) -> str:
    """Hex digest of a file."""
    if isinstance(path, buckets.Path):
        digest = hashlib.sha256()
        for part in path.chunks():
            digest.update(part)
        return digest.hexdigest()
    with path.open('rb') as f:
        return hashlib.file_digest(f, 'sha256').hexdigest()


def cache_dir() -> pathlib.Path:
    """The user's cache folder: what may be lost is kept there; of a user without one, in TMPDIR."""
    home = os.environ.get('XDG_CACHE_HOME')
    if not home:
        try:
            home = pathlib.Path.home() / '.cache'
        except RuntimeError:
            home = pathlib.Path(tempfile.gettempdir()) / f'cache-{os.getuid()}'
    return pathlib.Path(home) / 'gptjax'


def remembered_sha256(path: pathlib.Path) -> str:
    """Hex digest of a file, computed once for every change of it.

    Remembered in cache_dir() with the file's size, times and inode.
    """
    before = _state(path)
    note = _note(path)
    with contextlib.suppress(OSError, ValueError, KeyError, RecursionError):
        kept = checksum.opened(json.loads(note.read_bytes()))
        if kept['state'] == before:
            return kept['sha256']
    digest = sha256(path)
    if _state(path) == before:
        remember_sha256(path, digest)
    return digest


def remember_sha256(path: pathlib.Path, digest: str) -> None:
    """Notes the digest of a file as it is now; a cache that cannot be written is none."""
    if path.resolve().is_relative_to(cache_dir() / 'scratch'):
        return  # of this process alone
    with contextlib.suppress(OSError):
        note = _note(path)
        note.parent.mkdir(parents=True, exist_ok=True)
        said = {'path': str(path), 'state': _state(path), 'sha256': digest}
        replace(note, json.dumps(checksum.sealed(said)))


def _state(path: pathlib.Path) -> list[int]:
    found = path.resolve().stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _note(path: pathlib.Path) -> pathlib.Path:
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()
    return cache_dir() / 'digests' / f'{name}.json'


@contextlib.contextmanager
def naming(path: pathlib.Path) -> Iterator[None]:
    """Errors of the system say which file: that of a full disk does not."""
    try:
        yield
    except OSError as e:
        if e.errno is not None and e.filename is None:
            e.filename = str(path)
        raise
