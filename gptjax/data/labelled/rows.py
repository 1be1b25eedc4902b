# SPDX-License-Identifier: Apache-2.0
"""Rows of evaluation sets, as they are published, to records of few shapes.

Every function takes a row in any of the layouts in use (the set's own, TFDS's, MosaicML's) and
yields records; a row that already is a record passes unchanged.
"""

import gzip
import pathlib
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from gptjax.configs import errors

Record = dict[str, Any]
_LETTERS = 'ABCDEFGH'


def content(path: pathlib.Path) -> str:
    """The text of a file, which may be zipped. Raises InputError where it cannot be read."""
    try:
        found = path.read_bytes()
        if path.suffix == '.gz':
            found = gzip.decompress(found)
        return found.decode('utf-8-sig')
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as e:
        raise errors.InputError(f'{path} cannot be read: {e}') from e


def same(row: Record) -> Iterator[Record]:
    """A row as it is."""
    yield row


def text(row: Record) -> Iterator[Record]:
    """{'text'}."""
    yield {'text': row.get('text', row.get('passage'))}


def whole(row: Record) -> Iterator[Record]:
    """{'text'}: a corpus or a document."""
    yield {'text': row['text']}


def choice(row: Record) -> Iterator[Record]:
    """{'query', 'choices', 'gold'}; of COPA also {'asks': cause or effect}."""
    if 'gold' in row:
        yield row
    elif 'goal' in row:  # PIQA
        yield _choice(row['goal'], [row['sol1'], row['sol2']], row['label'])
    elif 'choice1' in row:  # COPA
        joint = {'cause': 'because', 'effect': 'therefore'}[row['question']]
        query = f'{row["premise"].rstrip(". ")} {joint}'
        choices = [_lowered(row[name]) for name in ('choice1', 'choice2')]
        yield _choice(query, choices, row['label'])
    elif 'answerKey' in row and 'choices' in row:  # ARC
        choices, labels = row['choices']['text'], row['choices']['label']
        yield _choice(f'Question: {row["question"]}', choices, labels.index(row['answerKey']))
    elif isinstance(row.get('question'), dict):  # OpenBookQA
        question = row['question']
        choices = [question[f'choice_{letter}'] for letter in 'ABCD']
        yield _choice(question['stem'], choices, _place(row['answerKey']))
    elif 'endings' in row:  # StoryCloze
        yield _choice(row['context'], row['endings'], int(row['label']) - 1)  # 1 or 2
    else:
        raise KeyError('gold')


def hellaswag(row: Record) -> Iterator[Record]:
    """{'query', 'choices', 'gold'}: activity, context; WikiHow's [headers] left out."""
    if 'gold' in row:
        yield row
        return
    context = row.get('ctx') or row.get('context')
    if row.get('ctx_b'):
        context = f'{row["ctx_a"]} {row["ctx_b"].capitalize()}'
    query = _plain_wikihow(f'{row["activity_label"]}: {context}')
    yield _choice(query, [_plain_wikihow(e) for e in row['endings']], row['label'])


def cbt(row: Record) -> Iterator[Record]:
    """{'context': 20 sentences, 'query', 'answer', 'choices'} of the Children's Book Test."""
    if 'choices' in row:
        yield row
        return
    for block in re.split(r'\n\s*\n', row['text'].strip()):
        *lines, last = [line.split(' ', 1)[1] for line in block.strip().split('\n')]
        query, answer, _, choices = last.split('\t')
        yield {
            'context': lines,
            'query': query,
            'answer': answer,
            'choices': choices.strip().split('|'),
        }


def question(row: Record) -> Iterator[Record]:
    """{'question', 'answers'} of closed-book questions."""
    asked = row.get('question', row.get('qText'))
    if asked is None:  # MosaicML's TriviaQA
        asked = row['context'].removeprefix('Question: ').removesuffix('\nAnswer:')
    answers = row.get('answers', row.get('answer'))
    if isinstance(answers, dict):  # TriviaQA
        answers = [answers['value'], *answers['aliases']]
    if 'aliases' in row:
        answers = [row['answer'], *row['aliases']]
    answers = [answers] if isinstance(answers, str) else answers
    yield {'question': asked, 'answers': list(dict.fromkeys(answers))}


def translation(one: str, other: str) -> Callable[[Record], Iterator[Record]]:
    """{one: ..., other: ...} of WMT's rows."""

    def read(row: Record) -> Iterator[Record]:
        row = row.get('translation', row)
        yield {one: row[one], other: row[other]}

    return read


def parallel(one: str, other: str) -> Callable[[Record], Iterator[Record]]:
    """{one: ..., other: ...} of two files with the same lines, of which the first is read."""

    def read(row: Record) -> Iterator[Record]:
        if 'path' not in row:
            yield from translation(one, other)(row)
            return
        path = pathlib.Path(row['path'])
        zipped = path.suffix == '.gz'
        stem = path.with_suffix('') if zipped else path
        beside = stem.with_suffix(f'.{other}')
        beside = beside.with_name(beside.name + '.gz') if zipped else beside
        lines, others = row['text'].splitlines(), content(beside).splitlines()
        for a, b in zip(lines, others, strict=True):
            if a.strip() and b.strip():
                yield {one: a.strip(), other: b.strip()}

    return read


def referents(row: Record) -> Iterator[Record]:
    """{'context_options', 'continuation', 'gold'} of Winograd schemas."""
    if 'context_options' in row:
        yield row
        return
    if 'sentence' in row:  # Winogrande
        before, after = row['sentence'].split('_', 1)
        options = [row['option1'], row['option2']]
        gold = int(row['label']) if 'label' in row else int(row['answer']) - 1
    else:  # WSC273
        whole_text, at = row['text'], row['pronoun_start']
        before, after = whole_text[:at], whole_text[row['pronoun_end'] :]
        options = [row.get(f'{name}_normalized', row[name]) for name in ('option1', 'option2')]
        gold = int(row['label'])
    yield {
        'context_options': [before + option for option in options],
        'continuation': after.strip(),
        'gold': gold,
    }


def boolq(row: Record) -> Iterator[Record]:
    """{'passage', 'question', 'label'}."""
    if 'query' in row:  # MosaicML
        passage, asked = row['query'].rstrip().rsplit('\nQuestion: ', 1)
        passage = passage.removeprefix('Passage: ')
        yes = row['choices'][row['gold']] == 'yes'
        yield {'passage': passage, 'question': asked.removesuffix('?'), 'label': int(yes)}
    else:
        label = row.get('label', row.get('answer'))
        yield {'passage': row['passage'], 'question': row['question'], 'label': int(label)}


_ENTAILMENT = {'e': 'entailment', 'n': 'neutral', 'c': 'contradiction'}


def pair(*classes: str) -> Callable[[Record], Iterator[Record]]:
    """{'premise', 'hypothesis', 'label': a name}; numbers are places in `classes`."""

    def read(row: Record) -> Iterator[Record]:
        if 'sentence1' in row:  # XNLI's columns
            row = row | {'premise': row['sentence1'], 'hypothesis': row['sentence2']}
        premise = row.get('premise', row.get('context'))
        label = row.get('label', row.get('gold_label'))
        if premise is None or label in (-1, '-', None):
            return  # a broken line, or one that the annotators did not agree on
        label = classes[label] if isinstance(label, int) else _ENTAILMENT.get(label, label)
        if label not in classes:
            raise ValueError(f'no label {label!r} among {", ".join(classes)}')
        yield {'premise': premise, 'hypothesis': row['hypothesis'], 'label': label}

    return read


def wsc(row: Record) -> Iterator[Record]:
    """TFDS's rows of SuperGLUE's schemas; its own files keep the spans apart."""
    yield row | row.get('target', {})


def race(level: str) -> Callable[[Record], Iterator[Record]]:
    """{'article', 'questions': [{'question', 'options', 'gold'}]} of one level; '' = any."""

    def read(row: Record) -> Iterator[Record]:
        if level not in str(row.get('example_id', level)):
            return
        if isinstance(row.get('question'), str):
            one = {
                'question': row['question'],
                'options': row['options'],
                'gold': _place(row['answer']),
            }
            yield {'article': row['article'], 'questions': [one]}
        elif row['questions'] and isinstance(row['questions'][0], dict):
            yield row
        else:
            parts = zip(row['questions'], row['options'], row['answers'], strict=True)
            asked = [{'question': q, 'options': o, 'gold': _place(a)} for q, o, a in parts]
            yield {'article': row['article'], 'questions': asked}

    return read


def squad(row: Record) -> Iterator[Record]:
    """{'title', 'passage', 'turns': [{'question', 'answers'}]}; no answers = unanswerable."""
    if 'turns' in row:
        yield row
    elif 'data' in row:
        for article in row['data']:
            for part in article['paragraphs']:
                turns = [
                    {
                        'question': qa['question'],
                        'answers': list(dict.fromkeys(a['text'] for a in qa['answers'])),
                    }
                    for qa in part['qas']
                ]
                yield {
                    'title': article.get('title', ''),
                    'passage': part['context'],
                    'turns': turns,
                }
    else:  # TFDS: a row a question
        answers = list(dict.fromkeys(row['answers']['text']))
        yield {
            'title': row['title'],
            'passage': row['context'],
            'turns': [{'question': row['question'], 'answers': answers}],
        }


def coqa(row: Record) -> Iterator[Record]:
    """{'passage', 'turns': [{'question', 'answers'}]}, of all annotators."""
    if 'turns' in row:
        yield row
        return
    if 'data' not in row:  # TFDS
        turns = zip(row['questions'], row['answers']['input_text'], strict=True)
        yield {
            'passage': row['story'],
            'turns': [{'question': q, 'answers': [a]} for q, a in turns],
        }
        return
    for story in row['data']:
        others = story.get('additional_answers', {}).values()
        turns = [
            {
                'question': asked['input_text'],
                'answers': [a[i]['input_text'] for a in (story['answers'], *others)],
            }
            for i, asked in enumerate(story['questions'])
        ]
        yield {'passage': story['story'], 'turns': turns}


def drop(row: Record) -> Iterator[Record]:
    """{'passage', 'question', 'answers'}."""
    answers = row.get('answers') or [row['answer'], *row.get('validated_answers', ())]
    yield {
        'passage': row['passage'],
        'question': row['question'],
        'answers': list(dict.fromkeys(answers)),
    }


def summary(row: Record) -> Iterator[Record]:
    """{'article', 'highlights'} of CNN and Daily Mail."""
    if 'prompt' in row:  # T0's wordings around the article
        found = re.search(r'article[^:\n]*:\s*(.+)', row['prompt'], re.DOTALL | re.IGNORECASE)
        article = found.group(1) if found else row['prompt']
        yield {
            'article': article.strip(),
            'highlights': row['completion'].removesuffix('<|endoftext|>'),
        }
    else:
        yield {'article': row['article'], 'highlights': row['highlights']}


def synthetic(row: Record) -> Iterator[Record]:
    """{'query', 'answer'} of OpenAI's files of GPT-3's own tasks."""
    if 'context' in row:
        query = row['context'].strip().removeprefix('Q: ').removesuffix('\n\nA:')
        yield {'query': query.removesuffix(' ='), 'answer': row['completion'].strip()}
    else:
        yield row


def review(row: Record) -> Iterator[Record]:
    """{'text', 'label'}: 1 = positive."""
    document = row.get('document', row.get('text'))
    if document and document.strip():
        yield {'text': document.strip(), 'label': int(row['label'])}


def similarity(row: Record) -> Iterator[Record]:
    """{'sentence1', 'sentence2', 'score'}: 0 to 5."""
    yield {
        'sentence1': row['sentence1'],
        'sentence2': row['sentence2'],
        'score': float(row['score']),
    }


def _choice(query: str, choices: list[str], gold: Any) -> Record:
    gold = int(gold)
    if not 0 <= gold < len(choices):
        raise ValueError(f'right answer {gold} of {len(choices)}')
    return {'query': query, 'choices': list(choices), 'gold': gold}


def _place(label: str | int) -> int:
    return label if isinstance(label, int) else _LETTERS.index(label)


def _lowered(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:]


def _plain_wikihow(sentence: str) -> str:
    sentence = re.sub(r'\[.*?\]', '', sentence.replace(' [title]', '. '))
    return re.sub(r' {2,}', ' ', sentence).strip()
