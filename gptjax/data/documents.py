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
import itertools
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple

import msgspec

from gptjax.configs import errors
from gptjax.storage import documents as documents_lib
from gptjax.storage import files, scratch

MANIFEST, BAD = 'manifest.json', 'bad.jsonl'
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

    def __post_init__(self) -> None:
        errors.require_positive(self, 'shard_bytes')
        errors.require_choice(self, 'repeated', ('once', 'all'))
        errors.require_between(self, 0, 2**60, 'max_bad')


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


_DECODER = msgspec.json.Decoder(Document)


@dataclasses.dataclass(frozen=True)
class Bad:
    """What a source holds instead of a document: where it stands, and what is wrong with it."""

    where: str
    why: str


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
    found: Iterable[Document | Bad],
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
    with files.open_(folder / BAD, 'x') as bad:
        texts = _kept(_assembled(found, folder), config, left_out, bad)
        rest = itertools.islice(texts, sum(s.documents for s in shards), None)
        while shard := _write_shard(folder, len(shards), rest, config.shard_bytes, progress):
            shards.append(shard)
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


def _assembled(found: Iterable[Document | Bad], folder: pathlib.Path) -> Iterator[Text | Bad]:
    """Documents whole, the parts of a long one kept in a file of no name until it ends."""
    number, size, held = 1, 0, None
    for one in found:
        if isinstance(one, Document):
            try:
                size += len(one.text.encode())
            except UnicodeEncodeError as e:
                why = f'holds a lone surrogate, U+{ord(one.text[e.start]):04X}'
                one = Bad(f'document {number}', f'{why} at character {e.start}')
        if isinstance(one, Document) and (one.more or held):
            held = held or _Held(folder)
            held.add(one.text)
        if isinstance(one, Bad):
            yield one
        elif not one.more:
            yield Text(one.split, size, held or (one.text,))
        if isinstance(one, Bad) or not one.more:
            if held:
                held.close()
            number, size, held = number + 1, 0, None


class _Held:
    """Parts of a text that are in no memory."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self.close = self._file.close

    def add(self, part: str) -> None:
        """Adds a part behind the others."""
        self._file.write(_line(Document(part, '')))

    def __iter__(self) -> Iterator[str]:
        self._file.seek(0)
        for line in self._file:
            yield _DECODER.decode(line).text


def _kept(
    found: Iterable[Text | Bad], config: Config, left_out: dict[str, int], bad: io.TextIOBase
) -> Iterator[Text]:
    """The documents that are written; the others are counted, and what is bad is set aside."""
    seen: set[bytes] = set()
    for one in found:
        if isinstance(one, Bad):
            left_out['bad'] += 1
            line = json.dumps(dataclasses.asdict(one), ensure_ascii=False) + '\n'
            files.appended(bad, line, pathlib.Path(bad.name))
            if left_out['bad'] > config.max_bad:
                raise errors.InputError(
                    f'{one.where} {one.why}. More than --config.corpus.max_bad={config.max_bad} '
                    f'records are bad, see {bad.name}'
                )
        elif not any(part.strip() for part in one.parts):
            left_out['empty'] += 1
        else:
            digest = one.digest(16)
            if digest in seen:
                left_out['repeated'] += 1
            else:
                yield one
            if config.repeated == 'once':
                seen.add(digest)


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


def _write_shard(
    folder: pathlib.Path,
    index: int,
    texts: Iterator[Text],
    shard_bytes: int,
    progress: Callable[[int], None],
) -> Shard | None:
    path = folder / f'documents-{index:05d}.jsonl'
    count = size = 0
    digest = hashlib.sha256()  # of what was to be written, whatever the disk holds
    path.unlink(missing_ok=True)
    with files.naming(path), files.open_(path, 'xb') as f:
        for text in texts:
            for document in _documents(text):
                line = _line(document)
                f.write(line)
                digest.update(line)
                progress(len(document.text.encode()))
            count, size = count + 1, size + text.size
            if size >= shard_bytes:
                break
        f.flush()
        os.fsync(f.fileno())
    if not count:
        path.unlink()
        return None
    shard = Shard(path.name, count, size, digest.hexdigest())
    documents_lib.write(path.with_suffix('.json'), msgspec.to_builtins(shard))
    return shard


def _documents(text: Text) -> Iterator[Document]:
    """A document, or its parts, as they are written."""
    parts = iter(text.parts)
    held = next(parts)
    for part in parts:
        yield Document(held, text.split, more=True)
        held = part
    yield Document(held, text.split)


def _line(document: Document) -> bytes:
    fields = {'text': document.text, 'split': document.split}
    fields |= {'more': True} if document.more else {}
    return json.dumps(fields, ensure_ascii=False).encode() + b'\n'
