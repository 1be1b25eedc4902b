# SPDX-License-Identifier: Apache-2.0
"""GPT-3's own tasks, made from a seed: arithmetic (3.9.1), scrambled (3.9.2), novel words (3.9.5).

Where the data folder has OpenAI's published files (openai/gpt-3, data/, as gpt3_synthetic/*.jsonl)
these are scored instead.
"""

import functools
from collections.abc import Callable

from gptjax.data.labelled import synthetic
from gptjax.evals import fewshot


def _calculated(record: fewshot.Record, k: int) -> list[fewshot.Item]:
    del k
    return [fewshot.Item(f'Q: {record["query"]}\n\nA:', (record['answer'],))]


def _unscrambled(record: fewshot.Record, k: int) -> list[fewshot.Item]:
    del k
    return [fewshot.Item(f'{record["query"]} =', (record['answer'],))]


def _corrected(record: fewshot.Record, k: int) -> list[fewshot.Item]:
    del k
    return [fewshot.Item(f'{record["query"]} =>', (record['answer'],))]


def _used(record: fewshot.Record, k: int) -> list[fewshot.Item]:
    del k
    word = record['query'].split('"')[1]
    return [fewshot.Item(record['query'], (record['answer'],), word=word)]


def _arithmetic(name: str, figure: str) -> fewshot.Task:
    return fewshot.Task(
        name,
        _calculated,
        f'GPT-3, 3.9.1, figure {figure}',
        'generate',
        split='test',
        k=50,
        metrics=('exact',),
        max_new_tokens=12,
        decode={'num_beams': 1},
        make=functools.partial(synthetic.records, name),
    )


def _scrambled(name: str, figure: str, make: Callable | None = None) -> fewshot.Task:
    return fewshot.Task(
        name,
        _unscrambled,
        f'GPT-3, 3.9.2, figure {figure}',
        'generate',
        split='test',
        k=100,
        metrics=('exact',),
        delimiter='\n',
        max_new_tokens=16,
        decode={'num_beams': 1},
        instruction='Please unscramble the letters into a word, and write that word:\n',
        make=make or functools.partial(synthetic.records, name),
    )


_FIGURES = {
    'arithmetic_1dc': 'G.42',
    'arithmetic_2d_minus': 'G.43',
    'arithmetic_2d_plus': 'G.44',
    'arithmetic_2d_times': 'G.45',
    'arithmetic_3d_minus': 'G.46',
    'arithmetic_3d_plus': 'G.47',
    'arithmetic_4d_minus': 'G.48',
    'arithmetic_4d_plus': 'G.49',
    'arithmetic_5d_minus': 'G.50',
    'arithmetic_5d_plus': 'G.51',
}
TASKS = {
    **{name: _arithmetic(name, figure) for name, figure in _FIGURES.items()},
    'cycled_letters': _scrambled('cycled_letters', 'G.19'),
    'anagrams_1': _scrambled('anagrams_1', 'G.22'),
    'anagrams_2': _scrambled('anagrams_2', 'G.23'),
    'random_insertion': _scrambled('random_insertion', 'G.26'),
    'reversed_words': _scrambled('reversed_words', 'G.27', synthetic.reversed_words),
    'transposed_letters': fewshot.Task(
        '',
        _corrected,
        'GPT-3, figure 1.1',
        'generate',
        split='test',
        k=5,
        metrics=('exact',),
        delimiter='\n',
        max_new_tokens=16,
        decode={'num_beams': 1},
        make=synthetic.transposed,
    ),
    'novel_words': fewshot.Task(
        '',
        _used,
        'GPT-3, 3.9.5',
        'generate',
        split='test',
        k=1,
        metrics=('uses_word',),
        delimiter='\n',
        max_new_tokens=40,
        decode={'num_beams': 1},
        make=functools.partial(synthetic.records, 'novel_words'),
        notes='right = the word, whatever its ending, stands in the sentence (ours; the paper '
        'judges by eye)',
    ),
}
