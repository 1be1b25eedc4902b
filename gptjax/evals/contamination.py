# SPDX-License-Identifier: Apache-2.0
"""Which items of an evaluation stand in the training corpus (GPT-3, appendix C).

An item is dirty where one of its N-grams of words occurs in any document; N is the 5th percentile
of the items' lengths in words, at least 8 and at most 13. Words are lower case, without
punctuation.
"""

import functools
import pathlib
import re
from collections.abc import Sequence

import numpy as np

from gptjax.data import documents
from gptjax.evals import fewshot
from gptjax.runtime import progress

_LEAST, _MOST = 8, 13


def overlapping(items: tuple[str, ...], corpus: str) -> list[bool]:
    """Whether each item shares an N-gram with a prepared corpus.

    Args:
      items: their texts.
      corpus: the folder that prepare_corpus wrote.

    Raises:
      InputError: there is no finished corpus.
    """
    words = [_words(item) for item in items]
    n = int(np.clip(np.percentile([len(w) for w in words] or [0], 5), _LEAST, _MOST))
    wanted = {gram for item in words for gram in _grams(item, n)}
    found = _found(frozenset(wanted), n, corpus)
    return [any(gram in found for gram in _grams(item, n)) for item in words]


def text_of(item: fewshot.Item) -> str:
    """What of an item counts: context and right answer."""
    if not item.gold:
        return item.context
    if item.contexts:
        return f'{item.contexts[item.gold[0]]} {item.answers[0]}'
    return f'{item.context} {item.answers[item.gold[0]]}'


@functools.lru_cache(1)
def _found(wanted: frozenset[str], n: int, corpus: str) -> frozenset[str]:
    """The wanted N-grams that occur in the corpus."""
    folder = pathlib.Path(corpus)
    found: set[str] = set()
    shards = documents.shards(folder)
    with progress.Progress('look for overlaps', sum(s.documents for s in shards), ' docs') as bar:
        for shard in shards:
            for document in documents.read(folder, shard):
                found |= wanted.intersection(_grams(_words(document.text), n))
                bar.advance()
    return frozenset(found)


def _words(text: str) -> Sequence[str]:
    return re.sub(r'[^\w\s]', '', text.lower()).split()


def _grams(words: Sequence[str], n: int) -> list[str]:
    """N-grams; a shorter text has none, and counts as clean."""
    return [' '.join(words[i : i + n]) for i in range(len(words) - n + 1)]
