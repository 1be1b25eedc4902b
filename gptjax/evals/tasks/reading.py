# SPDX-License-Identifier: Apache-2.0
"""Questions about a text: GPT-3, section 3.6; GPT-2's CoQA (3.5) and summaries (3.6)."""

from gptjax.evals import fewshot


def _turns(head: str, turns: list[fewshot.Record], unanswerable: str = '') -> list[fewshot.Item]:
    """Every question of a passage behind those before it, each with its first answer."""
    items, text = [], head
    for turn in turns:
        answers = tuple(turn['answers']) or (unanswerable,)
        text += f'\n\nQ: {turn["question"].strip()}\n\nA:'
        items.append((text, answers))
        text += f' {answers[0]}'
    return [fewshot.Item(context, answers, shown=text, passage=head) for context, answers in items]


def _coqa(record: fewshot.Record, k: int) -> list[fewshot.Item]:
    del k
    return _turns(record['passage'].strip(), record['turns'])


def _squad(record: fewshot.Record, k: int) -> list[fewshot.Item]:
    del k
    title = record.get('title', '').replace('_', ' ')
    head = f'Title: {title}\n\nBackground: {record["passage"].strip()}'
    return _turns(head, record['turns'], _NO_ANSWER)


def _quac(record: fewshot.Record, k: int) -> list[fewshot.Item]:
    """TFDS's rows: one question each, with the passage it is asked of."""
    del k
    passage = record['context'].removesuffix('CANNOTANSWER').strip()
    head = f'TITLE: {record["title"]} - {record["section_title"]}\nPARAGRAPH: {passage}'
    answers = record['answers']['text'] if 'answers' in record else record['answer']
    answers = [_NO_ANSWER if a == 'CANNOTANSWER' else a for a in answers]
    return _turns(head, [{'question': record['question'], 'answers': answers}], _NO_ANSWER)


def _drop(record: fewshot.Record, k: int) -> list[fewshot.Item]:
    del k
    context = f'Passage: {record["passage"]}\nQuestion: {record["question"]}\nAnswer:'
    return [fewshot.Item(context, tuple(record['answers']))]


def _race(record: fewshot.Record, k: int) -> list[fewshot.Item]:
    """Every question of an article behind those before it, each with its answer."""
    del k
    head = f'Article:\n{record["article"].strip()}'
    items, text = [], head
    for asked in record['questions']:
        text += f'\n\nQ: {asked["question"].strip()}\n\nA:'
        items.append((text, tuple(asked['options']), asked['gold']))
        text += f' {asked["options"][asked["gold"]]}'
    return [
        fewshot.Item(context, options, (gold,), shown=text, passage=head)
        for context, options, gold in items
    ]


def _summary(record: fewshot.Record, k: int) -> list[fewshot.Item]:
    del k
    return [fewshot.Item(f'{record["article"]}\nTL;DR:', (record['highlights'],))]


def _unhinted(record: fewshot.Record, k: int) -> list[fewshot.Item]:
    del k
    return [fewshot.Item(record['article'], (record['highlights'],))]


_NO_ANSWER = 'unanswerable'  # the paper does not print what stands for it
_SAMPLED = {'num_beams': 1, 'do_sample': True, 'top_k': 2}  # GPT-2, section 3.6


def _race_task(level: str, figure: str) -> fewshot.Task:
    return fewshot.Task(
        f'race_{level}',
        _race,
        f'GPT-3, 3.6, figure {figure}',
        split='test',
        k=10,
        normalise='answer_context',
        answer_context='A:',
        notes='questions of an article that came before are answered in the context',
    )


TASKS = {
    'coqa': fewshot.Task(
        'coqa', _coqa, 'GPT-3, 3.6, figure G.18', 'generate', k=5, metrics=('f1', 'exact_match')
    ),
    'squad2': fewshot.Task(
        'squad2',
        _squad,
        'GPT-3, 3.6, figure G.28',
        'generate',
        k=16,
        metrics=('f1', 'exact_match'),
        notes=f'questions without an answer have {_NO_ANSWER!r} (ours)',
    ),
    'quac': fewshot.Task(
        'quac',
        _quac,
        'GPT-3, 3.6, figure G.25',
        'generate',
        k=5,
        metrics=('f1',),
        notes=f'questions without an answer have {_NO_ANSWER!r}; earlier questions are not shown '
        '(ours)',
    ),
    'drop': fewshot.Task(
        'drop', _drop, 'GPT-3, 3.6, figure G.20', 'generate', k=20, metrics=('f1', 'exact_match')
    ),
    'race_h': _race_task('h', 'G.1'),
    'race_m': _race_task('m', 'G.3'),
    'gpt2_coqa': fewshot.Task(
        'coqa',
        _coqa,
        'GPT-2, 3.5',
        'generate',
        metrics=('f1',),
        decode={'num_beams': 1},
        notes='greedy behind "A:"',
    ),
    'gpt2_cnn_dailymail': fewshot.Task(
        'cnn_dailymail',
        _summary,
        'GPT-2, 3.6',
        'generate',
        split='test',
        stop=(),
        metrics=('rouge1', 'rouge2', 'rougeL'),
        max_new_tokens=100,
        decode=_SAMPLED,
        notes='first 3 sentences of the text; articles that do not fit lose their beginning',
    ),
    'gpt2_cnn_dailymail_no_hint': fewshot.Task(
        'cnn_dailymail',
        _unhinted,
        'GPT-2, 3.6: no hint',
        'generate',
        split='test',
        stop=(),
        metrics=('rouge1', 'rouge2', 'rougeL'),
        max_new_tokens=100,
        decode=_SAMPLED,
        notes='first 3 sentences of the text; articles that do not fit lose their beginning',
    ),
}
