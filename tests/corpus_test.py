# SPDX-License-Identifier: Apache-2.0
"""What users bring as text: every kind of file, whatever is wrong in it, and what is held out."""

import csv
import gzip
import io
import json
import random
import sys

import pytest
import zstandard

from gptjax import prepare_corpus
from gptjax.configs import errors
from gptjax.data import documents, splits
from gptjax.data.sets import files
from tests import helpers

TEXTS = ['first, "quoted"', '둘째\tdocument', 'third\nof two lines', '=4+4']
PACKED = {
    '': lambda b: b,
    '.gz': lambda b: gzip.compress(b, mtime=0),
    '.zst': zstandard.ZstdCompressor().compress,
}


def written(kind: str) -> bytes:
    """Four documents, the last one held out where the kind can say so."""
    records = [{'text': text, 'n': i} for i, text in enumerate(TEXTS)]
    records[-1]['split'] = 'valid'
    if kind in ('txt', 'md'):
        return TEXTS[2].encode()
    if kind in ('jsonl', 'ndjson'):
        return '\n'.join(map(json.dumps, records)).encode()
    if kind == 'json':
        return json.dumps(records, indent=1, ensure_ascii=False).encode()
    if kind == 'parquet':
        pyarrow = pytest.importorskip('pyarrow')
        from pyarrow import parquet

        out = io.BytesIO()
        parquet.write_table(pyarrow.Table.from_pylist([{'split': ''} | r for r in records]), out)
        return out.getvalue()
    out = io.StringIO()
    table = csv.DictWriter(out, ['n', 'text', 'split'], delimiter='\t' if kind == 'tsv' else ',')
    table.writeheader()
    table.writerows(records)
    return out.getvalue().encode()


def read(path, text_field='text'):
    return list(files.documents_of(str(path), text_field))


@pytest.mark.parametrize('packed', PACKED)
@pytest.mark.parametrize('kind', [ending[1:] for ending in files._READERS])
def test_every_kind_in_any_case(tmp_path, kind, packed):
    content = written(kind)
    for ending in (f'{kind}{packed}', f'{kind}{packed}'.upper(), f'v1.0.{kind}{packed}'):
        path = tmp_path / f'some.{ending}'
        path.write_bytes(PACKED[packed](content))
        found = read(path)
        if kind in ('txt', 'md'):
            assert found == [documents.Document(TEXTS[2], '')]
        else:
            assert [d.text for d in found] == TEXTS
            assert [d.split for d in found] == ['', '', '', 'valid']
        path.unlink()


@pytest.mark.parametrize('encoding', ['utf-8-sig', 'utf-16', 'utf-32'])
@pytest.mark.parametrize('kind', ['txt', 'jsonl', 'json', 'csv', 'tsv'])
def test_marks_and_line_ends_are_no_text(tmp_path, kind, encoding):
    path = tmp_path / f'a.{kind}'
    plain = written(kind).decode()
    path.write_text(plain.replace('\r\n', '\n').replace('\n', '\r\n'), encoding, newline='')
    assert [d.text for d in read(path)] == ([TEXTS[2]] if kind == 'txt' else TEXTS)


def test_json_of_every_shape(tmp_path):
    for content in (
        '{"text": "a"}',
        '["a"]',
        '[{"text": "a"}]',
        '\n{"text": "a"}\n\n{"text": "b"}\n',
    ):
        (tmp_path / 'a.json').write_text(content)
        assert [d.text for d in read(tmp_path)] == ['a', 'b'][: content.count(':') or 1]


def test_a_folder_is_read_without_what_is_hidden_and_the_rest_is_told(tmp_path, caplog):
    for name in ('b.txt', 'sub/a.TXT', 'c.pdf', 'd.pdf', 'e', 'x.tar.gz'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    for name in ('.git/x.txt', '.hidden.txt', 'sub/.cache/y.txt'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('hidden')
    assert [d.text for d in read(tmp_path)] == ['b.txt', 'sub/a.TXT']
    assert 'of other kinds: 2 .pdf, 1 without an ending, 1 .tar' in caplog.text
    assert [d.text for d in read(tmp_path / '*.txt')] == ['b.txt']
    assert [d.text for d in read(tmp_path / '.hidden.txt')] == ['hidden']  # it was asked for
    before = files.identity(str(tmp_path))
    (tmp_path / '.git' / 'x.txt').write_text('changed')
    assert files.identity(str(tmp_path)) == before
    with pytest.raises(
        errors.InputError, match=r'only 1 \.pdf; .* of the kinds \.txt, \.md, \.jsonl'
    ):
        read(tmp_path / 'c.pdf')


BAD = [  # (file, content, where, what is said)
    ('a.txt', b'ok \xff\xfe', 'a.txt', 'byte 0xff at character 3'),
    ('a.jsonl', b'{"text": "x"}\n{broken\n', 'a.jsonl line 2', 'is no JSON'),
    ('a.jsonl', b'{"text": "x"}\n{"text": "\xe9"}', 'a.jsonl line 2', 'byte 0xe9 at character 0'),
    ('a.jsonl', b'\n{"body": "x"}\n', 'a.jsonl line 2', "no text in field 'text'"),
    ('a.jsonl', b'"x"\n', 'a.jsonl line 1', "no text in field 'text'"),
    ('a.jsonl', b'{"text": 3}\n', 'a.jsonl line 1', '--config.corpus.text_field'),
    ('a.jsonl', b'{"text": "\\ud800"}\n', 'a.jsonl line 1', 'U+D800 at character 0'),
    ('a.jsonl', b'[' * 100_000 + b'\n', 'a.jsonl line 1', 'is no JSON'),
    ('a.json', b'[{"text": "x"}, 3]', 'a.json item 2', 'no text in field'),
    ('a.json', b'{"text": "x"}\n{broken', 'a.json line 2', 'is no JSON'),
    ('a.json', b'', 'a.json', 'it is no JSON'),
    ('a.csv', b'body,n\nx,1\n', 'a.csv', "no column 'text' but: 'body', 'n'"),
    ('a.csv', b'n,text\n1,x\n2\n', 'a.csv line 3', 'no text in field'),
    ('a.csv', b'text\n\xff\n', 'a.csv line 2', 'byte 0xff'),
    ('a.csv', b'', 'a.csv', 'no column'),
    ('a.parquet', b'PAR1', 'a.parquet', 'cannot be read'),
    ('a.txt.gz', gzip.compress(b'text' * 99, mtime=0)[:-9], 'a.txt.gz', 'cannot be read'),
    ('a.txt.gz', b'text', 'a.txt.gz', 'cannot be read'),
    ('a.jsonl.zst', b'text', 'a.jsonl.zst', 'cannot be read'),
    ('a.txt', b'\xff\xfe\x00', 'a.txt', 'cannot be read'),
]


@pytest.mark.parametrize(('name', 'content', 'where', 'said'), BAD)
def test_what_is_bad_is_set_aside_and_the_rest_is_read(tmp_path, name, content, where, said):
    (tmp_path / 'in').mkdir()
    (tmp_path / 'in' / name).write_bytes(content)
    (tmp_path / 'in' / 'z.txt').write_text('the rest')
    corpus = (f'--config.corpus.path={tmp_path}/in', '--config.corpus.set=files')
    config = helpers.tiny_config(tmp_path, tmp_path / 'in')
    prepare_corpus.main(helpers.args(config, tmp_path / 'out', *corpus))
    folder = tmp_path / 'out' / 'corpus'
    (bad,) = map(json.loads, (folder / documents.BAD).read_text().splitlines())
    assert bad['where'] == f'{tmp_path}/in/{where}'
    assert said in bad['why']
    texts = [d.text for s in documents.shards(folder) for d in documents.read(folder, s)]
    assert texts[-1] == 'the rest'
    assert json.loads((folder / 'manifest.json').read_text())['left_out']['bad'] == 1
    none = helpers.args(config, tmp_path / 'none', *corpus, '--config.corpus.max_bad=0')
    with pytest.raises(errors.InputError, match='More than --config.corpus.max_bad=0') as caught:
        prepare_corpus.main(none)
    assert str(caught.value).startswith(f'{tmp_path}/in/{where}')


@pytest.mark.parametrize('seed', range(6))
def test_any_bytes_are_documents_or_bad(tmp_path, seed):
    """Files cut, flipped, mixed: every kind ends in documents and records set aside."""
    rng = random.Random(seed)
    for kind in files._READERS:
        for packed, pack in PACKED.items():
            content = bytearray(pack(written(kind[1:])))
            for _ in range(rng.randrange(1, 6)):
                content[rng.randrange(len(content))] = rng.randrange(256)
            content = content[: rng.randrange(len(content) + 1)]
            path = tmp_path / f'a{kind}{packed}'
            path.write_bytes(content)
            for found in read(path):
                assert isinstance(found, documents.Document | documents.Bad)
                if isinstance(found, documents.Document):
                    found.text.encode()
                else:
                    assert str(path) in found.where


def test_a_documents_rules(tmp_path, caplog):
    """White space alone is no document, an exact repetition is none by default."""
    rows = ['one', ' \n\t', 'two', 'one', '', 'One', 'one ']
    (tmp_path / 'in.json').write_text(json.dumps(rows))
    config = helpers.tiny_config(tmp_path, tmp_path / 'in.json')
    for how, expected in (
        ('once', ['one', 'two', 'One', 'one ']),
        ('all', [r for r in rows if r.strip()]),
    ):
        flags = (f'--config.corpus.repeated={how}', f'--config.corpus.dir={how}')
        prepare_corpus.main(helpers.args(config, tmp_path / 'run', *flags))
        folder = tmp_path / 'run' / how
        texts = [d.text for s in documents.shards(folder) for d in documents.read(folder, s)]
        assert texts == expected
        assert not (folder / documents.BAD).exists()
    assert '2 documents without text; 1 documents that repeat another one exactly' in caplog.text


def test_a_corpus_of_before_these_rules_is_done(tmp_path, caplog):
    (tmp_path / 'in.json').write_text('["one", "one", "two"]')
    config = helpers.tiny_config(tmp_path, tmp_path / 'in.json')
    args = helpers.args(config, tmp_path / 'run')
    prepare_corpus.main(args)
    path = tmp_path / 'run' / 'corpus' / 'manifest.json'
    manifest = json.loads(path.read_text())
    del manifest['source']['repeated'], manifest['left_out'], manifest['checksum']
    path.write_text(json.dumps(manifest))
    caplog.set_level('INFO')
    caplog.clear()
    prepare_corpus.main(args)
    assert 'is done already' in caplog.text
    manifest['source']['text_field'] = 'body'
    path.write_text(json.dumps(manifest))
    assert not documents.is_finished(path.parent, manifest['source'] | {'text_field': 'text'})


def test_what_is_missing_for_a_kind_of_file_ends_the_program(tmp_path, monkeypatch):
    (tmp_path / 'a.parquet').write_bytes(b'PAR1')
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    with pytest.raises(errors.InputError, match=r"pip install 'gptjax\[parquet\]'"):
        read(tmp_path)


def test_of_a_corpus_without_text_it_is_said_why(tmp_path):
    (tmp_path / 'a.csv').write_text('body\nx\n')
    config = helpers.tiny_config(tmp_path, tmp_path / 'a.csv')
    with pytest.raises(errors.InputError, match=r'is empty: .*a\.csv cannot be read: it has no c'):
        prepare_corpus.main(helpers.args(config, tmp_path / 'run'))


@pytest.mark.parametrize('seed', range(12))
def test_what_is_held_out_is_a_share_of_the_bytes(tmp_path, seed):
    """Of any few documents: seven chapters and a colophon, one long among many short, one alone."""
    rng = random.Random(seed)
    sizes = [rng.choice((18, 300, 5_000, 100_000)) for _ in range(rng.choice((1, 2, 8, 60)))]
    sizes = [100_000] * 7 + [18] if not seed else sizes
    every = [documents.Document(f'{i}' + rng.choice('가bcd') * n, '') for i, n in enumerate(sizes)]
    config = documents.Config('x', '', 'text', 'corpus', 150_000, 'once', 0, 1)
    helpers.collect(tmp_path, every, config, {'set': 'x'})
    fraction = rng.choice((0.02, 0.05, 0.3))
    found = {'train': [], 'valid': []}
    for shard in documents.shards(tmp_path):
        for document in splits.split(tmp_path, shard, fraction):
            found[document.split].append(document.text)
    held, whole = (
        sum(len(t.encode()) for t in x) for x in (found['valid'], [d.text for d in every])
    )
    assert held + sum(len(t.encode()) for t in found['train']) == whole
    assert fraction / 2 <= (held + 3) / whole
    assert (held - 4) / whole <= fraction * 2
    whole_ones = {d.text for d in every}
    cut = [t for t in found['valid'] if t not in whole_ones]
    assert len(cut) <= 1
    assert all(any(d.text.endswith(t) for d in every) for t in cut)
