# SPDX-License-Identifier: Apache-2.0
"""Local text: a .txt or .jsonl file, a folder of them, or a glob.

A .txt file is one document, a line of a .jsonl file another. A record's own "split" (train, valid)
is kept.
"""

import glob
import hashlib
import json
import pathlib
from collections.abc import Iterator

from gptjax.configs import errors
from gptjax.data import documents

_SPLITS = ('train', 'valid')


def documents_of(path: str, text_field: str) -> Iterator[documents.Document]:
    """The documents below `path`, files in sorted order.

    Raises:
      InputError: nothing is there, a file is not valid UTF-8, or a record has no text.
    """
    for file in _files(path):
        if file.suffix == '.jsonl':
            yield from _records(file, text_field)
        else:
            text = _decode(file, file.read_bytes())
            if text:
                yield documents.Document(text, '')


def identity(path: str) -> str:
    """Changes when a file is added, removed or edited."""
    listing = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in _files(path)]
    return hashlib.sha256(repr(listing).encode()).hexdigest()


def _files(path: str) -> list[pathlib.Path]:
    if not path:
        raise errors.UsageError(
            'the set files needs --config.corpus.path=<a .txt or .jsonl file, a folder or a glob>'
        )
    root = pathlib.Path(path)
    if root.is_file():
        return [root]
    found = root.rglob('*') if root.is_dir() else map(pathlib.Path, glob.glob(path, recursive=True))
    files = sorted(f for f in found if f.suffix in ('.txt', '.jsonl') and f.is_file())
    if not files:
        raise errors.InputError(f'no .txt or .jsonl file at {path!r}; check --config.corpus.path')
    return files


def _decode(file: pathlib.Path, content: bytes) -> str:
    try:
        return content.decode('utf-8')
    except UnicodeDecodeError as e:
        raise errors.InputError(
            f'{file} is not valid UTF-8: byte 0x{content[e.start]:02x} at offset {e.start}; '
            'convert it, as iconv -f latin1 -t utf-8, or leave it out'
        ) from e


def _records(file: pathlib.Path, text_field: str) -> Iterator[documents.Document]:
    with file.open('rb') as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(_decode(file, line))
            except json.JSONDecodeError as e:
                raise errors.InputError(f'{file} line {number} is no JSON: {e}') from e
            if not isinstance(record, dict) or not isinstance(record.get(text_field), str):
                raise errors.InputError(
                    f'{file} line {number} has no text in field {text_field!r}; '
                    'name the right one with --config.corpus.text_field'
                )
            split = record.get('split', '')
            yield documents.Document(record[text_field], split if split in _SPLITS else '')
