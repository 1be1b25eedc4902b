# SPDX-License-Identifier: Apache-2.0
"""What is said of token shards: what is in each, its hashes, and the manifest over all."""

import hashlib
import json
from typing import Annotated, Any, Literal

import msgspec
import numpy as np

from gptjax.storage import buckets, documents, files

NAME = 'manifest.json'
_Count = Annotated[int, msgspec.Meta(ge=0)]


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A token shard of one split, as the manifest has it: what is in it, and its hashes."""

    name: str
    tokens: _Count
    documents: _Count
    text_bytes: _Count
    words: _Count
    sha256: str
    table: str = ''  # of held-out shards, as table()
    table_sha256: str = ''
    crc32c: str = ''  # what storage says of such objects; '' of shards written before it was asked
    table_crc32c: str = ''

    def checksums(self) -> dict[str, str]:
        """Name -> crc32c, '' = unknown."""
        return {self.name: self.crc32c, **({self.table: self.table_crc32c} if self.table else {})}

    def files(self) -> dict[str, str]:
        """Name -> hash."""
        return {self.name: self.sha256, **({self.table: self.table_sha256} if self.table else {})}


class Splits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The shards of each split."""

    train: list[Record]
    valid: list[Record]


class Records(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What one shard of documents became."""

    train: Record | None = None
    valid: Record | None = None


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Over all shards; written last."""

    format: Literal[1]
    source: dict[str, Any]
    tokenizer: str
    n_vocab: Annotated[int, msgspec.Meta(ge=1, le=2**31)]
    end_of_text: _Count
    dtype: Literal['<u2', '<u4']
    splits: Splits

    def __post_init__(self) -> None:
        if self.end_of_text >= self.n_vocab or self.dtype != dtype(self.n_vocab).str:
            raise ValueError(f'end of text or dtype do not fit the {self.n_vocab} ids')

    def check_names(self, folder: str | buckets.Anywhere) -> None:
        """Raises InputError where a file is named that is not in the folder."""
        for record in (*self.splits.train, *self.splits.valid):
            for name in record.files():
                files.plain_name(name, f'{folder}/{NAME}')

    @property
    def digest(self) -> str:
        """Of all it says, and so of every shard."""
        said = msgspec.to_builtins(self)
        for record in (*said['splits']['train'], *said['splits']['valid']):
            for name in ('crc32c', 'table_crc32c'):  # other hashes of the same bytes
                record.pop(name, None)
        whole = json.dumps(said, indent=1) + '\n'
        return hashlib.sha256(whole.encode()).hexdigest()


def read(folder: buckets.Anywhere) -> Manifest:
    """The manifest of a finished folder.

    Raises:
      Damaged: there is none, or it is not what was written.
      InputError: it names files elsewhere.
    """
    path = folder / NAME
    if not path.exists():
        raise documents.Damaged(
            f'no finished token shards in {folder}; run python -m gptjax.prepare_tokens first'
        )
    found = documents.read(path, Manifest, remedy(folder))
    found.check_names(folder)
    return found


def remedy(folder: buckets.Anywhere) -> str:
    """What mends token shards, prepared here or copied here."""
    return (
        f'python -m gptjax.prepare_tokens makes {folder} whole again; of a copy, remove it and '
        'copy it anew'
    )


def dtype(n_vocab: int) -> np.dtype:
    """Of the files, by the number of ids."""
    return np.dtype('<u2') if n_vocab <= 2**16 else np.dtype('<u4')
