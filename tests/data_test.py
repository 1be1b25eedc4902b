# SPDX-License-Identifier: Apache-2.0
"""Corpora and token shards."""

import dataclasses
import json

import numpy as np
import pytest

from gptjax import prepare_corpus, prepare_tokens, train
from gptjax.configs import errors
from gptjax.data import collecting, documents, encoding, splits, staging, tokens
from gptjax.data.sets import stdlib
from gptjax.storage import documents as documents_lib
from gptjax.storage import files
from gptjax.text import tokenizer as tokenizer_lib
from tests import helpers

SMALL = documents.Config('x', '', 'text', 'corpus', 2000, 'once', 0, 1)


def nothing(amount):
    del amount


@pytest.fixture
def prepared(tmp_path, corpus_file):
    config = helpers.tiny_config(tmp_path, corpus_file)
    workdir = tmp_path / 'run'
    helpers.prepare(config, workdir)
    return config, workdir


def test_stdlib_is_english_and_imports_nothing():
    found = list(stdlib.documents_of('', 'text'))
    text = '\n'.join(d.text for d in found)
    assert len(found) > 200
    assert 1_000_000 < len(text) < 5_000_000
    assert 'Return' in text
    assert 'antigravity' not in __import__('sys').modules


def test_no_paragraph_of_stdlib_stands_twice():
    """So that none is held out and trained on."""
    paragraphs = [p.strip() for d in stdlib.documents_of('', '') for p in d.text.split('\n\n')]
    assert len(paragraphs) == len(set(paragraphs)) > 10_000


def test_missing_and_empty_corpus(tmp_path, corpus_file):
    config = helpers.tiny_config(tmp_path, corpus_file)
    gone = f'--config.corpus.path={tmp_path}/gone'
    with pytest.raises(errors.InputError, match='no text at .*gone'):
        prepare_corpus.main(helpers.args(config, tmp_path / 'r1', gone))
    (tmp_path / 'empty.txt').write_text('')
    empty = f'--config.corpus.path={tmp_path}/empty.txt'
    with pytest.raises(errors.InputError, match='the corpus is empty'):
        prepare_corpus.main(helpers.args(config, tmp_path / 'r2', empty))
    with pytest.raises(errors.InputError, match='run python -m gptjax.prepare_corpus first'):
        prepare_tokens.main(helpers.args(config, tmp_path / 'r3'))


def test_corpus_goes_on_after_an_interruption(tmp_path, texts, monkeypatch):
    monkeypatch.setattr(collecting, '_PIECE_BYTES', 1000)

    def until(n):
        for i, text in enumerate(texts):
            if i == n:
                raise KeyboardInterrupt
            yield documents.Document(text, '')

    helpers.collect(tmp_path / 'a', until(99), SMALL, {'set': 'x'})
    whole = documents.shards(tmp_path / 'a')
    for stop in (3, 11, 25):
        with pytest.raises(KeyboardInterrupt):
            helpers.collect(tmp_path / 'b', until(stop), SMALL, {'set': 'x'})
    helpers.collect(tmp_path / 'b', until(99), SMALL, {'set': 'x'})
    assert documents.shards(tmp_path / 'b') == whole
    with pytest.raises(errors.InputError, match='begun from another source'):
        helpers.collect(tmp_path / 'b', until(99), SMALL, {'set': 'y'})


def test_tokens_hold_every_document_once(prepared, texts):
    _, workdir = prepared
    tokenizer = tokenizer_lib.load(workdir / 'tokenizer')
    found = []
    for split in tokens.SPLITS:
        token_set = tokens.open_set(workdir / 'tokens', split)
        ids = token_set.read(0, len(token_set)).tolist()
        assert ids[0] == tokenizer.end_of_text
        parts = tokenizer.decode(ids).split(tokenizer_lib.END_OF_TEXT)[1:]
        found += parts
        if split == 'valid':
            table = token_set.table()
            assert table[:, 1].tolist() == [len(p.encode()) for p in parts]
            assert table[:, 2].tolist() == [len(p.split()) for p in parts]
            assert table[:, 0].sum() == len(token_set)
            assert 1 <= len(parts) < len(texts) / 2
    assert sorted(found) == sorted(texts)


def test_tokens_are_the_same_for_any_number_of_processes(tmp_path, corpus_file):
    config = helpers.tiny_config(tmp_path, corpus_file)
    small = '--config.corpus.shard_bytes=5000'
    read = []
    for processes in (1, 2):
        workdir = tmp_path / f'p{processes}'
        helpers.prepare(config, workdir, small, f'--config.tokens.processes={processes}')
        manifest = json.loads((workdir / 'tokens' / 'manifest.json').read_text())
        assert len(manifest['splits']['train']) > 3
        read.append(manifest)
    assert read[0] == read[1]


def test_tokens_go_on_after_an_interruption(prepared, monkeypatch):
    config, workdir = prepared
    manifest = workdir / 'tokens' / 'manifest.json'
    before = manifest.read_text()
    manifest.unlink()
    called = []
    monkeypatch.setattr(encoding, 'write_shard', lambda *a: called.append(a))
    prepare_tokens.main(helpers.args(config, workdir))
    assert not called  # the shard's own record was enough
    assert manifest.read_text() == before


def test_other_tokenizer_or_truncated_shard(prepared):
    config, workdir = prepared
    with pytest.raises(errors.InputError, match='was begun from another valid_fraction; remove'):
        prepare_tokens.main(helpers.args(config, workdir, '--config.tokens.valid_fraction=0.3'))
    shard = workdir / 'tokens' / 'train-00000.bin'
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(errors.InputError, match='where its manifest says'):
        tokens.open_set(workdir / 'tokens', 'train')


def test_a_single_document_is_cut(tmp_path):
    (tmp_path / 'one.txt').write_text('0123456789' * 100)
    config = helpers.tiny_config(tmp_path, tmp_path / 'one.txt')
    helpers.prepare(config, tmp_path / 'run', '--config.tokens.valid_fraction=0.1')
    held_out = tokens.open_set(tmp_path / 'run' / 'tokens', 'valid')
    assert len(held_out) == 1 + 100
    assert len(tokens.open_set(tmp_path / 'run' / 'tokens', 'train')) == 1 + 900


def test_a_few_documents_always_hold_something_out(tmp_path):
    for i in range(3):
        (tmp_path / f'{i}.txt').write_text(f'{i}' * 1000)
    config = helpers.tiny_config(tmp_path, tmp_path)
    flags = ('--config.tokens.valid_fraction=0.001', '--config.corpus.shard_bytes=500')
    helpers.prepare(config, tmp_path / 'run', *flags)
    assert len(tokens.open_set(tmp_path / 'run' / 'tokens', 'valid')) == 1 + 3


@pytest.mark.parametrize('text', [f'{i} some text' * 50 for i in range(8)])
def test_a_single_document_is_cut_whatever_its_hash(tmp_path, text):
    (tmp_path / 'one.txt').write_text(text)
    config = helpers.tiny_config(tmp_path, tmp_path / 'one.txt')
    helpers.prepare(config, tmp_path / 'run', '--config.tokens.valid_fraction=0.5')
    sizes = [len(tokens.open_set(tmp_path / 'run' / 'tokens', s)) for s in tokens.SPLITS]
    assert sum(sizes) == len(text) + 2
    assert abs(sizes[0] - sizes[1]) <= 1


def test_the_tokenizer_never_sees_what_is_held_out(prepared, texts):
    _, workdir = prepared
    seen = set(splits.training_texts(workdir / 'corpus', 0.15, 10**9))
    held_out = set(texts) - seen
    assert 0 < len(held_out) < len(texts) / 2


def test_an_empty_corpus_that_was_mended_is_taken(tmp_path):
    (tmp_path / 'a.txt').write_text('')
    config = helpers.tiny_config(tmp_path, tmp_path / 'a.txt')
    with pytest.raises(errors.InputError, match='the corpus is empty'):
        prepare_corpus.main(helpers.args(config, tmp_path / 'run'))
    (tmp_path / 'a.txt').write_text('one ' * 100)
    helpers.prepare(config, tmp_path / 'run')
    assert len(tokens.open_set(tmp_path / 'run' / 'tokens', 'train')) > 1


def test_a_changed_corpus_is_noticed(tmp_path):
    (tmp_path / 'texts').mkdir()
    (tmp_path / 'texts' / 'a.txt').write_text('one ' * 100)
    config = helpers.tiny_config(tmp_path, tmp_path / 'texts')
    prepare_corpus.main(helpers.args(config, tmp_path / 'run'))
    prepare_corpus.main(helpers.args(config, tmp_path / 'run'))
    (tmp_path / 'texts' / 'b.txt').write_text('two ' * 100)
    said = r'begun from another source \(what is in .*texts. has changed since\); remove'
    with pytest.raises(errors.InputError, match=said):
        prepare_corpus.main(helpers.args(config, tmp_path / 'run'))


def test_an_id_beyond_the_vocabulary_is_one_line(tmp_path, corpus_file):
    """In a shard of the size that its manifest says, for whoever reads it."""
    config = helpers.tiny_config(tmp_path, corpus_file)
    helpers.prepare(config, tmp_path / 'run')
    shard = np.memmap(tmp_path / 'run' / 'tokens' / 'train-00000.bin', np.uint16, mode='r+')
    shard[40:] = 300
    shard.flush()
    manifest = tmp_path / 'run' / 'tokens' / 'manifest.json'
    said = documents_lib.read(manifest, dict, '')
    said['splits']['train'][0]['sha256'] = files.sha256(manifest.parent / 'train-00000.bin')
    documents_lib.write(manifest, said)
    token_set = tokens.open_set(tmp_path / 'run' / 'tokens', 'train')
    assert len(token_set.read(0, 40)) == 40
    said = 'tokens, train: the id 300 is beyond the 257 of manifest'
    with pytest.raises(errors.InputError, match=said) as caught:
        token_set.read(0, 41)
    assert '\n' not in str(caught.value)
    with pytest.raises(errors.InputError, match=said):
        train.main(helpers.args(config, tmp_path / 'run'))


def test_reading_across_shards(tmp_path, corpus_file):
    config = helpers.tiny_config(tmp_path, corpus_file)
    helpers.prepare(config, tmp_path / 'a', '--config.corpus.shard_bytes=1000')
    token_set = tokens.open_set(tmp_path / 'a' / 'tokens', 'train')
    whole = token_set.read(0, len(token_set))
    assert len(whole) == len(token_set)
    rng = np.random.default_rng(0)
    for start, length in rng.integers(1, len(whole), (200, 2)).tolist():
        assert token_set.read(start, length).tolist() == whole[start : start + length].tolist()


def test_staging_from_a_remote_file_system(prepared, tmp_path):
    import fsspec

    _, workdir = prepared
    remote = fsspec.filesystem('memory')
    remote.put(str(workdir / 'tokens'), '/bucket/tokens', recursive=True)
    for split in tokens.SPLITS:
        local = staging.locate('memory://bucket/tokens', tmp_path, str(tmp_path), nothing, split)
        here, there = tokens.open_set(local, split), tokens.open_set(workdir / 'tokens', split)
        assert here.read(0, len(here)).tolist() == there.read(0, len(there)).tolist()
    with remote.open('/bucket/tokens/train-00000.bin', 'r+b') as f:
        f.write(b'\xff\xff')
    with pytest.raises(errors.InputError, match='does not have the hash'):
        staging.locate('memory://bucket/tokens', tmp_path, str(tmp_path / 'b'), nothing, 'train')
    with pytest.raises(errors.InputError, match='cannot read token shards'):
        staging.locate('memory://bucket/none', tmp_path, str(tmp_path), nothing, 'train')


@pytest.mark.slow
def test_a_tfds_set_without_tensorflow(tmp_path, monkeypatch):
    tfds = pytest.importorskip('tensorflow_datasets')
    from gptjax.data.sets import tfds as tfds_set

    class TinyText(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version('1.0.0')

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict({'text': tfds.features.Text()})
            )

        def _split_generators(self, dl_manager):
            return {'train': self._generate_examples(5), 'test': self._generate_examples(2)}

        def _generate_examples(self, n):
            for i in range(n):
                yield i, {'text': f'text {i} 한국어'}

    monkeypatch.setattr(tfds, 'builder', lambda name, **kw: TinyText(data_dir=str(tmp_path), **kw))
    found = list(tfds_set.documents_of('tiny_text', 'text'))
    assert sorted(d.text for d in found if d.split == 'train') == [
        f'text {i} 한국어' for i in range(5)
    ]
    assert sum(d.split == 'valid' for d in found) == 2
    with pytest.raises(errors.InputError, match="no field 'body'"):
        list(tfds_set.documents_of('tiny_text', 'body'))
    assert 'tensorflow' not in __import__('sys').modules


def test_held_out_text_of_a_large_corpus_is_capped():
    config = tokens.Config('tokens', 0.05, 2**26, 1)
    assert config.held_out(2**20) == config.held_out(0) == 0.05
    assert config.held_out(2**36) * 2**36 == 2**26
    assert dataclasses.replace(config, valid_bytes=0).held_out(2**36) == 0.05
