# SPDX-License-Identifier: Apache-2.0
"""Local text: a file, a folder of files, or a glob.

A .txt or .md file is one document; a line of a .jsonl or .ndjson file, an item of a .json list, a
row of a .csv, .tsv or .parquet file is one each. All of them may end in .gz or .zst, too, and be
written in any case. In a folder, hidden files and folders are passed over, other kinds are told of.
A record's own "split" (train, valid) is kept. Text is UTF-8, or what a byte-order mark says.
"""

import collections
import csv
import glob
import gzip
import hashlib
import io
import itertools
import json
import logging
import pathlib
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import zstandard

from gptjax.configs import errors
from gptjax.data import documents
from gptjax.storage import buckets, scratch
from gptjax.storage import files as text_files

_SPLITS = ('train', 'valid')
_PACKED = ('.gz', '.zst')
_PART = 2**20  # characters of a long text that are held at once
_PART_BYTES = 2**24  # of files, packed as they are, that one process reads
_LONGEST = 2**31 - 1  # of a field of a table; csv takes 131,072 characters by itself
_NO_TEXT = 'has no text in field {!r}; name the right one with --config.corpus.text_field'
_log = logging.getLogger(__name__)


def documents_of(path: str, text_field: str) -> Iterator[documents.Document | documents.Bad]:
    """The documents below `path`, files in sorted order, and what cannot be read of them.

    Raises:
      InputError: nothing that can be read is there; what a kind of file needs is not installed.
    """
    return documents_in(_files(path, tell=True), text_field)


def parts(path: str) -> list[list[pathlib.Path]]:
    """The files in order, in parts that are worth a job. Raises as documents_of()."""
    found: list[list[pathlib.Path]] = []
    size = _PART_BYTES
    for file in _files(path, tell=True):
        if size >= _PART_BYTES:
            found.append([])
            size = 0
        found[-1].append(file)
        size += file.stat().st_size
    return found


def documents_in(
    part: Iterable[pathlib.Path], text_field: str
) -> Iterator[documents.Document | documents.Bad]:
    """The documents of some of the files, as documents_of()."""
    for file in part:
        kind = _kind(file)
        try:
            with _open(file) as stream:
                for where, record in _READERS[kind](stream, text_field):
                    yield _document(f'{file}{where}', record, text_field)
        except errors.InputError:  # what is not installed is no fault of the file
            raise
        except (OSError, EOFError, ValueError, zlib.error, csv.Error, zstandard.ZstdError) as e:
            yield documents.Bad(str(file), f'cannot be read: {e}')


def identity(path: str) -> str:
    """Changes when a file is added, removed or edited."""
    listing = [_state(f) for f in _files(path, tell=False)]
    return hashlib.sha256(repr(listing).encode()).hexdigest()


def _files(path: str, tell: bool) -> list[pathlib.Path]:
    known = ', '.join(_READERS)
    if not path:
        raise errors.UsageError(
            'the set files needs --config.corpus.path=<a file, a folder or a glob>; it reads '
            f'{known}, also with .gz or .zst'
        )
    path, root = _here(path)
    if root.is_dir():
        found = [f for f in root.rglob('*') if not _is_hidden(f.relative_to(root))]
    else:
        found = [root] if root.is_file() else map(pathlib.Path, glob.glob(path, recursive=True))
    found = sorted(f for f in found if f.is_file())
    files = [f for f in found if _kind(f) in _READERS]
    kinds = collections.Counter(_kind(f) or 'without an ending' for f in found)
    other = collections.Counter({k: n for k, n in kinds.items() if k not in _READERS})
    said = ', '.join(f'{number} {kind}' for kind, number in other.most_common())
    if not files:
        raise errors.InputError(
            f'no text at {path!r}{f", only {said}" if said else ""}; --config.corpus.path names '
            f'files of the kinds {known}, also with .gz or .zst'
        )
    if other and tell:
        _log.warning('left out at %s, of other kinds: %s', path, said)
    return files


def _here(path: str) -> tuple[str, pathlib.Path]:
    """A path and glob as they are here, what they name in a bucket copied."""
    root = scratch.here(path)
    whole = itertools.takewhile(lambda part: not glob.has_magic(part), root.parts)
    scratch.need(pathlib.Path(*whole), own=False)
    return str(root), root


def _state(file: pathlib.Path) -> tuple[str, int, int | str]:
    """Changes when a file does: its path, its size, its time or checksum."""
    remote = scratch.origin(file)
    if isinstance(remote, buckets.Path):
        found = remote.object()
        return str(remote), file.stat().st_size, found.checksum if found else ''
    return str(file), file.stat().st_size, file.stat().st_mtime_ns


def _is_hidden(path: pathlib.Path) -> bool:
    return any(part.startswith('.') for part in path.parts)


def _kind(file: pathlib.Path) -> str:
    """The ending in lower case, without .gz and .zst."""
    endings = [ending.lower() for ending in file.suffixes]
    if endings and endings[-1] in _PACKED:
        endings.pop()
    return endings[-1] if endings else ''


def _open(file: pathlib.Path) -> io.BufferedReader:
    match file.suffix.lower():
        case '.gz':
            return io.BufferedReader(gzip.open(file))
        case '.zst':
            return io.BufferedReader(zstandard.open(file))
    return file.open('rb')


def _document(where: str, record: Any, text_field: str) -> documents.Document | documents.Bad:
    """What a file holds at a place: a text, a record with one, or what is wrong there."""
    if isinstance(record, documents.Document):
        return record
    if isinstance(record, Exception):
        return documents.Bad(where, str(record))
    if not isinstance(record, dict) or not isinstance(record.get(text_field), str):
        return documents.Bad(where, _NO_TEXT.format(text_field))
    text, split = record[text_field], record.get('split', '')
    if wrong := _wrong(text):
        return documents.Bad(where, wrong)
    text = text.removeprefix('\ufeff').replace('\r\n', '\n')
    return documents.Document(text, split if split in _SPLITS else '')


def _wrong(text: str, before: int = 0) -> str:
    """Why a text is none, so many characters behind its beginning; '' = it is one."""
    try:
        text.encode()
        return ''
    except UnicodeEncodeError as e:  # bytes that are no UTF-8 end here, too
        place = e.start
    code = ord(text[place])
    what = f'byte 0x{code - 0xDC00:02x}' if 0xDC80 <= code <= 0xDCFF else f'U+{code:04X}'
    return (
        f'is not valid UTF-8 or holds a lone surrogate: {what} at character '
        f'{before + place}; convert the file, as iconv -f latin1 -t utf-8'
    )


def _text(stream: io.BufferedReader, newline: str) -> io.TextIOBase:
    """A stream as text; bytes that are no UTF-8 come through as lone surrogates."""
    encoding = text_files.encoding_of(stream.peek(4)[:4])
    wrong = 'surrogateescape' if encoding == 'utf-8-sig' else 'strict'
    return io.TextIOWrapper(stream, encoding, errors=wrong, newline=newline)


# Readers: (stream, text_field) -> where in the file, and the record there or what is wrong with it.


def _whole(stream: io.BufferedReader, text_field: str) -> Iterator[tuple[str, Any]]:
    """A document, in parts; a line's end is never cut in two."""
    del text_field
    before, held = 0, ''
    with _text(stream, '') as text:
        more = True
        while more:
            read = text.read(_PART)
            more = len(read) == _PART
            whole, held = held + read, ''
            if more and whole.endswith('\r'):
                whole, held = whole[:-1], '\r'
            if wrong := _wrong(whole, before):
                yield '', ValueError(wrong)
                return
            told = whole if before else whole.removeprefix('\ufeff')
            before += len(whole)
            yield '', documents.Document(told.replace('\r\n', '\n'), '', more)


def _lines(stream: io.BufferedReader, text_field: str) -> Iterator[tuple[str, Any]]:
    del text_field
    with _text(stream, '\n') as text:
        yield from _parsed(text)


def _parsed(lines: io.TextIOBase) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f' line {number}'
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as e:
                yield where, ValueError(f'is no JSON: {e}')


def _items(stream: io.BufferedReader, text_field: str) -> Iterator[tuple[str, Any]]:
    """A list of records, one record, or one a line: all of these are called .json."""
    with _text(stream, '') as text:
        content = text.read()
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as e:
        if getattr(e, 'msg', '') != 'Extra data':
            raise ValueError(f'it is no JSON: {e}') from e
        yield from _parsed(io.StringIO(content, newline='\n'))
        return
    if not isinstance(found, list):
        found = [found]
    for number, item in enumerate(found, 1):
        yield f' item {number}', {text_field: item} if isinstance(item, str) else item


def _rows(delimiter: str) -> Callable[[io.BufferedReader, str], Iterator[tuple[str, Any]]]:
    def rows(stream: io.BufferedReader, text_field: str) -> Iterator[tuple[str, Any]]:
        csv.field_size_limit(_LONGEST)
        with _text(stream, '') as text:
            reader = csv.DictReader(text, delimiter=delimiter)
            _require_column(reader.fieldnames or [], text_field)
            while True:
                try:
                    row = next(reader)
                except StopIteration:
                    return
                except csv.Error as e:
                    row = ValueError(f'is no row: {e}')
                yield f' line {reader.line_num}', row

    return rows


def _table(stream: io.BufferedReader, text_field: str) -> Iterator[tuple[str, Any]]:
    try:
        from pyarrow import lib, parquet
    except ImportError as e:
        raise errors.InputError("Parquet files need: pip install 'gptjax[parquet]'") from e
    number = 0
    try:
        file = parquet.ParquetFile(stream if stream.seekable() else io.BytesIO(stream.read()))
        names = file.schema_arrow.names
        _require_column(names, text_field)
        for batch in file.iter_batches(columns=[n for n in (text_field, 'split') if n in names]):
            for row in batch.to_pylist():
                number += 1
                yield f' row {number}', row
    except (lib.ArrowException, TypeError, KeyError) as e:
        raise ValueError(f'it is damaged behind row {number}: {e}') from e


def _require_column(names: list[str], text_field: str) -> None:
    if text_field not in names:
        raise ValueError(
            f'it has no column {text_field!r} but: {", ".join(map(repr, names))}; name the right '
            'one with --config.corpus.text_field'
        )


_READERS = {
    '.txt': _whole,
    '.md': _whole,
    '.jsonl': _lines,
    '.ndjson': _lines,
    '.json': _items,
    '.csv': _rows(','),
    '.tsv': _rows('\t'),
    '.parquet': _table,
}
