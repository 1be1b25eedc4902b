# SPDX-License-Identifier: Apache-2.0
"""Which documents of a corpus are held out, and which are trained on."""

import functools
import pathlib
import random
from collections.abc import Iterable, Iterator

from gptjax.data import documents
from gptjax.text import cuts

_PART = 2**13  # characters that are drawn, or not
_SMALL = 1000  # documents; of more, hashes hold out about the right share


def split(
    folder: pathlib.Path, shard: documents.Shard, valid_fraction: float
) -> Iterator[documents.Text]:
    """The documents of one shard of a finished corpus, each with its split decided.

    A document's own split holds, else the hash of its text decides: the same on every machine, and
    whatever else is in the corpus. Where that holds out less than half or more than twice the
    share of the bytes, and the corpus is small, its documents are held out in the order of their
    hashes up to that share, of the last one its end alone.
    """
    cuts = _cuts(folder, tuple(documents.shards(folder)), valid_fraction)
    for document in documents.read(folder, shard):
        if document.split:
            yield document
        elif cuts is None:
            held = _number(document) < valid_fraction * 2**64
            yield document._replace(split='valid' if held else 'train')
        else:
            kept = _whole(document.parts, cuts.get(_number(document), document.size))
            for split_, begin, end in (('train', 0, kept), ('valid', kept, document.size)):
                if end > begin:
                    parts = _Between(document.parts, begin, end)
                    yield documents.Text(split_, end - begin, parts)


def training_texts(folder: pathlib.Path, valid_fraction: float, sample_bytes: int) -> Iterator[str]:
    """Texts to make a vocabulary from, in parts, without what is held out.

    Of a corpus above a size a sample of about so many bytes, from all of it alike: each part is
    drawn with the probability that what is still wanted has of what is still to come (Knuth 1997,
    volume 2, section 3.4.2, algorithm S). The same ones each time.
    """
    shards = documents.shards(folder)
    to_come, wanted = sum(shard.text_bytes for shard in shards), float(sample_bytes)
    drawn = random.Random(0) if to_come > sample_bytes else None
    for shard in shards:
        for document in split(folder, shard, valid_fraction):
            if document.split != 'train':
                to_come -= document.size
                continue
            if not drawn:
                yield from document.parts
                continue
            for part in cuts.pieces(document.parts, cuts.AFTER_LETTERS, _PART):
                size = len(part.encode())
                share = wanted / max(to_come * (1 - valid_fraction), 1.0)
                to_come -= size
                if drawn.random() < share:
                    wanted -= size
                    yield part


@functools.lru_cache(maxsize=1)  # of all shards of a corpus
def _cuts(
    folder: pathlib.Path, found: tuple[documents.Shard, ...], valid_fraction: float
) -> dict[int, int] | None:
    """Number of a document -> its bytes that are not held out, of those of which some are.

    None where hashes decide: of a large corpus, of one whose documents say themselves what is held
    out, and where the hashes hold out enough and not too much.
    """
    if valid_fraction <= 0 or sum(s.documents for s in found) > _SMALL:
        return None
    sizes = {}
    for document in (document for shard in found for document in documents.read(folder, shard)):
        if document.split == 'valid':
            return None
        if not document.split:
            sizes[_number(document)] = document.size
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


def _number(document: documents.Text) -> int:
    return int.from_bytes(document.digest(8), 'big')


def _whole(parts: Iterable[str], most: int) -> int:
    """So many bytes of a text, or fewer, that are whole characters."""
    begins = 0
    for part in parts:
        content = part.encode()
        if begins + len(content) >= most:
            return begins + len(content[: most - begins].decode(errors='ignore').encode())
        begins += len(content)
    return begins


class _Between:
    """The parts of a text from a byte up to another, where characters begin."""

    def __init__(self, parts: Iterable[str], begin: int, end: int) -> None:
        self._parts, self._begin, self._end = parts, begin, end

    def __iter__(self) -> Iterator[str]:
        at = 0
        for part in self._parts:
            content = part.encode()
            found = content[max(0, self._begin - at) : max(0, self._end - at)]
            if found:
                yield found.decode()
            at += len(content)
