# SPDX-License-Identifier: Apache-2.0
"""Likelihood of whole texts in their sets' own units: GPT-2, section 3.1; GPT-3, section 3.1.1."""

from collections.abc import Callable
from typing import Any

from gptjax.evals import fewshot
from gptjax.text import detokenize


def _words(
    plain: Callable[[str], str] | None, inverse: Callable[[str], str] | None, split: str
) -> Callable[[fewshot.Record, int], list[fewshot.Item]]:
    """Texts whose units are words: those separated by white space, and one end a line.

    split: 'articles', 'lines' or 'whole': what is scored by itself.
    """

    def form(record: fewshot.Record, k: int) -> list[fewshot.Item]:
        del k
        raw = record['text'].rstrip('\n').split('\n')
        parts = {
            'articles': lambda: detokenize.articles(raw),
            'lines': lambda: raw,
            'whole': lambda: ['\n'.join(raw)],
        }[split]()
        items = []
        for part in parts:
            units = len(part.split()) + part.count('\n') + 1
            text, kept = part, 0
            if plain is not None:
                made, kept = detokenize.lines(part, plain, inverse)
                text = '\n'.join(made)
            if text.strip():
                items.append(fewshot.Item(text, gold=(), words=units, tokenised_lines=kept))
        return items

    return form


def _characters(stop: int) -> Callable[[fewshot.Record, int], list[fewshot.Item]]:
    """The last `stop` bytes of a corpus in one piece: its test part."""

    def form(record: fewshot.Record, k: int) -> list[fewshot.Item]:
        del k
        content = record['text'].encode('utf-8')
        content = content[-stop:] if len(content) > 10 * stop else content
        return [fewshot.Item(content.decode('utf-8', 'ignore'), gold=())]

    return form


def _task(
    set_name: str, form: Callable, source: str, metrics: tuple[str, ...], **more: Any
) -> fewshot.Task:
    return fewshot.Task(set_name, form, source, 'rolling', metrics=metrics, **more)


_BY_WORD = ('word_perplexity', 'bits_per_byte', 'token_perplexity')
_UNITS = 'units: words, and an end a line; lines whose de-tokenisation does not invert stay as is'
_RAW = 'units: words, and an end a line; the text as it stands'
_wiki = _words(detokenize.wikitext, detokenize.wikitext_tokenized, 'articles')
TASKS = {
    'wikitext2': _task(
        'wikitext2', _wiki, 'GPT-2, 3.1', _BY_WORD, split='test', notes=f'articles; {_UNITS}'
    ),
    'wikitext2_valid': _task('wikitext2', _wiki, 'GPT-2, 3.1', _BY_WORD, notes=_UNITS),
    'wikitext2_valid_raw': _task(
        'wikitext2', _words(None, None, 'articles'), "as today's tools", _BY_WORD, notes=_RAW
    ),
    'wikitext103': _task(
        'wikitext103', _wiki, 'GPT-2, 3.1', _BY_WORD, split='test', notes=f'articles; {_UNITS}'
    ),
    'ptb': _task(
        'ptb',
        _words(detokenize.ptb, detokenize.ptb_tokenized, 'whole'),
        'GPT-2, 3.1; GPT-3, 3.1.1',
        _BY_WORD,
        split='test',
        notes=_UNITS,
    ),
    'ptb_valid': _task(
        'ptb',
        _words(detokenize.ptb, detokenize.ptb_tokenized, 'whole'),
        'GPT-2, 3.1; GPT-3, 3.1.1',
        _BY_WORD,
        notes=_UNITS,
    ),
    'lm1b': _task(
        'lm1b',
        _words(detokenize.lm1b, detokenize.lm1b_tokenized, 'lines'),
        'GPT-2, 3.1',
        _BY_WORD,
        split='test',
        notes=f'sentences by themselves; {_UNITS}',
    ),
    'enwik8': _task(
        'enwik8',
        _characters(5_000_000),
        'GPT-2, 3.1',
        ('bits_per_byte', 'token_perplexity'),
        split='test',
        notes='the last 5,000,000 bytes',
    ),
    'text8': _task(
        'text8',
        _characters(5_000_000),
        'GPT-2, 3.1',
        ('bits_per_character', 'token_perplexity'),
        split='test',
        notes='the last 5,000,000 characters',
    ),
}
