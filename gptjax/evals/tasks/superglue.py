# SPDX-License-Identifier: Apache-2.0
"""SuperGLUE (GPT-3, section 3.7) and adversarial NLI (3.8)."""

from gptjax.evals import fewshot


def _boolq(record: fewshot.Record, k: int) -> list[fewshot.Item]:
    del k
    context = f'{record["passage"]}\nquestion: {record["question"]}?\nanswer:'
    return [fewshot.Item(context, ('no', 'yes'), (record['label'],))]


def _cb(record: fewshot.Record, k: int) -> list[fewshot.Item]:
    del k
    hypothesis = record['hypothesis'].rstrip('.')
    context = f'{record["premise"]}\nquestion: {hypothesis}. true, false, or neither?\nanswer:'
    gold = ('entailment', 'contradiction', 'neutral').index(record['label'])
    return [fewshot.Item(context, ('true', 'false', 'neither'), (gold,))]


def _rte(record: fewshot.Record, k: int) -> list[fewshot.Item]:
    del k
    context = f'{record["premise"]}\nquestion: {record["hypothesis"]} True or False?\nanswer:'
    gold = ('entailment', 'not_entailment').index(record['label'])
    return [fewshot.Item(context, ('True', 'False'), (gold,))]


def _wic(record: fewshot.Record, k: int) -> list[fewshot.Item]:
    del k
    context = (
        f"{record['sentence1']}\n{record['sentence2']}\nquestion: Is the word '{record['word']}' "
        'used in the same way in the two sentences above?\nanswer:'
    )
    return [fewshot.Item(context, ('no', 'yes'), (record['label'],))]


def _wsc(record: fewshot.Record, k: int) -> list[fewshot.Item]:
    """The noun is generated; the label says whether span 1 is it. Only true ones are examples."""
    words = record['text'].split(' ')
    at, pronoun = record['span2_index'], record['span2_text']
    length = len(pronoun.split(' '))
    spot = ' '.join(words[at : at + length])
    words[at : at + length] = [spot.replace(pronoun, f'*{pronoun}*', 1)]
    passage = ' '.join(words)
    context = (
        f'Passage: {passage}\nQuestion: In the passage above, what does the pronoun "*{pronoun}*" '
        'refer to?\nAnswer:'
    )
    noun = record['span1_text'].lower()
    return [fewshot.Item(context, (noun,), (0,) if record['label'] else ())]


def _multirc(record: fewshot.Record, k: int) -> list[fewshot.Item]:
    del k
    answers = tuple(f'- [{truth}] {record["answer"]}' for truth in ('False', 'True'))
    question = f'{record["paragraph"]}\0{record["question"]}'
    context = f'{record["paragraph"]}\n\n{record["question"]}\n'
    return [fewshot.Item(context, answers, (record['label'],), together=question)]


def _record(record: fewshot.Record, k: int) -> list[fewshot.Item]:
    """Every entity in the place of @placeholder; right is any that the annotators accept."""
    del k
    entities = list(dict.fromkeys(record['entities']))
    answers = tuple(f'- {record["query"].replace("@placeholder", e)}' for e in entities)
    accepted = set(record['answers'])
    gold = tuple(i for i, entity in enumerate(entities) if entity in accepted)
    passage = record['passage'].replace('\n@highlight\n', '\n- ')
    return [fewshot.Item(passage, answers, gold)] if gold else []


def _anli(number: int) -> fewshot.Task:
    def form(record: fewshot.Record, k: int) -> list[fewshot.Item]:
        del k
        context = (
            f'anli {number}: anli {number}: {record["premise"]}\n'
            f'Question: {record["hypothesis"]} True, False, or Neither?'
        )
        gold = ('entailment', 'neutral', 'contradiction').index(record['label'])
        return [fewshot.Item(context, ('True', 'Neither', 'False'), (gold,))]

    figure = {1: 'G.7', 2: 'G.2', 3: 'G.10'}[number]
    source = f'GPT-3, 3.8, figure {figure}'
    return fewshot.Task(f'anli_r{number}', form, source, split='test', k=50)


TASKS = {
    'boolq': fewshot.Task('boolq', _boolq, 'GPT-3, 3.7, figure G.29', k=32),
    'cb': fewshot.Task(
        'cb', _cb, 'GPT-3, 3.7, figure G.30', k=32, metrics=('accuracy', 'macro_f1')
    ),
    'rte': fewshot.Task('rte', _rte, 'GPT-3, 3.7, figure G.31', k=32),
    'wic': fewshot.Task('wic', _wic, 'GPT-3, 3.7, figure G.32', k=32),
    'wsc': fewshot.Task(
        'wsc',
        _wsc,
        'GPT-3, 3.7, figure G.33',
        'generate',
        k=32,
        metrics=('agreement',),
        instruction=(
            'Final Exam with Answer Key\nInstructions: Please carefully read the following '
            'passages. For each passage, you must identify which noun the pronoun marked in *bold* '
            'refers to.\n=====\n'
        ),
        max_new_tokens=10,
        notes='the label is predicted by whether the noun generated is the one in question (ours)',
    ),
    'multirc': fewshot.Task(
        'multirc',
        _multirc,
        'GPT-3, 3.7, figure G.15',
        k=32,
        metrics=('group_accuracy', 'f1a'),
        instruction='READING COMPREHENSION ANSWER KEY\n\n',
        separator='',
        normalise='sum',
        notes='K counts answers, of any question (the paper: questions)',
    ),
    'record': fewshot.Task(
        'record',
        _record,
        'GPT-3, 3.7, figure G.6',
        k=32,
        separator='\n',
    ),
    **{f'anli_r{number}': _anli(number) for number in (1, 2, 3)},
}
