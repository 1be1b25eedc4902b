# SPDX-License-Identifier: Apache-2.0
"""A corpus on disk: documents in JSONL shards with a manifest written last.

One line a document: {"text": ..., "split": "train" | "valid" | ""}; an empty split is decided
later, by the document's hash. A long document takes several lines, all but the last with
"more": true, so that no more than a part of it need be held.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Iterable, Iterator
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


class Shard(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One JSONL file: its name, documents, UTF-8 bytes of text, sha256 of the file."""

    name: str
    documents: int
    text_bytes: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    source: dict[str, Any]
    shards: list[Shard]
    left_out: dict[str, int] = {}


def is_finished(folder: pathlib.Path, source: dict) -> bool:
    """Whether `folder` holds a whole corpus made from `source`."""
    try:
        found = documents_lib.read(scratch.need(folder) / MANIFEST, Manifest, '')
    except documents_lib.Damaged:
        return False
    before = found.source
    if before != {name: source[name] for name in before if name in source}:  # of its day
        return False
    return all(is_whole(folder, shard) for shard in found.shards)


def shards(folder: pathlib.Path) -> list[Shard]:
    """The shards of a finished corpus. Raises InputError where there is none, or a damaged one."""
    path = scratch.need(folder) / MANIFEST
    if not path.exists():
        raise errors.InputError(
            f'no finished corpus in {folder}; run python -m gptjax.prepare_corpus first'
        )
    found = documents_lib.read(path, Manifest, _REMEDY).shards
    for shard in found:
        files.plain_name(shard.name, path)
    return found


def read(folder: pathlib.Path, shard: Shard) -> Iterator[Text]:
    """The documents of one shard, in order. Raises InputError where it is damaged."""
    if not is_whole(folder, shard):
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


def is_whole(folder: pathlib.Path, shard: Shard) -> bool:
    """Whether a shard has the bytes that were written."""
    path = folder / files.plain_name(shard.name, folder / MANIFEST)
    return path.is_file() and files.remembered_sha256(path) == shard.sha256


def line(document: Document) -> bytes:
    """A document, or a part of one, as it stands in a shard."""
    more = b', "more": true' if document.more else b''
    text = _ENCODER.encode(document.text)  # as json writes it, and three times as fast
    return b'{"text": %b, "split": "%b"%b}\n' % (text, document.split.encode(), more)
