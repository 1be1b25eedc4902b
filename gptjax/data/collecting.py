# SPDX-License-Identifier: Apache-2.0
"""What sources hold, made into a corpus: pieces of it side by side, then shards one by one.

Parts of a source are read by any number of processes; each piece is a file of lines, and all of
them, joined in order, are the corpus.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any, BinaryIO, NamedTuple

import msgspec
import numpy as np

from gptjax.configs import errors, lookup
from gptjax.data import documents, seen
from gptjax.storage import documents as documents_lib
from gptjax.storage import files, scratch

_PIECE_BYTES, _PIECE_BAD = 2**26, 1000
_DIGEST_BYTES = 16
_COPIED = 2**20  # bytes at once


class Piece(NamedTuple):
    """Documents that hold text, as lines of a file; and what else was there.

    Attributes:
      digests: two numbers of each document, the BLAKE2b hash of its UTF-8 bytes (N 2).
      sizes: its UTF-8 bytes (N).
      ends: where its lines end in the file (N).
      bad: what is no document.
      empty: how many documents held white space alone.
    """

    path: pathlib.Path
    digests: np.ndarray
    sizes: np.ndarray
    ends: np.ndarray
    bad: list[documents.Bad]
    empty: int


class Job(NamedTuple):
    """Part of what a set holds, for a process to read."""

    set: str
    path: str
    part: Any  # one of the set's parts(path); None = all of it
    text_field: str
    stem: pathlib.Path  # begins the names of its files

    def run(self, advance: Callable[[int], None]) -> Iterator[Piece]:
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
) -> Iterator[Piece]:
    """The documents of a source, and what is wrong there."""
    number, piece = 1, _PieceWriter(stem.with_name(f'{stem.name}-0'))
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
                piece = _PieceWriter(stem.with_name(f'{stem.name}-{number}'))
        yield piece.close()
    finally:
        piece.file.close()


def write(
    folder: pathlib.Path,
    found: Iterable[Piece],
    config: documents.Config,
    source: dict,
    progress: Callable[[int], None],
) -> dict[str, int]:
    """Writes documents that hold text into shards of about `shard_bytes`, then the manifest.

    Documents of white space alone are left out; one that repeats an earlier one exactly is, too,
    unless config.repeated = 'all'. What is bad stands in documents.BAD.

    Interrupted and called again it keeps the shards that are whole and goes on after them, so
    `found` must come in the same order every time.

    Args:
      found: their files are removed.
      source: what the documents were made from; recorded in the manifest.
      progress: is told the bytes of every document written.

    Returns:
      how many were left out: 'bad', 'empty', 'repeated'.

    Raises:
      InputError: there is no text, shards of another source, or more is bad than config.max_bad.
    """
    folder.mkdir(parents=True, exist_ok=True)
    started = folder / 'source.json'
    shards = _whole_shards(folder)
    records = sorted(folder.glob('documents-*.json'))
    before = _begun_from(folder) if records else source
    if before != source:
        raise errors.InputError(
            f'{folder} was begun from another source ({_difference(before, source)}); remove that '
            'folder or choose another --config.corpus.dir'
        )
    documents_lib.write(started, source)
    for later in records[len(shards) :]:  # else a stop would leave them behind new ones
        later.unlink()
    left_out = {'bad': 0, 'empty': 0, 'repeated': 0}
    (folder / documents.BAD).unlink(missing_ok=True)
    passed = sum(shard.documents for shard in shards)
    with (
        files.open_(folder / documents.BAD, 'x') as bad,
        _ShardWriter(folder, shards, config.shard_bytes, progress) as writer,
    ):
        for piece, places in _kept(found, config, left_out, bad):
            with piece.path.open('rb') as lines:
                for first, last in _runs(places[passed:]):
                    writer.add(lines, piece, first, last)
            passed = max(0, passed - len(places))
            piece.path.unlink()
    if not left_out['bad']:
        (folder / documents.BAD).unlink()
    if not shards:
        raise errors.InputError(_no_text(folder, left_out, source))
    manifest = {'source': source, 'left_out': left_out}
    documents_lib.write(
        folder / documents.MANIFEST, manifest | {'shards': msgspec.to_builtins(shards)}
    )
    return left_out


class _PieceWriter:
    """Writes documents, each in one or several parts, to a file."""

    def __init__(self, path: pathlib.Path) -> None:
        self._path, self.bad, self._empty = path, [], 0
        self.file = files.open_(path, 'xb')
        self._digests: list[bytes] = []
        self._sizes: list[int] = []
        self._ends = [0]
        self._begin()

    def _begin(self) -> None:
        self._size, self._is_blank = 0, True
        self._digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)

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

    def close(self) -> Piece:
        with files.naming(self._path):
            self.file.close()
        digests = np.frombuffer(b''.join(self._digests), np.uint64).reshape(-1, 2)
        numbers = (np.array(x, np.int64) for x in (self._sizes, self._ends[1:]))
        return Piece(self._path, digests, *numbers, self.bad, self._empty)


def _no_text(folder: pathlib.Path, left_out: dict[str, int], source: dict) -> str:
    """Why a corpus is empty."""
    why = ''
    if left_out['bad']:
        first = documents_lib.read_lines(folder / documents.BAD, ('where', 'why')).rows[0]
        why = f'; {first["where"]} {first["why"]}'
    return f'the corpus is empty: no text in {source.get("path") or source.get("set")!r}{why}'


def _begun_from(folder: pathlib.Path) -> dict[str, Any]:
    """The source of a corpus; its manifest says so, too, where there is one."""
    with contextlib.suppress(documents_lib.Damaged):
        return documents_lib.read(folder / documents.MANIFEST, documents.Manifest, '').source
    return documents_lib.read(folder / 'source.json', dict, f'remove {folder}, then run this again')


def _difference(before: dict, source: dict) -> str:
    """What differs between two sources: their fields, else what is found there."""
    named = [name for name in source if name != 'identity' and source[name] != before.get(name)]
    if not named:
        return f'what is in {source.get("path") or source.get("set")!r} has changed since'
    return ', '.join(errors.both(name, before.get(name), source[name]) for name in named)


def _kept(
    found: Iterable[Piece], config: documents.Config, left_out: dict[str, int], bad: io.TextIOBase
) -> Iterator[tuple[Piece, np.ndarray]]:
    """The places of the documents that are written; the others are counted, the bad set aside."""
    known = seen.Seen()
    for piece in found:
        for found_bad in piece.bad:  # by a process that may know nothing of buckets
            one = documents.Bad(scratch.told(found_bad.where), scratch.told(found_bad.why))
            left_out['bad'] += 1
            said = json.dumps(dataclasses.asdict(one), ensure_ascii=False) + '\n'
            files.appended(bad, said, pathlib.Path(bad.name))
            if left_out['bad'] > config.max_bad:
                raise errors.InputError(
                    f'{one.where} {one.why}. More than --config.corpus.max_bad={config.max_bad} '
                    f'records are bad, see {bad.name}'
                )
        left_out['empty'] += piece.empty
        places = np.arange(len(piece.sizes))
        if config.repeated == 'once':
            places = places[known.add(piece.digests)]
        left_out['repeated'] += len(piece.sizes) - len(places)
        yield piece, places


def _runs(places: np.ndarray) -> Iterator[tuple[int, int]]:
    """Consecutive places, as (first, behind the last)."""
    breaks = np.flatnonzero(np.diff(places) != 1) + 1
    for run in np.split(places, breaks):
        if len(run):
            yield int(run[0]), int(run[-1]) + 1


def _whole_shards(folder: pathlib.Path) -> list[documents.Shard]:
    """The first shards that are whole: what comes after one that is not is written again."""
    found: list[documents.Shard] = []
    with contextlib.suppress(documents_lib.Damaged):
        while True:
            name = f'documents-{len(found):05d}'
            shard = documents_lib.read(folder / f'{name}.json', documents.Shard, '')
            if shard.name != f'{name}.jsonl' or not documents.is_whole(folder, shard):
                break
            found.append(shard)
    return found


class _ShardWriter:
    """Writes shards, one after the other."""

    def __init__(
        self,
        folder: pathlib.Path,
        shards: list[documents.Shard],
        shard_bytes: int,
        progress: Callable[[int], None],
    ) -> None:
        """Args: shards: those that are there; finished ones are added."""
        self._folder, self._shards, self._most, self._progress = (
            folder,
            shards,
            shard_bytes,
            progress,
        )
        self._file: IO | None = None

    def __enter__(self) -> '_ShardWriter':
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self._file is None:
            return
        if kind is None:
            self._end()
        else:
            self._file.close()  # the shard is not whole

    def add(self, lines: BinaryIO, piece: Piece, first: int, last: int) -> None:
        """Adds the documents of a piece from first to last."""
        while first < last:
            if self._file is None:
                self._begin()
            totals = self._size + np.cumsum(piece.sizes[first:last])
            full = int(np.searchsorted(totals, self._most))  # the one that fills the shard
            stop = min(first + full + 1, last)
            self._copy(lines, int(piece.ends[first - 1]) if first else 0, int(piece.ends[stop - 1]))
            written = int(totals[stop - first - 1]) - self._size
            self._count, self._size = self._count + stop - first, self._size + written
            self._progress(written)
            first = stop
            if self._size >= self._most:
                self._end()

    def _begin(self) -> None:
        self._path = self._folder / f'documents-{len(self._shards):05d}.jsonl'
        self._path.unlink(missing_ok=True)
        self._file = files.open_(self._path, 'xb')
        self._count = self._size = 0
        self._digest = hashlib.sha256()  # of what was to be written, whatever the disk holds

    def _copy(self, lines: BinaryIO, begin: int, end: int) -> None:
        lines.seek(begin)
        with files.naming(self._path):
            while begin < end:
                read = lines.read(min(_COPIED, end - begin))
                self._file.write(read)
                self._digest.update(read)
                begin += len(read)

    def _end(self) -> None:
        with files.naming(self._path), self._file as file:
            file.flush()
            os.fsync(file.fileno())
        self._file = None
        shard = documents.Shard(self._path.name, self._count, self._size, self._digest.hexdigest())
        documents_lib.write(self._path.with_suffix('.json'), msgspec.to_builtins(shard))
        self._shards.append(shard)
