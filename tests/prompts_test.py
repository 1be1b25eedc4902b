# SPDX-License-Identifier: Apache-2.0
"""Prompts byte for byte as GPT-3's appendix G prints them, and how examples stand before them.

What the paper's figures set in one line is broken where OpenAI's published files (openai/gpt-3,
data/) break it; apostrophes are those of the data sets.
"""

import pytest

from gptjax.evals import fewshot

_TORCH = (
    'She held the torch in front of her.\n\nShe caught her breath.\n\n"Chris? There\'s a step."\n\n'
    '"What?"\n\n"A step. Cut in the rock. About fifty feet ahead." She moved faster. They both '
    'moved faster. "In fact," she said, raising the torch higher, "there\'s more than a'
)
_UNSCRAMBLE = 'Please unscramble the letters into a word, and write that word:\n'
_TRUTH = 'The truth is that you want, at any price, to continue the negotiations.'
_NORMAL = 'Normal force -- In a simple case such as an object resting upon a table, N = m g.'
_LOWER = 'The trend toward lower rents may seem surprising. Certainly, the recent drop in prices '
_QUARK = 'The bet was regarding the existence and mass of the top quark.'
_OUTFIT = (
    'An outfitter provided everything needed for the safari.',
    'Before his first walking holiday, he went to a specialist outfitter to buy some boots.',
)
_EDWARD = "that Mr. Moncrieff has decided to cancel Edward's allowance as he no longer requires"

# figure, task, K, record, text before the answers, answers, the right ones
FIGURES = [
    ('G.1', 'race_h', 0,
     {'article': 'Informal conversation is an important part of any business relationship.',
      'questions': [
          {'question': "What shouldn't you do?", 'options': ['Criticizing.', 'b'], 'gold': 0},
          {'question': 'The author considers politics and religion _ .',
           'options': ['cheerful topics', 'taboo', 'rude topics'], 'gold': 1}]},
     'Article:\nInformal conversation is an important part of any business relationship.\n\nQ: '
     "What shouldn't you do?\n\nA: Criticizing.\n\nQ: The author considers politics and religion "
     '_ .\n\nA:', ['cheerful topics', 'taboo', 'rude topics'], (1,)),
    ('G.2', 'anli_r2', 0,
     {'premise': 'The Gold Coast Hotel & Casino is a hotel and casino.',
      'hypothesis': 'The Gold Coast is a budget-friendly casino.', 'label': 'neutral'},
     'anli 2: anli 2: The Gold Coast Hotel & Casino is a hotel and casino.\nQuestion: The Gold '
     'Coast is a budget-friendly casino. True, False, or Neither?',
     ['True', 'Neither', 'False'], (1,)),
    ('G.4', 'piqa', 0,
     {'query': 'How to apply sealant to wood.', 'gold': 0, 'choices': [
         'Using a brush, brush on sealant onto wood until it is fully saturated with the sealant.',
         'Using a brush, drip on sealant onto wood until it is fully saturated with the sealant.']},
     'How to apply sealant to wood.', [
         'Using a brush, brush on sealant onto wood until it is fully saturated with the sealant.',
         'Using a brush, drip on sealant onto wood until it is fully saturated with the sealant.'],
     (0,)),
    ('G.5', 'copa', 0,
     {'query': 'My body cast a shadow over the grass because', 'gold': 0,
      'choices': ['the sun was rising.', 'the grass was cut.']},
     'My body cast a shadow over the grass because',
     ['the sun was rising.', 'the grass was cut.'], (0,)),
    ('G.6', 'record', 0,
     {'passage': '(CNN) Yuval Rabin criticized Donald Trump.\n@highlight\nThe son wrote an op ed'
      '\n@highlight\nWarns of "parallels"', 'entities': ['Donald Trump', 'Hillary Clinton'],
      'query': "Rabin condemned @placeholder's aggressive rhetoric.", 'answers': ['Donald Trump']},
     '(CNN) Yuval Rabin criticized Donald Trump.\n- The son wrote an op ed\n- Warns of "parallels"',
     ["- Rabin condemned Donald Trump's aggressive rhetoric.",
      "- Rabin condemned Hillary Clinton's aggressive rhetoric."], (0,)),
    ('G.8', 'openbookqa', 0,
     {'query': 'Organisms require energy in order to do what?', 'gold': 0,
      'choices': ['mature and develop.', 'rest soundly.', 'absorb light.', 'take in nutrients.']},
     'Organisms require energy in order to do what?',
     ['mature and develop.', 'rest soundly.', 'absorb light.', 'take in nutrients.'], (0,)),
    ('G.9', 'hellaswag', 0,
     {'activity_label': 'Making a cake', 'ctx_a': 'Several cake pops are shown on a display. A '
      'woman and girl are shown making the cake pops in a kitchen.', 'ctx_b': 'they', 'ctx': '-',
      'endings': ['taste them as they place them on plates.',
                  'bake them, then frost and decorate.'],
      'label': 1},
     'Making a cake: Several cake pops are shown on a display. A woman and girl are shown making '
     'the cake pops in a kitchen. They',
     ['taste them as they place them on plates.', 'bake them, then frost and decorate.'], (1,)),
    ('G.11', 'arc_challenge', 0,
     {'query': 'George wants to warm his hands quickly by rubbing them. Which skin surface will '
      'produce the most heat?', 'choices': ['dry palms', 'wet palms'], 'gold': 0},
     'Question: George wants to warm his hands quickly by rubbing them. Which skin surface will '
     'produce the most heat?\nAnswer:', ['dry palms', 'wet palms'], (0,)),
    ('G.12', 'sat_analogies', 0,
     {'query': 'lull is to trust as', 'gold': 0,
      'choices': ['cajole is to compliance', 'balk is to fortitude']},
     'lull is to trust as', ['cajole is to compliance', 'balk is to fortitude'], (0,)),
    ('G.15', 'multirc', 0,
     {'paragraph': 'While this process moved along, diplomacy continued its rounds.', 'label': 0,
      'question': 'Who did The State Department feel should visit both India and Pakistan?',
      'answer': 'Bin Laden'},
     'READING COMPREHENSION ANSWER KEY\n\nWhile this process moved along, diplomacy continued its '
     'rounds.\n\nWho did The State Department feel should visit both India and Pakistan?\n',
     ['- [False] Bin Laden', '- [True] Bin Laden'], (0,)),
    ('G.17', 'storycloze', 0,
     {'query': 'Bob felt grateful as he drove home.', 'gold': 0, 'choices': [
         'Bob believed that there were good people in the world.',
         'Bob contemplated how unfriendly the world was.']},
     'Bob felt grateful as he drove home.', [
         'Bob believed that there were good people in the world.',
         'Bob contemplated how unfriendly the world was.'], (0,)),
    ('G.18', 'coqa', 0,
     {'passage': 'Helsinki is the capital of Finland.', 'turns': [
         {'question': 'how many people live there?', 'answers': ['1.4 million']},
         {'question': 'what towns are a part of the metropolitan area?',
          'answers': ['Helsinki, Espoo']}]},
     'Helsinki is the capital of Finland.\n\nQ: how many people live there?\n\nA: 1.4 million\n\n'
     'Q: what towns are a part of the metropolitan area?\n\nA:', ['Helsinki, Espoo'], (0,)),
    ('G.19', 'cycled_letters', 0, {'query': 'asinoc', 'answer': 'casino'},
     f'{_UNSCRAMBLE}asinoc =', ['casino'], (0,)),
    ('G.20', 'drop', 0,
     {'passage': 'Saint Jean de Brébeuf was a French Jesuit missionary.',
      'question': 'How many years did he stay?', 'answers': ['4']},
     'Passage: Saint Jean de Brébeuf was a French Jesuit missionary.\nQuestion: How many years did '
     'he stay?\nAnswer:', ['4'], (0,)),
    ('G.21', 'lambada', 1, {'text': f'{_TORCH} step'},
     f'Fill in blank:\n\n{_TORCH} ____. ->', ['step'], (0,)),
    ('G.24', 'natural_questions', 0,
     {'question': 'Who played tess on touched by an angel', 'answers': ['Della Reese']},
     'Q: Who played tess on touched by an angel?\n\nA:', ['Della Reese'], (0,)),
    ('G.25', 'quac', 0,
     {'title': 'William Perry (American football)', 'section_title': 'Professional career',
      'context': 'In 1985, he was selected in the first round. CANNOTANSWER',
      'question': 'what team did he play for?', 'answers': {'text': ['the Chicago Bears']}},
     'TITLE: William Perry (American football) - Professional career\nPARAGRAPH: In 1985, he was '
     'selected in the first round.\n\nQ: what team did he play for?\n\nA:',
     ['the Chicago Bears'], (0,)),
    ('G.26', 'random_insertion', 0, {'query': 'r e!c.i p r o.c a/l', 'answer': 'reciprocal'},
     f'{_UNSCRAMBLE}r e!c.i p r o.c a/l =', ['reciprocal'], (0,)),
    ('G.28', 'squad2', 0,
     {'title': 'The_Blitz', 'passage': 'March 1941 saw an improvement.', 'turns': [
         {'question': 'How many sorties were flown in March 1941?', 'answers': ['4,000']},
         {'question': 'When did the Luftwaffe fly inland missions?',
          'answers': ['only on moonlit nights']}]},
     'Title: The Blitz\n\nBackground: March 1941 saw an improvement.\n\nQ: How many sorties were '
     'flown in March 1941?\n\nA: 4,000\n\nQ: When did the Luftwaffe fly inland missions?\n\nA:',
     ['only on moonlit nights'], (0,)),
    ('G.29', 'boolq', 0,
     {'passage': _NORMAL, 'question': 'is the normal force equal to the force of gravity',
      'label': 1},
     f'{_NORMAL}\nquestion: is the normal force equal to the force of gravity?\nanswer:',
     ['no', 'yes'], (1,)),
    ('G.30', 'cb', 0,
     {'premise': f"{_LOWER}doesn't mean Manhattan comes cheap.",
      'hypothesis': 'Manhattan comes cheap', 'label': 'contradiction'},
     f"{_LOWER}doesn't mean Manhattan comes cheap.\nquestion: Manhattan comes cheap. true, false, "
     'or neither?\nanswer:', ['true', 'false', 'neither'], (1,)),
    ('G.31', 'rte', 0,
     {'premise': _QUARK, 'hypothesis': 'The Top Quark is the last of six flavors of quarks.',
      'label': 'not_entailment'},
     f'{_QUARK}\nquestion: The Top Quark is the last of six flavors of quarks. True or False?\n'
     'answer:', ['True', 'False'], (1,)),
    ('G.32', 'wic', 0,
     {'sentence1': _OUTFIT[0], 'sentence2': _OUTFIT[1], 'word': 'outfitter', 'label': 0},
     f"{_OUTFIT[0]}\n{_OUTFIT[1]}\nquestion: Is the word 'outfitter' used in the same way in the "
     'two sentences above?\nanswer:', ['no', 'yes'], (0,)),
    ('G.33', 'wsc', 0,
     {'text': f'The result was {_EDWARD} his financial support.', 'span2_text': 'his',
      'span2_index': 17, 'span1_text': 'Mr. Moncrieff', 'label': 1},
     'Final Exam with Answer Key\nInstructions: Please carefully read the following passages. For '
     'each passage, you must identify which noun the pronoun marked in *bold* refers to.\n=====\n'
     f'Passage: The result was {_EDWARD} *his* financial support.\nQuestion: In the passage above, '
     'what does the pronoun "*his*" refer to?\nAnswer:', ['mr. moncrieff'], (0,)),
    ('G.34', 'triviaqa', 0,
     {'question': "'Nude Descending A Staircase' is perhaps the most famous painting by which 20th "
      'century artist?', 'answers': ['MARCEL DUCHAMP', 'r mutt']},
     "Q: 'Nude Descending A Staircase' is perhaps the most famous painting by which 20th century "
     'artist?\n\nA:', ['MARCEL DUCHAMP', 'r mutt'], (0,)),
    ('G.35', 'webquestions', 0,
     {'question': 'What school did burne hogarth establish?', 'answers': ['School of Visual Arts']},
     'Q: What school did burne hogarth establish?\n\nA:', ['School of Visual Arts'], (0,)),
    ('G.36', 'wmt_de_en', 1, {'de': 'Keinesfalls.', 'en': 'In no case.'},
     'Keinesfalls. =', ['In no case.'], (0,)),
    ('G.36, caption', 'wmt_de_en', 0, {'de': 'Keinesfalls.', 'en': 'In no case.'},
     'Q: What is the English translation of Keinesfalls. A:', ['In no case.'], (0,)),
    ('G.40', 'wmt_en_ro', 1, {'en': _TRUTH, 'ro': 'Adevărul este că vă doriți.'},
     f'{_TRUTH} =', ['Adevărul este că vă doriți.'], (0,)),
    ('G.42', 'arithmetic_1dc', 0, {'query': 'What is (2 * 4) * 6?', 'answer': '48'},
     'Q: What is (2 * 4) * 6?\n\nA:', ['48'], (0,)),
    ('G.44', 'arithmetic_2d_plus', 0, {'query': 'What is 98 plus 45?', 'answer': '143'},
     'Q: What is 98 plus 45?\n\nA:', ['143'], (0,)),
]  # fmt: skip


@pytest.mark.parametrize('figure', FIGURES, ids=lambda figure: f'{figure[0]} {figure[1]}')
def test_prompts_are_those_of_appendix_g(figure):
    _, name, k, record, text, answers, gold = figure
    task = fewshot.find(name)
    records = list(_source(task).record(record)) if name == 'hellaswag' else [record]
    item = task.form(records[0], k)[-1]
    head = task.instruction if k >= task.instruction_from else ''
    assert head + item.context == text
    assert list(item.answers) == answers
    assert item.gold == gold


def _source(task):
    from gptjax.data.labelled import sets

    return sets.SETS[task.set]


@pytest.mark.parametrize(
    ('name', 'options', 'rest'),
    [
        ('winograd', ('Grace was happy to trade me her sweater for my jacket. She thinks the '
                      'sweater', 'Grace was happy to trade me her sweater for my jacket. She '
                      'thinks the jacket'), 'looks dowdy on her.'),
        ('winogrande', ('Johnny likes fruits more than vegetables in his new keto diet because the '
                        'fruits', 'Johnny likes fruits more than vegetables in his new keto diet '
                        'because the vegetables'), 'are saccharine.'),
    ],
)  # fmt: skip
def test_partial_evaluation_is_that_of_figures_g13_and_g14(name, options, rest):
    record = {'context_options': list(options), 'continuation': rest, 'gold': 0}
    (item,) = fewshot.find(name).form(record, 0)
    assert (item.contexts, item.answers, item.gold) == (options, (rest,), (0,))


# K of each task, as the paper's section 3 and its captions give them.
K = {
    'hellaswag': 20, 'lambada': 15, 'storycloze': 70, 'natural_questions': 64, 'triviaqa': 64,
    'webquestions': 64, 'wmt_en_fr': 64, 'winograd': 7, 'winogrande': 50, 'piqa': 50,
    'arc_easy': 50, 'arc_challenge': 50, 'openbookqa': 100, 'quac': 5, 'coqa': 5, 'race_h': 10,
    'race_m': 10, 'squad2': 16, 'drop': 20, 'boolq': 32, 'cb': 32, 'copa': 32, 'rte': 32, 'wic': 32,
    'wsc': 32, 'multirc': 32, 'record': 32, 'anli_r1': 50, 'anli_r2': 50, 'anli_r3': 50,
    'arithmetic_2d_plus': 50, 'reversed_words': 100,
}  # fmt: skip


@pytest.mark.parametrize('name', K)
def test_k_is_the_papers(name):
    assert fewshot.find(name).k == K[name]


def test_ten_arithmetic_and_five_scrambling_tasks():
    names = fewshot.every()
    assert sum(name.startswith('arithmetic_') for name in names) == 10
    scrambled = {'cycled_letters', 'anagrams_1', 'anagrams_2', 'random_insertion', 'reversed_words'}
    assert scrambled <= set(names)


def test_examples_stand_before_the_item(tmp_path):
    asked = fewshot.prompts(fewshot.find('arithmetic_2d_plus'), 2, 0, '', limit=5)
    prompt = asked.prompts[0]
    assert len(prompt.shots) == 2
    whole = prompt.text() + prompt.item.context
    assert whole.count('\n\nA:') == 3
    first, second, _ = whole.split('\n\nQ: ')
    assert first.startswith('Q: What is ')
    assert second.rpartition(' ')[2].isdecimal()
    again = fewshot.prompts(fewshot.find('arithmetic_2d_plus'), 2, 0, '', limit=5)
    assert again == asked
    other = fewshot.prompts(fewshot.find('arithmetic_2d_plus'), 2, 1, '', limit=5)
    assert [p.item for p in other.prompts] == [p.item for p in asked.prompts]
    assert other.prompts[0].shots != prompt.shots


def test_an_item_is_never_its_own_example(tmp_path):
    (tmp_path / 'copa').mkdir()
    lines = [
        f'{{"query": "It was {i} because", "choices": ["a.", "b."], "gold": {i % 2}}}\n'
        for i in range(6)
    ]
    (tmp_path / 'copa' / 'validation.jsonl').write_text(''.join(lines))
    asked = fewshot.prompts(fewshot.find('copa'), 5, 0, str(tmp_path))
    assert 'validation itself (train is absent)' in asked.shots
    for prompt in asked.prompts:
        assert len(prompt.shots) == 5
        assert not any(prompt.item.context in shot for shot in prompt.shots)


def test_whole_sentences_are_examples_too(tmp_path):
    (tmp_path / 'wsc273').mkdir()
    lines = [
        f'{{"context_options": ["a{i}", "b{i}"], "continuation": "ran.", "gold": 0}}\n'
        for i in range(4)
    ]
    (tmp_path / 'wsc273' / 'test.jsonl').write_text(''.join(lines))
    for name in ('gpt2_winograd_full', 'winograd'):
        for prompt in fewshot.prompts(fewshot.find(name), 3, 0, str(tmp_path)).prompts:
            assert len(set(prompt.shots)) == 3
            assert not any(f'{prompt.number} ran' in shot for shot in prompt.shots)


def test_an_unknown_task_is_told_with_the_nearest():
    from gptjax.configs import errors

    with pytest.raises(errors.UsageError, match="did you mean 'lambada'"):
        fewshot.find('lambda')
