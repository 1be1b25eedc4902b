# SPDX-License-Identifier: Apache-2.0
"""Winograd schemas: GPT-2, section 3.4 (Trinh and Le 2018), and GPT-3, section 3.4."""

from gptjax.evals import fewshot


def _partial(record: fewshot.Record, k: int) -> list[fewshot.Item]:
    """The rest of the sentence behind each referent: P(rest | beginning with the referent)."""
    del k
    contexts = tuple(record['context_options'])
    return [fewshot.Item('', (record['continuation'],), (record['gold'],), contexts)]


def _full(record: fewshot.Record, k: int) -> list[fewshot.Item]:
    """The whole sentence with each referent, behind nothing: P(sentence)."""
    del k
    rest = record['continuation']
    wholes = tuple(f'{context} {rest}' for context in record['context_options'])
    return [fewshot.Item('', wholes, (record['gold'],))]


TASKS = {
    'winograd': fewshot.Task(
        'wsc273',
        _partial,
        'GPT-3, 3.4, figure G.13',
        split='test',
        shots_from='self',
        k=7,
        normalise='sum',
    ),
    'winogrande': fewshot.Task(
        'winogrande', _partial, 'GPT-3, 3.4, figure G.14', k=50, normalise='sum'
    ),
    'gpt2_winograd_partial': fewshot.Task(
        'wsc273',
        _partial,
        'GPT-2, 3.4: partial scoring',
        split='test',
        shots_from='self',
        normalise='sum',
    ),
    'gpt2_winograd_full': fewshot.Task(
        'wsc273',
        _full,
        'GPT-2, 3.4: full scoring',
        split='test',
        shots_from='self',
        normalise='sum',
        separator='',
    ),
}
