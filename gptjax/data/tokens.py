# SPDX-License-Identifier: Apache-2.0
"""Token shards: flat little-endian files, read through memory maps, with a manifest of hashes.

A document is written as end-of-text followed by its tokens, so every token of text has a context,
and windows run over document boundaries as in GPT-2 and GPT-3 (paper, section B). Held-out shards
carry a table of their documents' bytes and words, so that any whole number of documents can be
scored.
"""

import bisect
import contextlib
import dataclasses
import hashlib
import io
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
from jaxtyping import Integer

from gptjax.configs import errors
from gptjax.data import documents
from gptjax.data import token_manifest as manifest_lib
from gptjax.storage import documents as documents_lib
from gptjax.storage import files
from gptjax.text import tokenizer as tokenizer_lib

SPLITS = ('train', 'valid')


@dataclasses.dataclass(frozen=True)
class Config:
    """The tokens section of configs/base.py."""

    dir: str
    valid_fraction: float
    processes: int

    def __post_init__(self) -> None:
        errors.require_between(self, 0.0, 0.99, 'valid_fraction')
        errors.require_between(self, 1, 1024, 'processes')


def is_finished(folder: pathlib.Path, source: dict) -> bool:
    """Whether `folder` holds whole token shards made from `source`; begins it where it does not.

    Raises:
      InputError: it holds shards of another corpus, tokenizer or split, or does not say of which.
    """
    folder.mkdir(parents=True, exist_ok=True)
    begun, manifest = folder / 'source.json', None
    with contextlib.suppress(documents_lib.Damaged):
        manifest = manifest_lib.read(folder)
    before = manifest.source if manifest else source
    if not manifest and any(folder.glob('record-*.json')):
        before = documents_lib.read(begun, dict, f'remove {folder} and run the same command again')
    differing = [name for name in source if source[name] != before.get(name)]
    if differing:
        raise errors.InputError(
            f'{folder} was begun from another {" and another ".join(differing)}; remove that '
            'folder or choose another --config.tokens.dir'
        )
    documents_lib.write(begun, source)
    if manifest is None:
        return False
    every = [record for split in SPLITS for record in getattr(manifest.splits, split)]
    return not any(manifest_lib.damages(folder, every, files.remembered_sha256))


def write_shard(
    folder: pathlib.Path,
    index: int,
    texts: Iterator[documents.Document],
    tokenizer: tokenizer_lib.Tokenizer,
) -> None:
    """Tokenises documents, their splits decided, into a token shard a split.

    What was written is recorded beside it, at the end: records() knows it.
    """
    lists = {split: [] for split in SPLITS}
    tables = {split: [] for split in SPLITS}
    for document in texts:
        ids = tokenizer.encode(document.text)
        lists[document.split].append(np.array([tokenizer.end_of_text, *ids], dtype=np.int64))
        size = len(document.text.encode())
        tables[document.split].append((1 + len(ids), size, len(document.text.split())))
    record: dict[str, manifest_lib.Record] = {}
    for split in SPLITS:
        if not lists[split]:
            continue
        path, *beside = (folder / name for name in _names(split, index))
        flat = np.concatenate(lists[split])
        table = np.array(tables[split], dtype=np.int64)
        _, text_bytes, words = (int(x) for x in table.sum(axis=0))
        more = {}
        if beside:
            more = {'table': beside[0].name, 'table_sha256': _write(beside[0], _npy(table))}
        record[split] = manifest_lib.Record(
            name=path.name,
            tokens=len(flat),
            documents=len(table),
            text_bytes=text_bytes,
            words=words,
            sha256=_write(path, flat.astype(manifest_lib.dtype(tokenizer.n_vocab)).tobytes()),
            **more,
        )
    documents_lib.write(
        _record_path(folder, index), msgspec.to_builtins(manifest_lib.Records(**record))
    )


def records(folder: pathlib.Path, index: int) -> dict[str, manifest_lib.Record] | None:
    """What write_shard() wrote, by split; None where it did not end, or files are damaged."""
    try:
        found = documents_lib.read(_record_path(folder, index), manifest_lib.Records, '')
    except documents_lib.Damaged:
        return None
    by_split = {split: getattr(found, split) for split in SPLITS if getattr(found, split)}
    every = list(by_split.values())
    if not every or any([*r.files()] != _names(split, index) for split, r in by_split.items()):
        return None
    return None if any(manifest_lib.damages(folder, every, files.remembered_sha256)) else by_split


def write_manifest(
    folder: pathlib.Path,
    found: Sequence[dict[str, manifest_lib.Record]],
    tokenizer: tokenizer_lib.Tokenizer,
    source: dict,
) -> dict[str, list[manifest_lib.Record]]:
    """Writes the manifest over the shards' records; the last act of preparing tokens.

    Returns:
      the records by split.

    Raises:
      InputError: nothing fell into the training split.
    """
    splits = {split: [r[split] for r in found if split in r] for split in SPLITS}
    if not splits['train']:
        raise errors.InputError('no document is left to train on; lower tokens.valid_fraction')
    manifest = manifest_lib.Manifest(
        format=1,
        source=source,
        tokenizer=tokenizer_lib.fingerprint(tokenizer),
        n_vocab=tokenizer.n_vocab,
        end_of_text=tokenizer.end_of_text,
        dtype=manifest_lib.dtype(tokenizer.n_vocab).str,
        splits=manifest_lib.Splits(**splits),
    )
    documents_lib.write(folder / manifest_lib.NAME, msgspec.to_builtins(manifest))
    return splits


@dataclasses.dataclass(frozen=True)
class TokenSet:
    """One split of a folder of token shards, as one long random-access sequence."""

    folder: pathlib.Path
    split: str
    end_of_text: int
    n_vocab: int
    fingerprint: str  # of the tokenizer
    digest: str  # of the manifest, and so of every shard
    _shards: list['Shard']
    _ends: list[int]  # tokens up to the end of each shard

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, start: int, length: int) -> Integer[np.ndarray, ' L']:
        """`length` tokens from `start` on, across shards; shorter only at the very end.

        Raises:
          InputError: an id is beyond the vocabulary, which a compiled model would not notice, or a
            shard was changed since it was opened.
        """
        stop = min(start + length, len(self))
        parts = []
        shard = bisect.bisect_right(self._ends, start)
        while start < stop:
            first = self._ends[shard] - len(self._shards[shard].tokens)
            part = self._shards[shard].read(start - first, stop - first)
            parts.append(part)
            start += len(part)
            shard += 1
        found = parts[0] if len(parts) == 1 else np.concatenate([*parts, _NOTHING])
        if len(found) and found.max() >= self.n_vocab:
            raise errors.InputError(
                f'{self.folder}, {self.split}: the id {found.max()} is beyond the {self.n_vocab} '
                f'of {manifest_lib.NAME}; {manifest_lib.remedy(self.folder)}'
            )
        return found

    def check_ids(self, tokenizer: tokenizer_lib.Tokenizer) -> None:
        """Raises InputError where ids are said to be others than the tokenizer's."""
        said, known = (self.n_vocab, self.end_of_text), (tokenizer.n_vocab, tokenizer.end_of_text)
        if said != known:
            raise errors.InputError(
                f'{self.folder / manifest_lib.NAME} says that there are {said[0]} ids, end of '
                f'text {said[1]}, the tokenizer {known[0]} and {known[1]}; '
                + manifest_lib.remedy(self.folder)
            )

    def table(self) -> Integer[np.ndarray, 'documents 3']:
        """Per document: tokens with its end-of-text, UTF-8 bytes, words. Held-out splits only."""
        return np.concatenate([*(s.table() for s in self._shards), np.zeros((0, 3), np.int64)])


class Shard:
    """A shard in a memory map, and the file's size and time when it was opened."""

    def __init__(self, folder: pathlib.Path, record: manifest_lib.Record, dtype: np.dtype) -> None:
        self._folder, self._record = folder, record
        self.path = folder / record.name
        try:
            self._seen = self._opened = self._state()
            self.tokens = np.memmap(self.path, dtype, mode='r')
        except (OSError, ValueError) as e:
            raise errors.InputError(
                f'token shard {self.path} cannot be read ({e}); {manifest_lib.remedy(folder)}'
            ) from e

    def read(self, start: int, stop: int) -> np.ndarray:
        """A copy of tokens; looks before and after, as a file that was cut ends the process."""
        self._check()
        found = np.array(self.tokens[start:stop])
        self._check()
        return found

    def table(self) -> np.ndarray:
        """Of the documents. Raises InputError where it is not what the record says."""
        path, record = self._folder / self._record.table, self._record
        try:
            with path.open('rb') as f:
                found = np.lib.format.read_array(f, allow_pickle=False)
            if found.dtype != np.int64:
                raise ValueError(f'its numbers are {found.dtype}')
        except (OSError, ValueError, EOFError) as e:
            raise errors.InputError(
                f'{path} is damaged ({e}); {manifest_lib.remedy(self._folder)}'
            ) from e
        sums = [record.tokens, record.text_bytes, record.words]
        if found.shape != (record.documents, 3) or found.sum(axis=0).tolist() != sums:
            raise errors.InputError(
                f'{path} is not the table of {record.name}; {manifest_lib.remedy(self._folder)}'
            )
        return found

    def _check(self) -> None:
        with contextlib.suppress(FileNotFoundError):  # what is mapped stays
            self._seen = self._state()
        if self._seen != self._opened:
            raise errors.InputError(
                f'{self.path} was changed while it was read; {manifest_lib.remedy(self._folder)}'
            )

    def _state(self) -> tuple[int, int]:
        found = self.path.stat()
        return found.st_size, found.st_mtime_ns


def open_set(
    folder: str | pathlib.Path,
    split: str,
    verify: str = 'changed',
    progress: Callable[[int], None] = lambda tokens: None,
) -> TokenSet:
    """Opens one split of a prepared folder, its hashes compared.

    Args:
      verify: as data.verify; held-out splits are hashed whenever they are opened.
      progress: is told the tokens whose hashes were compared.

    Raises:
      InputError: the folder is not finished, or a shard is missing or is not what was written.
    """
    folder = pathlib.Path(folder)
    manifest = manifest_lib.read(folder)
    found: list[manifest_lib.Record] = getattr(manifest.splits, split)
    dtype = np.dtype(manifest.dtype)
    for record in found:
        path = folder / record.name
        size = path.stat().st_size if path.exists() else 0
        if size != record.tokens * dtype.itemsize:
            raise errors.InputError(
                f'token shard {path} has {size} bytes where its manifest says '
                f'{record.tokens * dtype.itemsize}; {manifest_lib.remedy(folder)}'
            )
    shards = [Shard(folder, record, dtype) for record in found]
    if split == 'valid' or verify != 'never':
        remembers = split == 'train' and verify == 'changed'
        digest_of = files.remembered_sha256 if remembers else files.sha256
        compared = manifest_lib.damages(folder, found, digest_of)
        for record, damage in zip(found, compared, strict=True):
            if damage:
                raise errors.InputError(f'{damage}; {manifest_lib.remedy(folder)}')
            progress(record.tokens)
    ends = [int(x) for x in np.cumsum([len(shard.tokens) for shard in shards])]
    return TokenSet(
        folder,
        split,
        manifest.end_of_text,
        manifest.n_vocab,
        manifest.tokenizer,
        manifest.digest,
        shards,
        ends,
    )


def locate(
    name: str, workdir: pathlib.Path, stage_dir: str, progress: Callable[[int], None]
) -> pathlib.Path:
    """The local folder of token shards of that name, below the workdir unless absolute.

    A remote one (gs://, s3://, ...) is copied into the workdir's `stage_dir` first, every hash
    verified; what was copied before is not copied again.

    Args:
      progress: is told the tokens staged.

    Raises:
      InputError: the remote folder or its protocol's package is missing, or a hash differs.
    """
    if '://' not in name:
        return workdir / name
    import fsspec

    try:
        remote, root = fsspec.core.url_to_fs(name)
        text = remote.cat_file(f'{root}/{manifest_lib.NAME}')
        local = workdir / stage_dir / hashlib.sha256(text).hexdigest()[:16]
        local.mkdir(parents=True, exist_ok=True)
        manifest = documents_lib.parse(text, manifest_lib.Manifest)
        manifest.check_names(name)
        for record in (*manifest.splits.train, *manifest.splits.valid):
            for file, digest in record.files().items():
                _fetch(remote, root, local, file, digest)
            progress(record.tokens)
    except errors.InputError:
        raise
    except Exception as e:  # of whatever library speaks the protocol
        hint = "; gs:// needs: pip install 'gptjax[tpu]'" if isinstance(e, ImportError) else ''
        raise errors.InputError(f'cannot read token shards at {name}: {e}{hint}') from e
    files.replace(local / manifest_lib.NAME, text)
    return local


def _fetch(remote: Any, root: str, local: pathlib.Path, name: str, sha256: str) -> None:
    target = local / name
    if target.is_file() and files.remembered_sha256(target) == sha256:
        return
    partial = target.with_name(name + '.partial')
    partial.unlink(missing_ok=True)
    with files.naming(partial):
        remote.get_file(f'{root}/{name}', str(partial))
    if files.sha256(partial) != sha256:
        raise errors.InputError(
            f'{root}/{name} does not have the hash of its manifest; it is damaged: upload it again'
        )
    partial.replace(target)
    files.remember_sha256(target, sha256)


def _record_path(folder: pathlib.Path, index: int) -> pathlib.Path:
    return folder / f'record-{index:05d}.json'


def _names(split: str, index: int) -> list[str]:
    """The files of a shard: its tokens, and the table of documents that are held out."""
    name = f'{split}-{index:05d}'
    return [f'{name}.bin', *([f'{name}.documents.npy'] if split == 'valid' else [])]


def _write(path: pathlib.Path, content: bytes) -> str:
    """Writes a file. Returns the hash of what was to be written, whatever the disk holds."""
    files.replace(path, content)
    return hashlib.sha256(content).hexdigest()


def _npy(table: np.ndarray) -> bytes:
    written = io.BytesIO()
    np.save(written, table)
    return written.getvalue()


_NOTHING = np.zeros(0, np.uint16)
