# SPDX-License-Identifier: Apache-2.0
"""Token shards: flat little-endian files, read through memory maps, with a manifest of hashes.

A document is written as end-of-text followed by its tokens, so every token of text has a context,
and windows run over document boundaries as in GPT-2 and GPT-3 (paper, section B). Held-out shards
carry a table of their documents' bytes and words, so that any whole number of documents can be
scored.
"""

import bisect
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Integer

from gptjax.configs import errors
from gptjax.data import documents
from gptjax.storage import files
from gptjax.text import tokenizer as tokenizer_lib

MANIFEST = 'manifest.json'
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
      InputError: it holds shards of another corpus, tokenizer or split.
    """
    folder.mkdir(parents=True, exist_ok=True)
    begun = folder / 'source.json'
    before = json.loads(begun.read_text()) if any(folder.glob('record-*.json')) else source
    differing = [name for name in source if source[name] != before.get(name)]
    if differing:
        raise errors.InputError(
            f'{folder} was begun from another {" and another ".join(differing)}; remove that '
            'folder or choose another --config.tokens.dir'
        )
    files.replace(begun, json.dumps(source) + '\n')
    return (folder / MANIFEST).exists()


def write_shard(
    folder: pathlib.Path,
    index: int,
    texts: Iterator[documents.Document],
    tokenizer: tokenizer_lib.Tokenizer,
) -> dict:
    """Tokenises documents, their splits decided, into a token shard a split; returns records."""
    lists = {split: [] for split in SPLITS}
    tables = {split: [] for split in SPLITS}
    for document in texts:
        ids = tokenizer.encode(document.text)
        lists[document.split].append(np.array([tokenizer.end_of_text, *ids], dtype=np.int64))
        size = len(document.text.encode())
        tables[document.split].append((1 + len(ids), size, len(document.text.split())))
    record = {}
    for split in SPLITS:
        if not lists[split]:
            continue
        path = folder / f'{split}-{index:05d}.bin'
        flat = np.concatenate(lists[split])
        files.replace(path, flat.astype(_dtype(tokenizer.n_vocab)).tobytes())
        table = np.array(tables[split], dtype=np.int64)
        _, text_bytes, words = (int(x) for x in table.sum(axis=0))
        record[split] = {
            'name': path.name,
            'tokens': len(flat),
            'documents': len(table),
            'text_bytes': text_bytes,
            'words': words,
            'sha256': files.sha256(path),
        }
        if split == 'valid':
            table_path = path.with_suffix('.documents.npy')
            with table_path.open('wb') as f:
                np.save(f, table)
            record[split] |= {'table': table_path.name, 'table_sha256': files.sha256(table_path)}
    return record


def write_manifest(
    folder: pathlib.Path, records: list[dict], tokenizer: tokenizer_lib.Tokenizer, source: dict
) -> dict:
    """Writes the manifest over the shards' records; the last act of preparing tokens.

    Raises:
      InputError: nothing fell into the training split.
    """
    splits = {split: [r[split] for r in records if split in r] for split in SPLITS}
    if not splits['train']:
        raise errors.InputError('no document is left to train on; lower tokens.valid_fraction')
    manifest = {
        'format': 1,
        'source': source,
        'tokenizer': tokenizer_lib.fingerprint(tokenizer),
        'n_vocab': tokenizer.n_vocab,
        'end_of_text': tokenizer.end_of_text,
        'dtype': _dtype(tokenizer.n_vocab).str,
        'splits': splits,
    }
    files.replace(folder / MANIFEST, json.dumps(manifest, indent=1) + '\n')
    return manifest


@dataclasses.dataclass(frozen=True)
class TokenSet:
    """One split of a folder of token shards, as one long random-access sequence."""

    folder: pathlib.Path
    split: str
    end_of_text: int
    n_vocab: int
    fingerprint: str  # of the tokenizer
    digest: str  # of the manifest, and so of every shard
    _shards: list[np.ndarray]
    _ends: list[int]  # tokens up to the end of each shard
    _records: list[dict]  # of the manifest

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, start: int, length: int) -> Integer[np.ndarray, ' L']:
        """`length` tokens from `start` on, across shards; shorter only at the very end.

        Raises:
          InputError: an id is beyond the vocabulary; a compiled model would not notice.
        """
        stop = min(start + length, len(self))
        parts = []
        shard = bisect.bisect_right(self._ends, start)
        while start < stop:
            first = self._ends[shard] - len(self._shards[shard])
            part = self._shards[shard][start - first : stop - first]
            parts.append(part)
            start += len(part)
            shard += 1
        found = parts[0] if len(parts) == 1 else np.concatenate([*parts, _NOTHING])
        if len(found) and found.max() >= self.n_vocab:
            raise errors.InputError(
                f'{self.folder}, {self.split}: the id {found.max()} is beyond the {self.n_vocab} '
                f'of {MANIFEST}; remove that folder and prepare it again'
            )
        return found

    def table(self) -> Integer[np.ndarray, 'documents 3']:
        """Per document: tokens with its end-of-text, UTF-8 bytes, words. Held-out splits only."""
        found = [np.load(self.folder / record['table']) for record in self._records]
        return np.concatenate([*found, np.zeros((0, 3), np.int64)])


def open_set(folder: str | pathlib.Path, split: str) -> TokenSet:
    """Opens one split of a prepared folder.

    Raises:
      InputError: the folder is not finished, or a shard is missing or has the wrong size.
    """
    folder = pathlib.Path(folder)
    manifest = _manifest(folder)
    records = manifest['splits'][split]
    dtype = np.dtype(manifest['dtype'])
    shards = []
    for record in records:
        path = folder / record['name']
        size = path.stat().st_size if path.exists() else 0
        if size != record['tokens'] * dtype.itemsize:
            raise errors.InputError(
                f'token shard {path} has {size} bytes where its manifest says '
                f'{record["tokens"] * dtype.itemsize}; remove {folder} and prepare it again'
            )
        shards.append(np.memmap(path, dtype, mode='r'))
    ends = [int(x) for x in np.cumsum([len(shard) for shard in shards])]
    return TokenSet(
        folder,
        split,
        manifest['end_of_text'],
        manifest['n_vocab'],
        manifest['tokenizer'],
        files.sha256(folder / MANIFEST),
        shards,
        ends,
        records,
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
        text = remote.cat_file(f'{root}/{MANIFEST}')
        local = workdir / stage_dir / hashlib.sha256(text).hexdigest()[:16]
        local.mkdir(parents=True, exist_ok=True)
        for record in (r for rs in json.loads(text)['splits'].values() for r in rs):
            _fetch(remote, root, local, record['name'], record['sha256'])
            if 'table' in record:
                _fetch(remote, root, local, record['table'], record['table_sha256'])
            progress(record['tokens'])
    except errors.InputError:
        raise
    except (OSError, ImportError, ValueError) as e:
        hint = "; gs:// needs: pip install 'gptjax[tpu]'" if isinstance(e, ImportError) else ''
        raise errors.InputError(f'cannot read token shards at {name}: {e}{hint}') from e
    files.replace(local / MANIFEST, text)
    return local


def _fetch(remote: Any, root: str, local: pathlib.Path, name: str, sha256: str) -> None:
    target = local / name
    if target.exists():
        return
    partial = target.with_name(name + '.partial')
    remote.get_file(f'{root}/{name}', str(partial))
    if files.sha256(partial) != sha256:
        raise errors.InputError(
            f'{root}/{name} does not have the hash of its manifest; it is damaged: upload it again'
        )
    partial.replace(target)


def _manifest(folder: pathlib.Path) -> dict:
    path = folder / MANIFEST
    if not path.exists():
        raise errors.InputError(
            f'no finished token shards in {folder}; run python -m gptjax.prepare_tokens first'
        )
    return json.loads(path.read_text())


def _dtype(n_vocab: int) -> np.dtype:
    return np.dtype('<u2') if n_vocab <= 2**16 else np.dtype('<u4')


_NOTHING = np.zeros(0, np.uint16)
