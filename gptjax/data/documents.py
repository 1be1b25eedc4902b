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

MANIFEST = 'manifest.json'


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
    """Writes documents into shards of about `shard_bytes` of text, then the manifest.

    Interrupted and called again it keeps the shards that are whole and goes on after them, so
    `documents` must come in the same order every time.

    Args:
      source: what the documents were made from; recorded in the manifest.
      progress: is told the bytes of every document written.

    Raises:
      InputError: there are no documents, or the folder holds shards of another source.
    """
    folder.mkdir(parents=True, exist_ok=True)
    started = folder / 'source.json'
    if started.exists() and json.loads(started.read_text()) != source:
        raise errors.InputError(
            f'{folder} was begun from another source ({started.read_text().strip()}); '
            'remove that folder or choose another corpus.dir'
        )
    replace_text(started, json.dumps(source) + '\n')
    shards = _whole_shards(folder)
    rest = itertools.islice(documents, sum(s.documents for s in shards), None)
    while shard := _write_shard(folder, len(shards), rest, shard_bytes, progress):
        shards.append(shard)
    if not any(shard.text_bytes for shard in shards):
        raise errors.InputError(
            f'the corpus is empty: no text in {source.get("path") or source.get("set")!r}'
        )
    manifest = {'source': source, 'shards': [dataclasses.asdict(s) for s in shards]}
    replace_text(folder / MANIFEST, json.dumps(manifest, indent=1) + '\n')
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


def texts(folder: pathlib.Path, limit_bytes: int) -> Iterator[str]:
    """Texts from the start of a corpus, documents to hold out left aside, up to a size."""
    taken = 0
    for shard in shards(folder):
        for document in read(folder / shard.name):
            if taken >= limit_bytes:
                return
            if document.split != 'valid':
                taken += len(document.text.encode())
                yield document.text


def replace_text(path: pathlib.Path, text: str) -> None:
    """Writes a file so that a reader sees the old or the new one, never a part."""
    partial = path.with_name(path.name + '.partial')
    with partial.open('w', encoding='utf-8') as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    partial.replace(path)


def sha256(path: pathlib.Path) -> str:
    """Hex digest of a file."""
    with path.open('rb') as f:
        return hashlib.file_digest(f, 'sha256').hexdigest()


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
    shard = Shard(path.name, count, size, sha256(path))
    replace_text(path.with_suffix('.json'), json.dumps(dataclasses.asdict(shard)) + '\n')
    return shard
