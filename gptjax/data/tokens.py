# SPDX-License-Identifier: Apache-2.0
"""Token shards: flat little-endian files, with a manifest of hashes.

A document is written as end-of-text followed by its tokens, so every token of text has a context,
and windows run over document boundaries as in GPT-2 and GPT-3 (paper, section B). Held-out shards
carry a table of their documents' bytes and words, so that any whole number of documents can be
scored.
"""

import bisect
import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Sequence

import msgspec
import numpy as np
from jaxtyping import Integer

from gptjax.configs import errors
from gptjax.data import shards as shards_lib
from gptjax.data import token_manifest as manifest_lib
from gptjax.storage import buckets, scratch
from gptjax.storage import documents as documents_lib
from gptjax.text import tokenizer as tokenizer_lib

SPLITS = ('train', 'valid')


@dataclasses.dataclass(frozen=True)
class Config:
    """The tokens section of configs/base.py."""

    dir: str
    valid_fraction: float
    valid_bytes: int
    processes: int

    def __post_init__(self) -> None:
        errors.require_between(self, 0.0, 0.99, 'valid_fraction')
        errors.require_between(self, 0, 2**60, 'valid_bytes')
        errors.require_between(self, 0, 1024, 'processes')

    def held_out(self, text_bytes: int) -> float:
        """The share of a corpus of so many bytes that is held out."""
        if not self.valid_bytes or not text_bytes:
            return self.valid_fraction
        return min(self.valid_fraction, self.valid_bytes / text_bytes)


def is_finished(folder: pathlib.Path, source: dict) -> bool:
    """Whether `folder` holds whole token shards made from `source`; begins it where it does not.

    Raises:
      InputError: it holds shards of another corpus, tokenizer or split, or does not say of which.
    """
    scratch.need(folder).mkdir(parents=True, exist_ok=True)
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
    return not any(shards_lib.damages(folder, every))


def records(folder: pathlib.Path, index: int) -> dict[str, manifest_lib.Record] | None:
    """What write_shard() of encoding wrote, by split; None where it did not end, or is damaged."""
    try:
        found = documents_lib.read(record_path(folder, index), manifest_lib.Records, '')
    except documents_lib.Damaged:
        return None
    by_split = {split: getattr(found, split) for split in SPLITS if getattr(found, split)}
    every = list(by_split.values())
    if not every or any([*r.files()] != names(split, index) for split, r in by_split.items()):
        return None
    return None if any(shards_lib.damages(folder, every)) else by_split


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

    folder: buckets.Anywhere
    split: str
    end_of_text: int
    n_vocab: int
    fingerprint: str  # of the tokenizer
    digest: str  # of the manifest, and so of every shard
    _shards: list[shards_lib.Shard]
    _ends: list[int]  # tokens up to the end of each shard

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, start: int, length: int) -> Integer[np.ndarray, ' L']:
        """`length` tokens from `start` on, across shards; shorter only at the very end.

        Raises:
          InputError: an id is beyond the vocabulary, which a compiled model would not notice, or a
            shard was changed since it was opened.
        """
        return self.request(start, length)()

    def request(self, start: int, length: int) -> Callable[[], Integer[np.ndarray, ' L']]:
        """read(), begun: of shards in a bucket the bytes are on their way when this returns."""
        stop, parts = min(start + length, len(self)), []
        index = bisect.bisect_right(self._ends, start)
        while start < stop:
            shard, end = self._shards[index], min(stop, self._ends[index])
            first = self._ends[index] - shard.n_tokens
            parts.append(shard.request(start - first, end - first))
            start, index = end, index + 1

        def found() -> np.ndarray:
            read = [part() for part in parts]
            whole = read[0] if len(read) == 1 else np.concatenate([*read, _NOTHING])
            if len(whole) and whole.max() >= self.n_vocab:
                raise errors.InputError(
                    f'{self.folder}, {self.split}: the id {whole.max()} is beyond the '
                    f'{self.n_vocab} of {manifest_lib.NAME}; {manifest_lib.remedy(self.folder)}'
                )
            return whole

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


def open_set(
    folder: str | buckets.Anywhere,
    split: str,
    verify: str = 'changed',
    progress: Callable[[int], None] = lambda tokens: None,
) -> TokenSet:
    """Opens one split of a prepared folder, its hashes compared; one in a bucket is streamed.

    Args:
      verify: as data.verify; held-out splits are hashed whenever they are opened.
      progress: is told the tokens whose hashes were compared.

    Raises:
      InputError: the folder is not finished, or a shard is missing or is not what was written.
    """
    if not isinstance(folder, buckets.Path):
        folder = pathlib.Path(folder)
    manifest = manifest_lib.read(folder)
    found: list[manifest_lib.Record] = getattr(manifest.splits, split)
    shards = shards_lib.open_all(folder, found, np.dtype(manifest.dtype))
    if split == 'valid' or verify != 'never':
        remembers = split == 'train' and verify == 'changed'
        compared = shards_lib.damages(folder, found, remembers)
        for record, damage in zip(found, compared, strict=True):
            if damage:
                raise errors.InputError(f'{damage}; {manifest_lib.remedy(folder)}')
            progress(record.tokens)
    ends = [int(x) for x in np.cumsum([shard.n_tokens for shard in shards])]
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


def record_path(folder: pathlib.Path, index: int) -> pathlib.Path:
    """Where it stands what was written of a shard."""
    return folder / f'record-{index:05d}.json'


def names(split: str, index: int) -> list[str]:
    """The files of a shard: its tokens, and the table of documents that are held out."""
    name = f'{split}-{index:05d}'
    return [f'{name}.bin', *([f'{name}.documents.npy'] if split == 'valid' else [])]


_NOTHING = np.zeros(0, np.uint16)
