# SPDX-License-Identifier: Apache-2.0
"""Documents become token shards, a part at a time: memory does not grow with them."""

import contextlib
import hashlib
import io
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import msgspec
import numpy as np

from gptjax.data import documents, tokens
from gptjax.data import token_manifest as manifest_lib
from gptjax.storage import buckets, files
from gptjax.storage import documents as documents_lib
from gptjax.text import cuts
from gptjax.text import tokenizer as tokenizer_lib

_PIECE = 2**15  # characters that are encoded as one
_BATCH = 2**19  # characters that are encoded at once; the libraries take 165 bytes for each


def write_shard(
    folder: pathlib.Path,
    index: int,
    texts: Iterable[documents.Text],
    tokenizer: tokenizer_lib.Tokenizer,
    advance: Callable[[int], None] = lambda text_bytes: None,
) -> None:
    """Tokenises documents, their splits decided, into a token shard a split.

    What was written is recorded beside it, at the end: tokens.records() knows it.

    Args:
      advance: is told the bytes of text that are done.
    """
    with contextlib.ExitStack() as open_:
        written: dict[str, _Written] = {}
        for piece, ids in _encoded(texts, tokenizer):
            if piece.split not in written:
                name = tokens.names(piece.split, index)[0]
                file = _Written(folder / name, manifest_lib.dtype(tokenizer.n_vocab), open_)
                written[piece.split] = file
            advance(written[piece.split].add(piece, ids, tokenizer.end_of_text))
    record = {
        split: written[split].record(folder, tokens.names(split, index))
        for split in tokens.SPLITS
        if split in written
    }
    documents_lib.write(
        tokens.record_path(folder, index), msgspec.to_builtins(manifest_lib.Records(**record))
    )


class _Piece(NamedTuple):
    """A part of a document's text that is encoded by itself."""

    split: str
    text: str
    is_first: bool
    words: int  # that begin in it


def _pieces(texts: Iterable[documents.Text], allowed: str) -> Iterator[_Piece]:
    for document in texts:
        before = ''
        for text in cuts.pieces(document.parts, allowed, _PIECE):
            goes_on = before[-1:].strip() and text[0].strip()  # a word is in both
            yield _Piece(document.split, text, not before, len(text.split()) - bool(goes_on))
            before = text


def _encoded(
    texts: Iterable[documents.Text], tokenizer: tokenizer_lib.Tokenizer
) -> Iterator[tuple[_Piece, list[int]]]:
    held: list[_Piece] = []
    size = 0
    for piece in _pieces(texts, tokenizer.cut_before):
        held.append(piece)
        size += len(piece.text)
        if size >= _BATCH:
            yield from zip(held, tokenizer.encode_all([p.text for p in held]), strict=True)
            held, size = [], 0
    yield from zip(held, tokenizer.encode_all([p.text for p in held]), strict=True)


class _Written:
    """A shard that is being written, and what is to be recorded of it."""

    def __init__(self, path: pathlib.Path, dtype: np.dtype, until: contextlib.ExitStack) -> None:
        """Args: until: when it closes, the file is there."""
        self._file, self._dtype = until.enter_context(files.replacing(path)), dtype
        self._sha256, self._crc32c = hashlib.sha256(), buckets.Crc32c()
        self._table: list[list[int]] = []  # tokens, bytes and words of each document

    def add(self, piece: _Piece, ids: list[int], end_of_text: int) -> int:
        """Adds a piece behind the others, end-of-text before a document. Returns its bytes."""
        if piece.is_first:
            self._table.append([0, 0, 0])
            ids = [end_of_text, *ids]
        content = np.array(ids, dtype=self._dtype).tobytes()
        self._file.write(content)
        self._sha256.update(content)
        self._crc32c.update(content)
        row, text_bytes = self._table[-1], len(piece.text.encode())
        for i, more in enumerate((len(ids), text_bytes, piece.words)):
            row[i] += more
        return text_bytes

    def record(self, folder: pathlib.Path, names: list[str]) -> manifest_lib.Record:
        """Of the shard, whose table of documents is written if it has one."""
        table, more = np.array(self._table, dtype=np.int64), {}
        n_tokens, text_bytes, words = (int(x) for x in table.sum(axis=0))
        for name in names[1:]:
            content = _npy(table)
            files.replace(folder / name, content)
            digest = hashlib.sha256(content).hexdigest()
            more = {'table': name, 'table_sha256': digest}
            more |= {'table_crc32c': buckets.crc32c(content)}
        return manifest_lib.Record(
            name=names[0],
            tokens=n_tokens,
            documents=len(table),
            text_bytes=text_bytes,
            words=words,
            sha256=self._sha256.hexdigest(),
            crc32c=self._crc32c.checksum(),
            **more,
        )


def _npy(table: np.ndarray) -> bytes:
    written = io.BytesIO()
    np.save(written, table)
    return written.getvalue()
