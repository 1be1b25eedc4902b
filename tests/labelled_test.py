# SPDX-License-Identifier: Apache-2.0
"""Labelled sets: files of every publisher, made items, text made plain."""

import contextlib
import gzip
import json
import random
import re

import pytest

from gptjax.configs import errors
from gptjax.data.labelled import rows, sets, synthetic
from gptjax.evals import fewshot
from gptjax.text import detokenize


def test_made_items_are_right_and_repeat():
    for name in ('arithmetic_3d_minus', 'arithmetic_1dc', 'arithmetic_2d_times'):
        test, other = (synthetic.records(name, split, 0) for split in ('test', 'train'))
        assert not {r['query'] for r in test} & {r['query'] for r in other}
        assert test == synthetic.records(name, 'test', 0)
        for record in test[:200]:
            sum_ = record['query'].removeprefix('What is ').removesuffix('?')
            for word, sign in (('plus', '+'), ('minus', '-'), ('times', '*')):
                sum_ = sum_.replace(word, sign)
            assert str(eval(sum_)) == record['answer']
    pytest.importorskip('wordfreq')
    for name in ('cycled_letters', 'anagrams_1', 'anagrams_2'):
        for record in synthetic.records(name, 'test', 0)[:200]:
            assert sorted(record['query']) == sorted(record['answer'])
            assert 4 < len(record['answer']) < 15
    for record in synthetic.records('random_insertion', 'test', 0)[:200]:
        assert ''.join(c for c in record['query'] if c not in ' !./') == record['answer']
    assert all(r['query'][::-1] == r['answer'] for r in synthetic.reversed_words('test', 0))
    shown = synthetic.transposed('train', 0)[:5]
    assert [r['query'] for r in shown] == ['gaot', 'sakne', 'brid', 'fsih', 'cmihp']
    for record in synthetic.transposed('test', 0)[:200]:
        pairs = [
            i
            for i, (a, b) in enumerate(zip(record['query'], record['answer'], strict=True))
            if a != b
        ]
        assert len(pairs) == 2
        assert pairs[1] == pairs[0] + 1


def test_openais_own_files_come_first(tmp_path):
    (tmp_path / 'gpt3_synthetic').mkdir()
    line = json.dumps({'context': '\n\nQ: What is 98 plus 45?\n\nA:', 'completion': ' 143'})
    (tmp_path / 'gpt3_synthetic' / 'two_digit_addition.jsonl').write_text(line)
    found = sets.load('arithmetic_2d_plus', 'test', tmp_path)
    assert found == [{'query': 'What is 98 plus 45?', 'answer': '143'}]
    with pytest.raises(sets.Absent, match=f'^no {tmp_path}/arithmetic_2d_minus/test.jsonl$'):
        sets.load('arithmetic_2d_minus', 'test', tmp_path)
    with pytest.raises(sets.Absent, match=r'^no --config\.data_dir=<folder> is given, to hold ari'):
        sets.load('arithmetic_2d_minus', 'test', '')


def test_a_bad_file_is_told_with_its_place(tmp_path):
    (tmp_path / 'piqa').mkdir()
    path = tmp_path / 'piqa' / 'validation.jsonl'
    path.write_text('{"query": "a", "choices": ["b"], "gold": 0}\n{broken')
    with pytest.raises(errors.InputError, match=r'validation.jsonl:2 is no JSON'):
        sets.load('piqa', 'validation', tmp_path)
    path.write_text('{"queri": "a"}')
    with pytest.raises(errors.InputError, match='not in a layout of docs/evaluate.md'):
        sets.load('piqa', 'validation', tmp_path)


def test_rows_of_every_publisher_become_the_same():
    arc = {
        'question': 'Why?',
        'choices': {'text': ['x', 'y'], 'label': ['A', 'B']},
        'answerKey': 'B',
    }
    assert list(rows.choice(arc)) == [{'query': 'Question: Why?', 'choices': ['x', 'y'], 'gold': 1}]
    copa = {
        'premise': 'It rained.',
        'choice1': 'It was wet.',
        'choice2': 'It was dry.',
        'question': 'effect',
        'label': 0,
    }
    (found,) = rows.choice(copa)
    assert found['query'] == 'It rained therefore'
    assert found['choices'][0] == 'it was wet.'
    wino = {'sentence': 'Ann met Eve and _ smiled.', 'option1': 'Ann', 'option2': 'Eve', 'label': 1}
    (found,) = rows.referents(wino)
    assert found == {
        'context_options': ['Ann met Eve and Ann', 'Ann met Eve and Eve'],
        'continuation': 'smiled.',
        'gold': 1,
    }


@pytest.mark.parametrize(
    ('plain', 'inverse', 'tokenised', 'written'),
    [
        (
            detokenize.wikitext,
            detokenize.wikitext_tokenized,
            ' The " 4 @.@ 5 @-@ inch " gun , ( Mark 2 ) , cost $ 3 @,@ 000 . ',
            ' The "4.5-inch" gun, (Mark 2), cost $3,000. ',
        ),
        (
            detokenize.ptb,
            detokenize.ptb_tokenized,
            " mr. smith 's firm does n't <unk> N ",
            " mr. smith's firm doesn't <unk> N ",
        ),
    ],
)
def test_text_is_made_plain_and_back(plain, inverse, tokenised, written):
    assert plain(tokenised) == written
    assert inverse(written) == tokenised


@pytest.mark.parametrize(
    ('file', 'plain', 'inverse', 'share'),
    [
        ('wikitext2/valid.txt', detokenize.wikitext, detokenize.wikitext_tokenized, 0.03),
        ('ptb/ptb.valid.txt', detokenize.ptb, detokenize.ptb_tokenized, 0.001),
    ],
)
def test_real_lines_invert_or_stay(real_data, file, plain, inverse, share):
    text = (real_data / file).read_text(encoding='utf-8')
    found, kept = detokenize.lines(text, plain, inverse)
    assert kept <= share * len(found)
    for line, new in zip(text.split('\n'), found, strict=True):
        assert new == line or inverse(new) == line


def test_every_set_at_hand_can_be_read(real_data):
    """The folder as it is: each of these is found, with items whose answers are in range."""

    read = []
    for name, task in fewshot.every().items():
        try:
            asked = fewshot.prompts(task, min(task.k, 1), 0, str(real_data), limit=20)
        except sets.Absent:
            continue
        read.append(name)
        for prompt in asked.prompts:
            n = len(prompt.item.contexts or prompt.item.answers)
            assert all(0 <= gold < n for gold in prompt.item.gold)
    assert len(read) >= 45


@pytest.mark.parametrize(
    ('name', 'content', 'said'),
    [
        ('validation.jsonl', b'5\n', ':1 is a int, no object'),
        ('validation.jsonl', b'null\n', ':1 is a NoneType, no object'),
        ('validation.jsonl', b'[' * 10**5, ':1 is no JSON'),
        (
            'validation.jsonl.gz',
            gzip.compress(b'{}' * 99, mtime=0)[:-12] + bytes(12),
            'cannot be read',
        ),
        ('validation.jsonl.gz', b'no gzip', 'cannot be read'),
        ('validation.jsonl', b'{"gold": 0}\n', 'a record of piqa is damaged (KeyError'),
        (
            'validation.jsonl',
            b'{"query": "a", "choices": ["b", "c"], "gold": 2}\n',
            'its answer (2,) is none of 2 choices',
        ),
        (
            'validation.jsonl',
            b'{"query": "a", "choices": ["b", "c"], "gold": true}\n',
            'its answer (True,) is none of 2 choices',
        ),
    ],
)
def test_damaged_items_are_one_line(tmp_path, name, content, said):
    (tmp_path / 'piqa').mkdir()
    (tmp_path / 'piqa' / name).write_bytes(content)
    with pytest.raises(errors.InputError, match=re.escape(said)) as caught:
        fewshot.prompts(fewshot.find('piqa'), 0, 0, str(tmp_path))
    assert '\n' not in str(caught.value)


def test_every_flipped_bit_of_a_zipped_file_is_a_line_or_nothing(tmp_path):
    (tmp_path / 'piqa').mkdir()
    line = json.dumps({'query': 'a', 'choices': ['b', 'c'], 'gold': 1}).encode() + b'\n'
    whole, rng = gzip.compress(line * 20), random.Random(0)
    for _ in range(200):
        changed = bytearray(whole)
        changed[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        (tmp_path / 'piqa' / 'validation.jsonl.gz').write_bytes(changed)
        with contextlib.suppress(errors.InputError):
            found = fewshot.prompts(fewshot.find('piqa'), 0, 0, str(tmp_path))
            assert len(found.prompts) == 20  # as of the header's time
