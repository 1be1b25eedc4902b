# SPDX-License-Identifier: Apache-2.0
"""A corpus on disk: documents in JSONL shards with a manifest written last.

One line a document: {"text": ..., "split": "train" | "valid" | ""}; an empty split is decided
later, by the document's hash.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

from gptjax.configs import errors
from gptjax.text import files, tokenizer

MANIFEST = 'manifest.json'
_SMALL = 1000  # documents; larger corpora always hold something out


@dataclasses.dataclass(frozen=True)
class Config:
    """The corpus section of configs/base.py."""

    set: str
    path: str
    text_field: str
    dir: str
    shard_bytes: int

    def __post_init__(self) -> None:
        errors.require_positive(self, 'shard_bytes')


@dataclasses.dataclass(frozen=True)
class Document:
    text: str
    split: Literal['train', 'valid', '']


@dataclasses.dataclass(frozen=True)
class Shard:
    """One JSONL file: its name, documents, UTF-8 bytes of text, sha256 of the file."""

    name: str
    documents: int
    text_bytes: int
    sha256: str


def write(
    folder: pathlib.Path,
    documents: Iterable[Document],
    shard_bytes: int,
    source: dict,
    progress: Callable[[int], None],
) -> list[Shard]:
    """Writes documents that hold text into shards of about `shard_bytes`, then the manifest.

    Interrupted and called again it keeps the shards that are whole and goes on after them, so
    `documents` must come in the same order every time.

    Args:
      source: what the documents were made from; recorded in the manifest.
      progress: is told the bytes of every document written.

    Raises:
      InputError: there is no text, a lone surrogate in it, or shards of another source.
    """
    folder.mkdir(parents=True, exist_ok=True)
    started = folder / 'source.json'
    shards = _whole_shards(folder)
    if shards and json.loads(started.read_text()) != source:
        raise errors.InputError(
            f'{folder} was begun from another source ({started.read_text().strip()}); '
            'remove that folder or choose another corpus.dir'
        )
    files.replace(started, json.dumps(source) + '\n')
    texts = (document for document in documents if document.text)
    rest = itertools.islice(texts, sum(s.documents for s in shards), None)
    while shard := _write_shard(folder, len(shards), rest, shard_bytes, progress):
        shards.append(shard)
    if not shards:
        raise errors.InputError(
            f'the corpus is empty: no text in {source.get("path") or source.get("set")!r}'
        )
    manifest = {'source': source, 'shards': [dataclasses.asdict(s) for s in shards]}
    files.replace(folder / MANIFEST, json.dumps(manifest, indent=1) + '\n')
    return shards


def is_finished(folder: pathlib.Path, source: dict) -> bool:
    """Whether `folder` holds a whole corpus made from `source`."""
    path = folder / MANIFEST
    return path.exists() and json.loads(path.read_text())['source'] == source


def shards(folder: pathlib.Path) -> list[Shard]:
    """The shards of a finished corpus. Raises InputError where there is none."""
    path = folder / MANIFEST
    if not path.exists():
        raise errors.InputError(
            f'no finished corpus in {folder}; run python -m gptjax.prepare_corpus first'
        )
    return [Shard(**shard) for shard in json.loads(path.read_text())['shards']]


def read(path: pathlib.Path) -> Iterator[Document]:
    """The documents of one shard, in order."""
    with path.open(encoding='utf-8') as f:
        for line in f:
            yield Document(**json.loads(line))


def split(folder: pathlib.Path, shard: Shard, valid_fraction: float) -> Iterator[Document]:
    """The documents of one shard of a finished corpus, each with its split decided.

    A document's own split holds, else the hash of its text decides: the same on every machine.
    Where that leaves one of the splits of a small corpus empty, the last document is cut: its end
    is held out.
    """
    found = shards(folder)
    cutting = (
        valid_fraction > 0
        and shard == found[-1]
        and sum(s.documents for s in found) <= _SMALL
        and len({_decided(d, valid_fraction) for s in found for d in read(folder / s.name)}) == 1
    )
    for number, document in enumerate(read(folder / shard.name), 1):
        if cutting and number == shard.documents and not document.split:
            at = int(len(document.text) * (1 - valid_fraction))
            yield Document(document.text[:at], 'train')
            yield Document(document.text[at:], 'valid')
        else:
            yield Document(document.text, _decided(document, valid_fraction))


def training_texts(folder: pathlib.Path, valid_fraction: float, limit_bytes: int) -> Iterator[str]:
    """Texts from the start of a corpus up to a size, without what is held out."""
    taken = 0
    for shard in shards(folder):
        for document in split(folder, shard, valid_fraction):
            if taken >= limit_bytes:
                return
            if document.split == 'train':
                taken += len(document.text.encode())
                yield document.text


def _decided(document: Document, valid_fraction: float) -> str:
    if document.split:
        return document.split
    digest = hashlib.blake2b(document.text.encode(), digest_size=8).digest()
    return 'valid' if int.from_bytes(digest, 'big') < valid_fraction * 2**64 else 'train'


def _whole_shards(folder: pathlib.Path) -> list[Shard]:
    found = []
    while (record := folder / f'documents-{len(found):05d}.json').exists():
        found.append(Shard(**json.loads(record.read_text())))
    return found


def _write_shard(
    folder: pathlib.Path,
    index: int,
    documents: Iterator[Document],
    shard_bytes: int,
    progress: Callable[[int], None],
) -> Shard | None:
    path = folder / f'documents-{index:05d}.jsonl'
    count = size = 0
    with path.open('w', encoding='utf-8') as f:
        for document in documents:
            tokenizer.check_text(document.text)
            f.write(json.dumps(dataclasses.asdict(document), ensure_ascii=False) + '\n')
            written = len(document.text.encode())
            progress(written)
            count, size = count + 1, size + written
            if size >= shard_bytes:
                break
        f.flush()
        os.fsync(f.fileno())
    if not count:
        path.unlink()
        return None
    shard = Shard(path.name, count, size, files.sha256(path))
    files.replace(path.with_suffix('.json'), json.dumps(dataclasses.asdict(shard)) + '\n')
    return shard
