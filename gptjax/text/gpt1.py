# SPDX-License-Identifier: Apache-2.0
"""The words that GPT-1's vocabulary is applied to.

As transformers 4's OpenAIGPTTokenizer cuts them with ftfy and spaCy, which itself follows
text_utils.py of openai/finetune-transformer-lm.
"""

import functools
import importlib.util
import re
from typing import Any

UNKNOWN = '<unk>'
NEWLINE = '\n</w>'  # the vocabulary's own name for a line break

_REPLACED = str.maketrans({'—': '-', '–': '-', '―': '-', '…': '...', '´': "'"})
_RUNS = re.compile(r'(' + '|'.join(re.escape(c) + '+' for c in '-~!";?+,)(\\/*[]}{|_') + r')')


def has_spacy() -> bool:
    """Whether ftfy and spaCy are installed: pip install 'gptjax[gpt1]'."""
    return all(importlib.util.find_spec(name) for name in ('ftfy', 'spacy'))


def words(text: str) -> list[str]:
    """Lower-cased, repaired, standardised, cut by spaCy; UNKNOWN and NEWLINE stand for themselves.

    Not invertible: case, runs of white space and much of the punctuation's spacing are lost.
    """
    found = []
    for part in parts(text):
        if part == UNKNOWN:
            found.append(part)
        else:
            found += [_word(token.text) for token in _spacy()(_standardise(part))]
    return found


def parts(text: str) -> list[str]:
    """Lower-cased, and cut around UNKNOWN, which is an id even where a text spells it."""
    lower = ''.join(c.lower() for c in text)  # one by one: a final sigma stays a plain one
    return [part for part in re.split(f'({UNKNOWN})', lower) if part]


def _word(text: str) -> str:
    return NEWLINE if text == '\n ' else text.lower()


def _standardise(text: str) -> str:
    import ftfy

    text = ftfy.fix_text(text).translate(_REPLACED)
    text = _RUNS.sub(r' \1 ', text)
    text = re.sub(r'\s*\n\s*', ' \n ', text)
    return re.sub(r'[^\S\n]+', ' ', text).strip()


@functools.cache
def _spacy() -> Any:
    from spacy.lang import en

    return en.English().tokenizer
