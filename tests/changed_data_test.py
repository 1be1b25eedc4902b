# SPDX-License-Identifier: Apache-2.0
"""Token and corpus shards that were changed, by whom and whenever: hashes, names, records."""

import json
import os

import pytest

from gptjax import prepare_corpus, prepare_tokens, train
from gptjax.configs import errors
from gptjax.data import collecting, documents, staging, tokens
from gptjax.storage import documents as documents_lib
from gptjax.storage import files
from tests import helpers


@pytest.fixture
def prepared(tmp_path, corpus_file):
    return helpers.prepared(tmp_path, corpus_file)


@pytest.mark.parametrize('verify', ['changed', 'always', 'never'])
def test_a_byte_that_was_changed_is_found_when_asked_for(prepared, verify):
    folder = prepared[1] / 'tokens'
    tokens.open_set(folder, 'train', verify)
    shard = folder / 'train-00000.bin'
    content = bytearray(shard.read_bytes())
    content[7] ^= 1
    shard.write_bytes(content)
    if verify == 'never':
        tokens.open_set(folder, 'train', verify)
    else:
        with pytest.raises(errors.InputError, match='train-00000.bin does not have the bytes'):
            tokens.open_set(folder, 'train', verify)
    victim = folder / 'valid-00000.documents.npy'
    victim.write_bytes(victim.read_bytes()[:-1] + b'\x01')
    with pytest.raises(errors.InputError, match='documents.npy'):  # held-out ones always
        tokens.open_set(folder, 'valid', verify)


def test_a_shard_that_changes_while_it_is_read(prepared):
    folder = prepared[1] / 'tokens'
    token_set = tokens.open_set(folder, 'train')
    token_set.read(0, 10)
    shard = folder / 'train-00000.bin'
    with shard.open('r+b') as f:
        f.write(b'\0\0\0\0')
    os.utime(shard, ns=(1, 1))
    with pytest.raises(errors.InputError, match='was changed while it was read'):
        token_set.read(0, 10)


@pytest.mark.parametrize(
    ('field', 'value'), [('n_vocab', 0), ('end_of_text', 3), ('dtype', '>u2'), ('format', 2)]
)
def test_a_manifest_of_before_is_held_against_its_tokenizer(prepared, field, value):
    config, workdir = prepared
    path = workdir / 'tokens' / 'manifest.json'
    said = documents_lib.read(path, dict, '')
    path.write_text(json.dumps(said, indent=1))  # without a checksum, as it was once
    tokens.open_set(path.parent, 'train')
    path.write_text(json.dumps(said | {field: value}, indent=1))
    with pytest.raises(errors.InputError, match='manifest.json'):
        train.main(helpers.args(config, workdir))


@pytest.mark.parametrize('name', ['../x', '/etc/passwd', '', '..', 'a/b'])
def test_names_lead_nowhere_else(prepared, tmp_path, name):
    import fsspec

    folder = prepared[1] / 'tokens'
    said = documents_lib.read(folder / 'manifest.json', dict, '')
    said['splits']['train'][0]['name'] = name
    documents_lib.write(folder / 'manifest.json', said)
    with pytest.raises(errors.InputError, match='not in its folder'):
        tokens.open_set(folder, 'train')
    remote = fsspec.filesystem('memory')
    remote.put(str(folder), '/hostile/tokens', recursive=True)
    with pytest.raises(errors.InputError, match='not in its folder'):
        staging.locate('memory://hostile/tokens', tmp_path, 'cache', lambda amount: None, 'train')


def test_links_of_our_names_are_not_followed(tmp_path):
    (tmp_path / 'outside').write_text('untouched')
    (tmp_path / f'a.json.{os.getpid()}.partial').symlink_to(tmp_path / 'outside')
    files.replace(tmp_path / 'a.json', 'x')
    (tmp_path / 'b.jsonl').symlink_to(tmp_path / 'outside')
    with pytest.raises(OSError, match='b.jsonl'):
        files.open_(tmp_path / 'b.jsonl', 'a')
    assert (tmp_path / 'outside').read_text() == 'untouched'


def test_a_record_that_says_nothing_is_none(prepared):
    config, workdir = prepared
    folder = workdir / 'tokens'
    whole = {path.name: path.read_bytes() for path in folder.glob('*-*')}
    for content in ('{}', '{"train": null}', None):
        (folder / 'manifest.json').unlink()
        record = folder / 'record-00000.json'
        said = documents_lib.read(record, dict, '')
        if content is None:  # of another file, with a hash that is right
            said['valid'] |= {'table': 'train-00000.bin', 'table_sha256': said['train']['sha256']}
            documents_lib.write(record, said)
        else:
            record.write_text(content)
        prepare_tokens.main(helpers.args(config, workdir))
        assert {path.name: path.read_bytes() for path in folder.glob('*-*')} == whole


def test_a_damaged_corpus_shard_and_a_stop_mix_no_documents(tmp_path, corpus_file, monkeypatch):
    """Shards behind the damaged one are of another cut: after a stop they are not believed."""
    config, workdir = helpers.tiny_config(tmp_path, corpus_file), tmp_path / 'run'
    args = helpers.args(config, workdir, '--config.corpus.shard_bytes=3000')
    prepare_corpus.main(args)
    folder = workdir / 'corpus'
    texts = [d.text for s in documents.shards(folder) for d in documents.read(folder, s)]
    (folder / 'manifest.json').unlink()
    victim = folder / 'documents-00001.jsonl'
    victim.write_bytes(victim.read_bytes()[:-9])
    larger = helpers.args(config, workdir, '--config.corpus.shard_bytes=6000')
    real, left = collecting._ShardWriter._begin, [1]

    def stopped(*args):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return real(*args)

    monkeypatch.setattr(collecting._ShardWriter, '_begin', stopped)
    with pytest.raises(KeyboardInterrupt):
        prepare_corpus.main(larger)
    monkeypatch.undo()
    prepare_corpus.main(larger)
    assert [d.text for s in documents.shards(folder) for d in documents.read(folder, s)] == texts
