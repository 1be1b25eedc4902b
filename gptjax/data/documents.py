# SPDX-License-Identifier: Apache-2.0
"""A corpus on disk: documents in JSONL shards with a manifest written last.

One line a document: {"text": ..., "split": "train" | "valid" | ""}; an empty split is decided
later, by the document's hash.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import msgspec

from gptjax.configs import errors
from gptjax.storage import documents as documents_lib
from gptjax.storage import files, scratch

MANIFEST, BAD = 'manifest.json', 'bad.jsonl'
_REMEDY = 'run python -m gptjax.prepare_corpus again, which makes it whole'
_SMALL = 1000  # documents; of more, hashes hold out about the right share


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
    text: str
    split: Literal['train', 'valid', '']


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
        texts = _kept(found, config, left_out, bad)
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


def _kept(
    found: Iterable[Document | Bad], config: Config, left_out: dict[str, int], bad: io.TextIOBase
) -> Iterator[Document]:
    """The documents that are written; the others are counted, and what is bad is set aside."""
    seen: set[bytes] = set()
    for number, one in enumerate(found, 1):
        if isinstance(one, Document):
            try:
                content = one.text.encode()
            except UnicodeEncodeError as e:
                why = f'holds a lone surrogate, U+{ord(one.text[e.start]):04X}'
                one = Bad(f'document {number}', f'{why} at character {e.start}')
        if isinstance(one, Bad):
            left_out['bad'] += 1
            line = json.dumps(dataclasses.asdict(one), ensure_ascii=False) + '\n'
            files.appended(bad, line, pathlib.Path(bad.name))
            if left_out['bad'] > config.max_bad:
                raise errors.InputError(
                    f'{one.where} {one.why}. More than --config.corpus.max_bad={config.max_bad} '
                    f'records are bad, see {bad.name}'
                )
        elif not one.text.strip():
            left_out['empty'] += 1
        else:
            digest = hashlib.blake2b(content, digest_size=16).digest()
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


def read(folder: pathlib.Path, shard: Shard) -> Iterator[Document]:
    """The documents of one shard, in order. Raises InputError where it is damaged."""
    if not _is_whole(folder, shard):
        raise errors.InputError(
            f'{folder / shard.name} is missing, or is not what {MANIFEST} says; {_REMEDY}'
        )
    with (folder / shard.name).open('rb') as f:
        for line in f:
            try:
                yield _DECODER.decode(line)
            except ValueError as e:
                raise errors.InputError(f'{folder / shard.name} holds no document: {e}') from e


def _is_whole(folder: pathlib.Path, shard: Shard) -> bool:
    path = folder / files.plain_name(shard.name, folder / MANIFEST)
    return path.is_file() and files.remembered_sha256(path) == shard.sha256


def split(folder: pathlib.Path, shard: Shard, valid_fraction: float) -> Iterator[Document]:
    """The documents of one shard of a finished corpus, each with its split decided.

    A document's own split holds, else the hash of its text decides: the same on every machine, and
    whatever else is in the corpus. Where that holds out less than half or more than twice the
    share of the bytes, and the corpus is small, its documents are held out in the order of their
    hashes up to that share, of the last one its end alone.
    """
    cuts = _cuts(folder, tuple(shards(folder)), valid_fraction)
    for document in read(folder, shard):
        if document.split or cuts is None:
            yield Document(document.text, _decided(document, valid_fraction))
            continue
        content = document.text.encode()
        kept = cuts.get(_hash(document.text), len(content))
        head = content[:kept].decode(errors='ignore')
        for text, part in ((head, 'train'), (document.text[len(head) :], 'valid')):
            if text:
                yield Document(text, part)


@functools.lru_cache(maxsize=1)  # of all shards of a corpus
def _cuts(
    folder: pathlib.Path, found: tuple[Shard, ...], valid_fraction: float
) -> dict[int, int] | None:
    """Hash of a document -> its bytes that are not held out, of those of which some are.

    None where hashes decide: of a large corpus, of one whose documents say themselves what is held
    out, and where the hashes hold out enough and not too much.
    """
    if valid_fraction <= 0 or sum(s.documents for s in found) > _SMALL:
        return None
    sizes = {}
    for document in (document for shard in found for document in read(folder, shard)):
        if document.split == 'valid':
            return None
        if not document.split:
            sizes[_hash(document.text)] = len(document.text.encode())
    whole = sum(sizes.values())
    held = sum(size for number, size in sizes.items() if number < valid_fraction * 2**64)
    most = min(valid_fraction * 2, (1 + valid_fraction) / 2)  # some is left to train on
    if valid_fraction / 2 * whole <= held <= most * whole:
        return None
    left = whole - int(whole * (1 - valid_fraction))
    cuts = {}
    for number in sorted(sizes):
        if left <= 0:
            break
        cuts[number] = max(0, sizes[number] - left)
        left -= sizes[number]
    return cuts


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
    return 'valid' if _hash(document.text) < valid_fraction * 2**64 else 'train'


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), 'big')


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
    documents: Iterator[Document],
    shard_bytes: int,
    progress: Callable[[int], None],
) -> Shard | None:
    path = folder / f'documents-{index:05d}.jsonl'
    count = size = 0
    digest = hashlib.sha256()  # of what was to be written, whatever the disk holds
    path.unlink(missing_ok=True)
    with files.naming(path), files.open_(path, 'xb') as f:
        for document in documents:
            line = json.dumps(dataclasses.asdict(document), ensure_ascii=False).encode() + b'\n'
            f.write(line)
            digest.update(line)
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
    shard = Shard(path.name, count, size, digest.hexdigest())
    documents_lib.write(path.with_suffix('.json'), msgspec.to_builtins(shard))
    return shard
