# SPDX-License-Identifier: Apache-2.0
"""LAMBADA and the Children's Book Test: GPT-2, sections 3.2 and 3.3; GPT-3, section 3.1.2."""

import functools

from gptjax.evals import fewshot
from gptjax.text import detokenize


def _last_word(record: fewshot.Record, k: int) -> list[fewshot.Item]:
    del k
    context, word = record['text'].strip().rsplit(' ', 1)
    return [fewshot.Item(context, (word,))]


def _cloze(record: fewshot.Record, k: int) -> list[fewshot.Item]:
    """The blank of one and few shots; without examples the passage itself."""
    if not k:
        return _last_word(record, k)
    context, word = record['text'].strip().rsplit(' ', 1)
    return [fewshot.Item(f'{context} ____. ->', (word,))]


def _cbt(record: fewshot.Record, k: int) -> list[fewshot.Item]:
    """Each choice with the rest of its sentence, behind the 20 sentences and its beginning."""
    del k
    sentences = ' '.join(map(detokenize.cbt, record['context']))
    before, after = record['query'].split('XXXXX', 1)
    start = len(detokenize.cbt(before))
    wholes = [detokenize.cbt(before + choice + after) for choice in record['choices']]
    shared = start if all(w[:start] == wholes[0][:start] for w in wholes) else 0
    context = f'{sentences} {wholes[0][:shared]}'.rstrip()
    gold = record['choices'].index(record['answer'])
    return [fewshot.Item(context, tuple(w[shared:].strip() for w in wholes), (gold,))]


# Function words, as NLTK's English list has them without contractions.
_WORDS = (
    'i me my myself we our ours ourselves you your yours yourself yourselves he him his himself '
    'she her hers herself it its itself they them their theirs themselves what which who whom '
    'this that these those am is are was were be been being have has had having do does did doing '
    'a an the and but if or because as until while of at by for with about against between into '
    'through during before after above below to from up down in out on off over under again '
    'further then once here there when where why how all any both each few more most other some '
    'such no nor not only own same so than too very s t can will just don should now'
)
STOP_WORDS = frozenset(_WORDS.split())
_lambada = functools.partial(
    fewshot.Task,
    'lambada',
    kind='cloze',
    split='test',
    shots_from='validation',
)
TASKS = {
    'lambada': _lambada(
        _cloze,
        'GPT-3, 3.1.2, figure G.21',
        k=15,
        metrics=('accuracy', 'perplexity'),
        instruction='Fill in blank:\n\n',
        instruction_from=1,
        notes='greedy: every token of the last word is the most likely one',
    ),
    'lambada_last_word': _lambada(
        _last_word, 'the lm-evaluation-harness: lambada_openai', metrics=('accuracy', 'perplexity')
    ),
    'gpt2_lambada': _lambada(
        _last_word,
        'GPT-2, 3.3',
        metrics=(
            'accuracy_stop_words',
            'accuracy_last_token',
            'accuracy',
            'token_perplexity',
            'last_token_perplexity',
            'perplexity',
        ),
        notes='un-preprocessed text; which of filter and last token gave the printed numbers is '
        'inferred, so all are here',
    ),
    'cbt_cn': fewshot.Task(
        'cbt_cn',
        _cbt,
        'GPT-2, 3.2: common nouns',
        normalise='sum',
        notes='P(choice and the rest of the sentence); de-tokenised',
    ),
    'cbt_ne': fewshot.Task(
        'cbt_ne',
        _cbt,
        'GPT-2, 3.2: named entities',
        normalise='sum',
        notes='P(choice and the rest of the sentence); de-tokenised',
    ),
}
