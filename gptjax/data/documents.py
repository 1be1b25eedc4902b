# SPDX-License-Identifier: Apache-2.0
"""A corpus on disk: documents in JSONL shards with a manifest written last.

One line a document: {"text": ..., "split": "train" | "valid" | ""}; an empty split is decided
later, by the document's hash. A long document takes several lines, all but the last with
"more": true, so that no more than a part of it need be held.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any, BinaryIO, Literal, NamedTuple

import msgspec
import numpy as np

from gptjax.configs import errors
from gptjax.data import seen as seen_lib
from gptjax.storage import documents as documents_lib
from gptjax.storage import files, scratch

MANIFEST, BAD = 'manifest.json', 'bad.jsonl'
DIGEST_BYTES = 16
_COPIED = 2**20
_REMEDY = 'run python -m gptjax.prepare_corpus again, which makes it whole'


@dataclasses.dataclass(frozen=True)
class Config:
    """The corpus section of configs/base.py."""

    set: str
    path: str
    text_field: str
    dir: str
    shard_bytes: int
    repeated: Literal['once', 'all']
    max_bad: int
    processes: int

    def __post_init__(self) -> None:
        errors.require_positive(self, 'shard_bytes')
        errors.require_choice(self, 'repeated', ('once', 'all'))
        errors.require_between(self, 0, 2**60, 'max_bad', 'processes')


@dataclasses.dataclass(frozen=True)
class Document:
    """A document; or a part of one, which the next one continues where there is more."""

    text: str
    split: Literal['train', 'valid', '']
    more: bool = False


class Text(NamedTuple):
    """A document of any length. parts: of its text, in order, as often as asked for."""

    split: str
    size: int  # UTF-8 bytes
    parts: Iterable[str]

    @property
    def text(self) -> str:
        """All of it."""
        return ''.join(self.parts)

    def digest(self, size: int) -> bytes:
        """The BLAKE2b hash of its UTF-8 bytes, in so many bytes."""
        found = hashlib.blake2b(digest_size=size)
        for part in self.parts:
            found.update(part.encode())
        return found.digest()


_DECODER, _ENCODER = msgspec.json.Decoder(Document), msgspec.json.Encoder()


@dataclasses.dataclass(frozen=True)
class Bad:
    """What a source holds instead of a document: where it stands, and what is wrong with it."""

    where: str
    why: str


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
    bad: list[Bad]
    empty: int


class Shard(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One JSONL file: its name, documents, UTF-8 bytes of text, sha256 of the file."""

    name: str
    documents: int
    text_bytes: int
    sha256: str


class _Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    source: dict[str, Any]
    shards: list[Shard]
    left_out: dict[str, int] = {}


def write(
    folder: pathlib.Path,
    found: Iterable[Piece],
    config: Config,
    source: dict,
    progress: Callable[[int], None],
) -> dict[str, int]:
    """Writes documents that hold text into shards of about `shard_bytes`, then the manifest.

    Documents of white space alone are left out; one that repeats an earlier one exactly is, too,
    unless config.repeated = 'all'. What is bad stands in BAD.

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
    (folder / BAD).unlink(missing_ok=True)
    passed = sum(shard.documents for shard in shards)
    with (
        files.open_(folder / BAD, 'x') as bad,
        _Writer(folder, shards, config.shard_bytes, progress) as writer,
    ):
        for piece, places in _kept(found, config, left_out, bad):
            with piece.path.open('rb') as lines:
                for first, last in _runs(places[passed:]):
                    writer.add(lines, piece, first, last)
            passed = max(0, passed - len(places))
            piece.path.unlink()
    if not left_out['bad']:
        (folder / BAD).unlink()
    if not shards:
        why = ''
        if left_out['bad']:
            first = documents_lib.read_lines(folder / BAD, ('where', 'why')).rows[0]
            why = f'; {first["where"]} {first["why"]}'
        raise errors.InputError(
            f'the corpus is empty: no text in {source.get("path") or source.get("set")!r}{why}'
        )
    manifest = {'source': source, 'left_out': left_out}
    documents_lib.write(folder / MANIFEST, manifest | {'shards': msgspec.to_builtins(shards)})
    return left_out


def _begun_from(folder: pathlib.Path) -> dict[str, Any]:
    """The source of a corpus; its manifest says so, too, where there is one."""
    with contextlib.suppress(documents_lib.Damaged):
        return documents_lib.read(folder / MANIFEST, _Manifest, '').source
    return documents_lib.read(folder / 'source.json', dict, f'remove {folder}, then run this again')


def _difference(before: dict, source: dict) -> str:
    """What differs between two sources: their fields, else what is found there."""
    named = [name for name in source if name != 'identity' and source[name] != before.get(name)]
    if not named:
        return f'what is in {source.get("path") or source.get("set")!r} has changed since'
    return ', '.join(errors.both(name, before.get(name), source[name]) for name in named)


def _kept(
    found: Iterable[Piece], config: Config, left_out: dict[str, int], bad: io.TextIOBase
) -> Iterator[tuple[Piece, np.ndarray]]:
    """The places of the documents that are written; the others are counted, the bad set aside."""
    seen = seen_lib.Seen()
    for piece in found:
        for found_bad in piece.bad:  # by a process that may know nothing of buckets
            one = Bad(scratch.told(found_bad.where), scratch.told(found_bad.why))
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
            places = places[seen.add(piece.digests)]
        left_out['repeated'] += len(piece.sizes) - len(places)
        yield piece, places


def _runs(places: np.ndarray) -> Iterator[tuple[int, int]]:
    """Consecutive places, as (first, behind the last)."""
    breaks = np.flatnonzero(np.diff(places) != 1) + 1
    for run in np.split(places, breaks):
        if len(run):
            yield int(run[0]), int(run[-1]) + 1


def is_finished(folder: pathlib.Path, source: dict) -> bool:
    """Whether `folder` holds a whole corpus made from `source`."""
    try:
        found = documents_lib.read(scratch.need(folder) / MANIFEST, _Manifest, '')
    except documents_lib.Damaged:
        return False
    before = found.source
    if before != {name: source[name] for name in before if name in source}:  # of its day
        return False
    return all(_is_whole(folder, shard) for shard in found.shards)


def shards(folder: pathlib.Path) -> list[Shard]:
    """The shards of a finished corpus. Raises InputError where there is none, or a damaged one."""
    path = scratch.need(folder) / MANIFEST
    if not path.exists():
        raise errors.InputError(
            f'no finished corpus in {folder}; run python -m gptjax.prepare_corpus first'
        )
    found = documents_lib.read(path, _Manifest, _REMEDY).shards
    for shard in found:
        files.plain_name(shard.name, path)
    return found


def read(folder: pathlib.Path, shard: Shard) -> Iterator[Text]:
    """The documents of one shard, in order. Raises InputError where it is damaged."""
    if not _is_whole(folder, shard):
        raise errors.InputError(
            f'{folder / shard.name} is missing, or is not what {MANIFEST} says; {_REMEDY}'
        )
    size = begins = end = 0
    for end, document in _lines(folder / shard.name, 0):
        size += len(document.text.encode())
        if not document.more:
            single = size == len(document.text.encode())
            parts = (document.text,) if single else _Parts(folder / shard.name, begins)
            yield Text(document.split, size, parts)
            size, begins = 0, end


class _Parts:
    """The parts of the document that begins at a byte of a shard."""

    def __init__(self, path: pathlib.Path, begins: int) -> None:
        self._path, self._begins = path, begins

    def __iter__(self) -> Iterator[str]:
        for _, document in _lines(self._path, self._begins):
            yield document.text
            if not document.more:
                return


def _lines(path: pathlib.Path, begins: int) -> Iterator[tuple[int, Document]]:
    """Where each line of a shard ends, and what it holds."""
    with path.open('rb') as f:
        f.seek(begins)
        for line in f:
            begins += len(line)
            try:
                yield begins, _DECODER.decode(line)
            except ValueError as e:
                raise errors.InputError(f'{path} holds no document: {e}') from e


def _is_whole(folder: pathlib.Path, shard: Shard) -> bool:
    path = folder / files.plain_name(shard.name, folder / MANIFEST)
    return path.is_file() and files.remembered_sha256(path) == shard.sha256


def _whole_shards(folder: pathlib.Path) -> list[Shard]:
    """The first shards that are whole: what comes after one that is not is written again."""
    found: list[Shard] = []
    with contextlib.suppress(documents_lib.Damaged):
        while True:
            name = f'documents-{len(found):05d}'
            shard = documents_lib.read(folder / f'{name}.json', Shard, '')
            if shard.name != f'{name}.jsonl' or not _is_whole(folder, shard):
                break
            found.append(shard)
    return found


class _Writer:
    """Writes shards, one after the other."""

    def __init__(
        self,
        folder: pathlib.Path,
        shards: list[Shard],
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

    def __enter__(self) -> '_Writer':
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
        shard = Shard(self._path.name, self._count, self._size, self._digest.hexdigest())
        documents_lib.write(self._path.with_suffix('.json'), msgspec.to_builtins(shard))
        self._shards.append(shard)


def line(document: Document) -> bytes:
    """A document, or a part of one, as it stands in a shard."""
    more = b', "more": true' if document.more else b''
    text = _ENCODER.encode(document.text)  # as json writes it, and three times as fast
    return b'{"text": %b, "split": "%b"%b}\n' % (text, document.split.encode(), more)
