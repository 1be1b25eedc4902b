# SPDX-License-Identifier: Apache-2.0
"""GPT-3, sections 3.1.3, 3.1.4, 3.5 and 3.9.3: the likelier of several continuations."""

from gptjax.evals import fewshot


def _asked(record: fewshot.Record, k: int) -> list[fewshot.Item]:
    """The query as it stands, behind it each choice."""
    del k
    return [fewshot.Item(record['query'], tuple(record['choices']), (record['gold'],))]


def _question(record: fewshot.Record, k: int) -> list[fewshot.Item]:
    """'Question: ... Answer:', of ARC."""
    del k
    query = record['query']
    query = query if query.startswith('Question: ') else f'Question: {query}'
    return [fewshot.Item(f'{query}\nAnswer:', tuple(record['choices']), (record['gold'],))]


def _arc(level: str, figure: str) -> fewshot.Task:
    return fewshot.Task(
        f'arc_{level}',
        _question,
        f'GPT-3, 3.5, figure {figure}',
        split='test',
        k=50,
        normalise='answer_context',
        answer_context='Answer:',
    )


TASKS = {
    'hellaswag': fewshot.Task('hellaswag', _asked, 'GPT-3, 3.1.3, figure G.9', k=20),
    'storycloze': fewshot.Task(
        'storycloze',
        _asked,
        'GPT-3, 3.1.4, figure G.17',
        split='test',
        shots_from='validation',
        k=70,
    ),
    'piqa': fewshot.Task('piqa', _asked, 'GPT-3, 3.5, figure G.4', k=50),
    'arc_easy': _arc('easy', 'G.16'),
    'arc_challenge': _arc('challenge', 'G.11'),
    'openbookqa': fewshot.Task(
        'openbookqa',
        _asked,
        'GPT-3, 3.5, figure G.8',
        split='test',
        k=100,
        normalise='answer_context',
        answer_context='A:',
    ),
    'copa': fewshot.Task('copa', _asked, 'GPT-3, 3.7, figure G.5', k=32),
    'sat_analogies': fewshot.Task(
        'sat_analogies',
        _asked,
        'GPT-3, 3.9.3, figure G.12',
        split='test',
        shots_from='self',
        k=20,
    ),
}
