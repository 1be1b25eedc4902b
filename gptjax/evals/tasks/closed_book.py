# SPDX-License-Identifier: Apache-2.0
"""Questions without a text to look the answer up in: GPT-3, section 3.2."""

import functools

from gptjax.evals import fewshot


def _asked(record: fewshot.Record, k: int) -> list[fewshot.Item]:
    del k
    question = record['question'].strip()
    question = question if question.endswith('?') else f'{question}?'
    return [fewshot.Item(f'Q: {question}\n\nA:', tuple(record['answers']))]


_task = functools.partial(
    fewshot.Task,
    form=_asked,
    kind='generate',
    k=64,
    metrics=('exact_match', 'f1'),
)
TASKS = {
    'triviaqa': _task('triviaqa', source='GPT-3, 3.2, figure G.34'),
    'webquestions': _task('webquestions', source='GPT-3, 3.2, figure G.35', split='test'),
    'natural_questions': _task('nq_open', source='GPT-3, 3.2, figure G.24'),
    'gpt2_natural_questions': _task(
        'nq_open',
        source='GPT-2, 3.8',
        k=0,
        metrics=('exact_match',),
        decode={'num_beams': 1},
        notes='greedy; the paper seeds the context with example pairs of unstated number: set K',
    ),
}
