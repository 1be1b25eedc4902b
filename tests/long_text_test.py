# SPDX-License-Identifier: Apache-2.0
"""Documents of any length: held in parts, encoded in pieces, with the tokens of the whole."""

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from gptjax.configs import base
from gptjax.data import documents, encoding, splits, tokens
from gptjax.data.sets import files
from gptjax.evals import contamination
from gptjax.text import cuts, tokenizer, vocabulary
from gptjax.text import tokenizer as tokenizer_lib
from tests import helpers

ATOMS = (
    *('the', "cat's", 'ITʼS', 'x’y', 'Ǆ', 'ﬁn', 'e\u0301', 'é', 'क़', '\u0301', 'İ', 'ß', 'नमस्ते'),
    *('中文字', 'ไทย', '한국', '1234567', '٣٤', '½', 'Ⅷ', '_', '__a', '#', '...', '?!', '\u200d'),
    *('👩\u200d👧', '😀', '\ufeff', ' ', '  ', '\n', '\n\n', ' \n', '\t', '\xa0', '\u3000', '\r'),
    *('\u2028', ',', '，', '。', ';', '. ', "'s", "'LL", "'", 'don', '<|endoftext|>', 'a' * 40),
    *('\x00', '\x7f'),
)


def text_of(seed: int, count: int = 400) -> str:
    """Hard to cut: atoms of all kinds, with and without spaces."""
    rng = np.random.default_rng(seed)
    return ''.join(ATOMS[i] for i in rng.integers(0, len(ATOMS), count))


def split(pattern: str) -> pre_tokenizers.Sequence:
    first = pre_tokenizers.Split(tokenizers.Regex(pattern), 'isolated')
    return pre_tokenizers.Sequence(
        [first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


PATTERNS = sorted(cuts.PATTERNS)
WORDS = {
    'GPT-2': pre_tokenizers.ByteLevel(add_prefix_space=False),
    'GPT-2 with a space': pre_tokenizers.ByteLevel(add_prefix_space=True),
    'SmolLM2': pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    ),
    **{f'pattern {n}': split(pattern) for n, pattern in enumerate(PATTERNS)},
}


def trained(words, **more) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = words, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=['<|endoftext|>'],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    for name, value in more.items():
        setattr(backend, name, value)
    backend.train_from_iterator([text_of(seed) for seed in range(20)], trainer)
    return backend


@pytest.mark.parametrize('form', [None, 'NFC', 'NFKD'])
@pytest.mark.parametrize('words', WORDS)
def test_pieces_have_the_tokens_of_the_whole(words, form):
    normalizer = {'normalizer': getattr(normalizers, form)()} if form else {}
    found = tokenizer_lib.Subwords(trained(WORDS[words], **normalizer))
    assert (found.cut_before == ' ') == ('space' in words or form is not None)
    for seed in range(100, 180):
        text = text_of(seed)
        rng = np.random.default_rng(seed)
        ends = [0, *sorted(rng.integers(0, len(text), 5).tolist()), len(text)]
        parts = [text[a:b] for a, b in zip(ends, ends[1:], strict=False)]
        pieces = list(cuts.pieces(parts, found.cut_before, int(rng.integers(1, 60))))
        assert ''.join(pieces) == text
        assert len(pieces) > 1
        ids = [i for each in found.encode_all(pieces) for i in each]
        assert ids == found.encode(text)


@pytest.mark.parametrize(
    'change',
    [
        lambda t: setattr(t, 'pre_tokenizer', pre_tokenizers.Whitespace()),
        lambda t: setattr(t, 'pre_tokenizer', split('.')),
        lambda t: setattr(t, 'normalizer', normalizers.Lowercase()),
        lambda t: t.add_tokens(['New York']),
        lambda t: t.add_tokens([tokenizers.AddedToken('the', rstrip=True)]),
    ],
)
def test_what_looks_beyond_words_is_not_cut(change):
    backend = trained(WORDS['GPT-2'])
    change(backend)
    assert tokenizer_lib.Subwords(backend).cut_before == ''
    assert list(cuts.pieces(['a b ', 'c d'], '', 1)) == ['a b c d']


def test_a_text_without_a_place_to_cut_is_one_piece():
    parts = ['1' * 1000] * 3000  # which is looked through once
    assert list(cuts.pieces([*parts, 'a b'], ' ', 100)) == ['1' * 3_000_000 + 'a', ' b']


def config(**fields) -> documents.Config:
    return documents.Config(**(dict(base.get_config().corpus) | fields))


def corpus_of(folder, path, **fields) -> list[documents.Text]:
    found = files.documents_of(str(path), 'text')
    left = helpers.collect(folder, found, config(**fields), {'path': str(path)})
    return left, [t for s in documents.shards(folder) for t in documents.read(folder, s)]


@pytest.mark.parametrize('part', [1, 7, 64, 10**6])
def test_files_are_read_in_parts(tmp_path, monkeypatch, part):
    """Marks, line ends, repeated texts, blank ones, and bytes that are no text."""
    monkeypatch.setattr(files, '_PART', part)
    texts = [text_of(seed, 60).replace('\r', '').replace('\ufeff', '') for seed in range(4)]
    for number, text in enumerate([*texts, texts[1], ' \n' * 50]):
        content = text.replace('\n', '\r\n').encode('utf-8-sig' if number % 2 else 'utf-8')
        (tmp_path / f'{number}.txt').write_bytes(content)
    (tmp_path / '9.txt').write_bytes('a é and\n'.encode() * 30 + b'\xff' + b'and so on\n' * 30)
    left, found = corpus_of(tmp_path / 'corpus', tmp_path / '*.txt', max_bad=1)
    assert left == {'bad': 1, 'empty': 1, 'repeated': 1}
    assert [text.text for text in found] == texts
    assert [text.size for text in found] == [len(text.encode()) for text in texts]
    bad = (tmp_path / 'corpus' / documents.BAD).read_text()
    assert 'byte 0xff at character 240' in bad
    content = (tmp_path / 'corpus' / 'documents-00000.jsonl').read_bytes()
    assert content.count(b'"more": true') + 4 == content.count(b'\n')
    assert (content.count(b'\n') > 4) == (part < 10**6)


@pytest.mark.parametrize('fraction', [0.0, 0.15, 0.6])
@pytest.mark.parametrize('texts', [1, 3])
def test_shards_of_long_texts_are_those_of_whole_ones(tmp_path, monkeypatch, texts, fraction):
    """Byte for byte, the table of held-out documents among them."""
    bpe = tokenizer_lib.Subwords(trained(WORDS['GPT-2']))
    for seed in range(texts):
        (tmp_path / f'{seed}.txt').write_text(text_of(seed, 3000), newline='')
    written = []
    for part, piece, batch in ((10**7, 10**7, 10**7), (1000, 100, 777)):
        monkeypatch.setattr(files, '_PART', part)
        monkeypatch.setattr(encoding, '_PIECE', piece)
        monkeypatch.setattr(encoding, '_BATCH', batch)
        folder, out = tmp_path / f'corpus{part}', tmp_path / f'tokens{part}'
        out.mkdir()
        corpus_of(folder, tmp_path / '*.txt')
        for index, shard in enumerate(documents.shards(folder)):
            encoding.write_shard(out, index, splits.split(folder, shard, fraction), bpe)
            assert tokens.records(out, index)
        written.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert written[0] == written[1]
    assert ('valid-00000.documents.npy' in written[0]) == (fraction > 0)


def test_no_more_than_a_batch_is_encoded_at_once(tmp_path, monkeypatch):
    sizes = []

    class Counting(tokenizer.Bytes):
        def encode_all(self, texts):
            sizes.append((max(map(len, texts), default=0), sum(map(len, texts))))
            return super().encode_all(texts)

    (tmp_path / 'a.txt').write_text('some words, in lines\n' * 10**5)
    corpus_of(tmp_path / 'corpus', tmp_path / 'a.txt')
    (shard,) = documents.shards(tmp_path / 'corpus')
    done = []
    texts = splits.split(tmp_path / 'corpus', shard, 0.0)
    encoding.write_shard(tmp_path, 0, texts, Counting(), done.append)
    assert sum(done) == shard.text_bytes  # and is told all along
    assert max(done) <= encoding._PIECE
    assert max(size for size, _ in sizes) <= encoding._PIECE
    assert max(size for _, size in sizes) < encoding._BATCH + encoding._PIECE


@pytest.mark.parametrize('document', [300, 30_000])
def test_a_vocabulary_is_made_from_a_sample_of_the_whole_corpus(tmp_path, monkeypatch, document):
    """Of the size that is asked for, from everywhere alike, without what is held out."""
    monkeypatch.setattr(splits, '_PART', 200)
    drawn = np.random.default_rng(0)
    for number in range(300_000 // document):
        words = drawn.integers(10**6, 10**7, document // 8)
        (tmp_path / f'{number:04}.txt').write_text('a ' + ' b '.join(map(str, words)))
    left, found = corpus_of(tmp_path / 'corpus', tmp_path / '*.txt', shard_bytes=100_000)
    assert not any(left.values())
    whole = ''.join(text.text for text in found)
    held = [
        text.text
        for shard in documents.shards(tmp_path / 'corpus')
        for text in splits.split(tmp_path / 'corpus', shard, 0.2)
        if text.split == 'valid'
    ]
    sample = list(splits.training_texts(tmp_path / 'corpus', 0.2, 60_000))
    assert sample == list(splits.training_texts(tmp_path / 'corpus', 0.2, 60_000))
    assert 54_000 < sum(map(len, sample)) < 66_000
    assert not any(part in text for part in sample for text in held)
    every = ''.join(splits.training_texts(tmp_path / 'corpus', 0.2, 10**9))
    assert len(every) + len(''.join(held)) == len(whole)
    places = [every.index(part) for part in sample]
    assert places == sorted(places)
    thirds = np.histogram(places, 3, (0, len(every)))[0]
    assert thirds.min() > 0.6 * thirds.max()


@pytest.mark.parametrize('kind', ['bpe', 'sentencepiece'])
def test_one_line_makes_the_vocabulary_that_many_make(caplog, kind):
    """SentencePiece leaves out lines of more than 4,192 bytes, and says nothing."""
    words = text_of(1, 30_000).replace('\x00', '').split()
    fields = {'kind': kind, 'path': '', 'dir': '', 'n_vocab': 600, 'sample_bytes': 10**9}
    made = [
        vocabulary.train(vocabulary.Config(**fields), [separator.join(words)])
        for separator in (' ', '\n')
    ]
    assert [each.n_vocab for each in made] == [600, 600]
    assert 'came out' not in caplog.text
    few = vocabulary.train(vocabulary.Config(**fields), ['a b a b'])
    assert few.n_vocab < 300
    assert f'only {few.n_vocab} ids of n_vocab = 600 came out' in caplog.text


@pytest.mark.parametrize('seed', range(8))
def test_overlaps_are_found_in_one_pass_over_parts(tmp_path, monkeypatch, seed):
    """Of tasks of several lengths, wherever parts and shards end; against each text whole."""
    monkeypatch.setattr(files, '_PART', 37)
    rng = np.random.default_rng(seed)

    def said(count):
        return ' '.join(f'W{i},' for i in rng.integers(0, 2, count))

    for number in range(4):
        (tmp_path / f'{number}.txt').write_text(said(400).replace(' ', '\n', 9))
    left, found = corpus_of(tmp_path / 'corpus', tmp_path / '*.txt', shard_bytes=2000)
    assert left == {'bad': 0, 'empty': 0, 'repeated': 0}
    tasks = [[said(n) for _ in range(30)] for n in (5, 9, 11, 40)]
    overlaps = contamination.Overlaps(tasks, str(tmp_path / 'corpus'))
    whole = [contamination._words(text.text) for text in found]
    dirty = 0
    for items, n in zip(tasks, (8, 9, 11, 13), strict=True):
        there = {gram for words in whole for gram in contamination._grams(words, n)}
        grams = [contamination._grams(contamination._words(item), n) for item in items]
        expected = [not there.isdisjoint(each) for each in grams]
        assert overlaps.dirty(items) == expected
        dirty += sum(expected)
    assert 0 < dirty < 120
