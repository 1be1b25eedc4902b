# SPDX-License-Identifier: Apache-2.0
"""Which items of an evaluation stand in the training corpus (GPT-3, appendix C).

An item is dirty where one of its N-grams of words occurs in any document; N is the 5th percentile
of the items' lengths in words, at least 8 and at most 13. Words are lower case, without
punctuation.
"""

import functools
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from gptjax.data import documents
from gptjax.evals import fewshot
from gptjax.runtime import progress, workers

_LEAST, _MOST = 8, 13


class Overlaps:
    """What of the items of several tasks stands in a corpus, which is passed over once for all."""

    def __init__(self, tasks: Iterable[Sequence[str]], corpus: str) -> None:
        """Looks through a corpus, on all cores.

        Args:
          tasks: texts of each one's items.
          corpus: the folder that prepare_corpus wrote.

        Raises:
          InputError: there is no finished corpus.
        """
        wanted = {gram for items in tasks for grams in _of_items(items) for gram in grams}
        self._found = _found(frozenset(wanted), pathlib.Path(corpus))

    def dirty(self, items: Sequence[str]) -> list[bool]:
        """Whether each item, of a task that was looked up, shares an N-gram with the corpus."""
        return [any(gram in self._found for gram in grams) for grams in _of_items(items)]


def text_of(item: fewshot.Item) -> str:
    """What of an item counts: context and right answer."""
    if not item.gold:
        return item.context
    if item.contexts:
        return f'{item.contexts[item.gold[0]]} {item.answers[0]}'
    return f'{item.context} {item.answers[item.gold[0]]}'


def _of_items(items: Sequence[str]) -> list[list[str]]:
    """The N-grams of each item of a task."""
    words = [_words(item) for item in items]
    n = int(np.clip(np.percentile([len(w) for w in words] or [0], 5), _LEAST, _MOST))
    return [_grams(each, n) for each in words]


def _found(wanted: frozenset[str], folder: pathlib.Path) -> frozenset[str]:
    """The wanted N-grams that occur in the corpus."""
    shards, found = documents.shards(folder), set()
    look = functools.partial(_in_shard, folder, wanted)
    with progress.Progress('look for overlaps', sum(s.documents for s in shards), ' docs') as bar:
        for more in workers.each(look, shards, os.cpu_count() or 1, bar.advance):
            found |= more
    return frozenset(found)


def _in_shard(
    folder: pathlib.Path,
    wanted: frozenset[str],
    shard: documents.Shard,
    advance: Callable[[int], None],
) -> set[str]:
    begins = frozenset(' '.join(gram.split(' ')[:_LEAST]) for gram in wanted)
    found: set[str] = set()
    for document in documents.read(folder, shard):
        before: list[str] = []  # words, which may begin what goes on in the next part
        for text in _at_words(document.parts):
            words = [*before, *_words(text)]
            grams = _grams(words, _LEAST)
            if not begins.isdisjoint(grams):
                for i in (i for i, gram in enumerate(grams) if gram in begins):
                    longer = (' '.join(words[i : i + n]) for n in range(_LEAST, _MOST + 1))
                    found |= wanted.intersection(longer)
            before = words[-_MOST + 1 :]
        advance(1)
    return found


def _at_words(parts: Iterable[str]) -> Iterator[str]:
    """A text in parts that end where words do."""
    held = ''
    for part in parts:
        whole = held + part
        place = max(whole.rfind(space) for space in ' \n')
        if place > 0:
            yield whole[:place]
        held = whole[max(place, 0) :]
    yield held


def _words(text: str) -> Sequence[str]:
    return re.sub(r'[^\w\s]', '', text.lower()).split()


def _grams(words: Sequence[str], n: int) -> list[str]:
    """N-grams; a shorter text has none, and counts as clean."""
    return [' '.join(words[i : i + n]) for i in range(len(words) - n + 1)]
