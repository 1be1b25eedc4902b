# SPDX-License-Identifier: Apache-2.0
"""Files that a reader sees whole or not at all; bytes as text."""

import contextlib
import hashlib
import json
import os
import pathlib
from typing import Any

from gptjax.configs import errors

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


def replace(path: pathlib.Path, content: str | bytes) -> None:
    """Writes a file so that, whatever happens, its old or its new content is there."""
    partial = path.with_name(path.name + '.partial')
    with partial.open('wb') as f:
        f.write(content.encode() if isinstance(content, str) else content)
        f.flush()
        os.fsync(f.fileno())
    partial.replace(path)


def sha256(path: pathlib.Path) -> str:
    """Hex digest of a file."""
    with path.open('rb') as f:
        return hashlib.file_digest(f, 'sha256').hexdigest()


def cache_dir() -> pathlib.Path:
    """The user's cache folder: what may be lost is kept there."""
    home = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
    return pathlib.Path(home) / 'gptjax'


def remembered_sha256(path: pathlib.Path) -> str:
    """Hex digest of a file, computed once for every change of it.

    Remembered in cache_dir() with the file's size, times and inode.
    """
    found = path.resolve().stat()
    state = [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()
    note = cache_dir() / 'digests' / f'{name}.json'
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        kept = json.loads(note.read_text(encoding='utf-8'))
        if kept['state'] == state:
            return str(kept['sha256'])
    digest = sha256(path)
    with contextlib.suppress(OSError):  # a cache that cannot be written is none
        note.parent.mkdir(parents=True, exist_ok=True)
        replace(note, json.dumps({'path': str(path), 'state': state, 'sha256': digest}))
    return digest
