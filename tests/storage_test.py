# SPDX-License-Identifier: Apache-2.0
"""Our own documents and files: checksums, folders finished by their sums, disks that are full."""

import contextlib
import errno
import json
import os
import random
import resource

import pytest

from gptjax.configs import checksum, errors
from gptjax.runtime import plots
from gptjax.storage import documents, files, sums, unfinished
from tests import helpers


def drawn(rng: random.Random, depth: int = 0):
    """Any value that our documents may hold, names that are numbers included."""
    kind = rng.randrange(8 if depth < 3 else 6)
    if kind == 6:
        return [drawn(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 7:
        names = (rng.choice(['a', 'é', '', 5, 10, 100, 1.5]) for _ in range(4))
        return {name: drawn(rng, depth + 1) for name in names}
    plain = [None, True, rng.randrange(10**6), rng.random(), '"\ud800', 1e300]
    return plain[kind]


@pytest.mark.parametrize('seed', range(50))
def test_whatever_is_written_is_read(tmp_path, seed):
    content = {'x': drawn(random.Random(seed)), 'top': {262: 0.5, 1049: 0.25, 9: 1.0}}
    documents.write(tmp_path / 'x.json', content)
    expected = json.loads(json.dumps(content))
    assert documents.read(tmp_path / 'x.json', dict, '') == expected
    assert documents.parse(documents.line(expected).encode(errors='surrogatepass'), dict)


def test_every_bit_that_is_flipped_is_noticed():
    content = {'steps': 3, 'loss': 1.25, 'name': 'é', 'runs': {'a': [1, None]}}
    whole = documents.text(content).encode()
    for place in range(len(whole)):
        for bit in range(8):
            changed = bytearray(whole)
            changed[place] ^= 1 << bit
            with contextlib.suppress(ValueError):  # what every kind of damage is
                assert documents.parse(bytes(changed), dict) == content  # as of white space


def test_depths_of_any_kind_are_damage(tmp_path):
    path = tmp_path / 'x.json'
    for depth in (900, 980, 990, 995, 1000, 10**5):
        path.write_text('{"a":' * depth + '1' + '}' * depth)
        with contextlib.suppress(documents.Damaged):
            documents.read(path, dict, '')


def test_another_document_is_damage(tmp_path):
    documents.write(tmp_path / 'x.json', {'b': 1})
    with pytest.raises(documents.Damaged, match=r"it has no 'a'\); go on"):
        documents.read(tmp_path / 'x.json', dict, 'go on', ('a',))
    (tmp_path / 'x.jsonl').write_text(documents.lines([{'a': 1}, {'b': 1}]))
    assert [*documents.read_lines(tmp_path / 'x.jsonl', ('a',)).bad] == [2]


def test_a_folder_in_a_files_place_is_said(tmp_path):
    (tmp_path / 'x').mkdir()
    with pytest.raises(errors.InputError, match=f'{tmp_path}/x is a folder; move it away'):
        files.replace(tmp_path / 'x', 'text')
    assert [*tmp_path.iterdir()] == [tmp_path / 'x']


def test_a_full_disk_names_the_file_and_leaves_the_old_one(tmp_path):
    (tmp_path / 'x').write_text('before')
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with pytest.raises(OSError, match=str(tmp_path / 'x')) as caught:
            files.replace(tmp_path / 'x', 'y' * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert caught.value.errno == errno.EFBIG
    assert (tmp_path / 'x').read_text() == 'before'
    assert [*tmp_path.iterdir()] == [tmp_path / 'x']


def test_pictures_follow_no_links(tmp_path):
    (tmp_path / 'outside').write_text('untouched')
    (tmp_path / 'a.png').symlink_to(tmp_path / 'outside')
    found = {'GPT': {'nats_by_context_tokens': {1: 2.0}, 'gradient_norm_by_distance': [1.0]}}
    plots.forgetting(found, tmp_path / 'a.png')
    assert (tmp_path / 'outside').read_text() == 'untouched'
    assert (tmp_path / 'a.png').read_bytes()[1:4] == b'PNG'


def test_a_digest_that_is_remembered_wrong_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    (tmp_path / 'x').write_text('content')
    digest = files.remembered_sha256(tmp_path / 'x')
    (note,) = (tmp_path / 'cache').rglob('*.json')
    whole = note.read_text()
    for content in (whole.replace(digest[:5], 'fffff'), '[' * 10**5, '[]', 'null', whole[:-9], ''):
        note.write_text(content)
        assert files.remembered_sha256(tmp_path / 'x') == digest


def test_sums_of_files_in_folders(tmp_path):
    (tmp_path / 'more').mkdir()
    for name in ('a.json', 'more/b.jinja'):
        (tmp_path / name).write_text(name)
    sums.write(tmp_path, ['a.json', 'more/b.jinja'])
    sums.check(tmp_path, '')
    (tmp_path / 'more' / 'b.jinja').write_text('other')
    with pytest.raises(errors.InputError, match='b.jinja does not have the bytes'):
        sums.check(tmp_path, '')
    text = (tmp_path / sums.NAME).read_text()
    (tmp_path / sums.NAME).write_text(text.replace('more/', '../'))
    with pytest.raises(errors.InputError, match='not in its folder'):
        sums.check(tmp_path, '')


@pytest.mark.parametrize(
    'content',
    [
        'curl https://x | sh',
        '[' * 10**5,
        json.dumps(checksum.sealed({'command': ['sh', '-c', 'x']})),
        json.dumps(checksum.sealed({'command': 'python -m gptjax.x'})),
        '\0' * 10**6,
    ],
)
def test_a_mark_of_somebody_else_is_no_command(tmp_path, content):
    (tmp_path / unfinished.MARK).write_text(content)
    with pytest.raises(errors.InputError) as caught:
        unfinished.refuse(tmp_path)
    assert str(caught.value) == f'{tmp_path} is an unfinished conversion; write it again'


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='processes as on Unix')
def test_what_no_message_was_written_for_is_one_line_too(tmp_path):
    """A traceback is kept, not shown."""
    config = tmp_path / 'config.py'
    config.write_text(
        'from gptjax.configs import base\n'
        'def get_config():\n'
        '    from gptjax.data import documents\n'
        '    documents.is_finished = lambda *args: {}[1]\n'
        '    return base.get_config()\n'
    )
    (tmp_path / 'a.txt').write_text('text')
    found = helpers.run_program(
        'prepare_corpus',
        f'--config={config}',
        f'--workdir={tmp_path}/run',
        '--config.corpus.set=files',
        f'--config.corpus.path={tmp_path}/a.txt',
        env=os.environ | {'XDG_CACHE_HOME': str(tmp_path / 'cache')},
    )
    assert found.returncode == 1
    assert found.stderr.count('\n') == 1
    assert found.stderr.startswith('error: KeyError: 1; this is a fault of gptjax')
    (kept,) = (tmp_path / 'cache').rglob('faults/*.txt')
    assert 'Traceback' in kept.read_text()
