# SPDX-License-Identifier: Apache-2.0
"""A corpus is the same however many processes read its files, and whenever one is stopped."""

import json
import os
import random
import time

import numpy as np
import pytest

from gptjax import prepare_corpus
from gptjax.configs import base, errors
from gptjax.data import collecting, documents, seen
from gptjax.data.sets import files
from gptjax.runtime import workers
from tests import helpers


@pytest.fixture
def folder(tmp_path):
    """Files of all kinds of lengths, with repeated texts, blank ones, and what is no record."""
    rng = random.Random(0)
    made = tmp_path / 'files'
    made.mkdir()
    texts = [
        ' '.join(rng.choices(['alpha', 'bétà', 'gamma', '한국어', '\n'], k=n)) for n in range(2, 90)
    ]
    for number in range(9):
        lines = [json.dumps({'text': text}) for text in rng.choices([*texts, ' \n'], k=40)]
        lines.insert(rng.randrange(40), 'no record' if number % 3 else '{"text": 5}')
        (made / f'{number}.jsonl').write_text('\n'.join(lines))
    (made / '3.txt').write_text('a long text and\n' * 900)
    (made / '5.txt').write_bytes(b'ends in \xff')
    return made


def corpus(workdir, folder, *flags):
    given = ('--config.corpus.set=files', f'--config.corpus.path={folder}', *flags)
    flags = (*given, '--config.corpus.shard_bytes=9000')
    prepare_corpus.main(helpers.args(base.__file__, workdir, *flags))
    return {p.name: p.read_bytes() for p in (workdir / 'corpus').iterdir()}


def test_a_corpus_is_the_same_on_any_number_of_cores(tmp_path, folder, monkeypatch):
    alone = corpus(tmp_path / 'a', folder, '--config.corpus.processes=1')
    assert len(alone) > 8
    said = json.loads(alone['manifest.json'])['left_out']
    assert said['bad'] == 10
    assert said['repeated'] > 200
    assert said['empty'] > 0
    monkeypatch.setattr(files, '_PART_BYTES', 1)  # a file a job
    assert corpus(tmp_path / 'b', folder, '--config.corpus.processes=3') == alone
    monkeypatch.setattr(collecting, '_PIECE_BYTES', 100)
    assert corpus(tmp_path / 'c', folder, '--config.corpus.processes=1') == alone


@pytest.mark.parametrize('processes', [1, 2])
def test_a_stop_between_any_pieces_changes_nothing(tmp_path, folder, monkeypatch, processes):
    monkeypatch.setattr(files, '_PART_BYTES', 1)
    flag = f'--config.corpus.processes={processes}'
    whole = corpus(tmp_path / 'whole', folder, flag)
    real = workers.in_order
    moments = range(1, 11) if processes == 1 else (3, 8)
    for moment in moments:

        def stopped(*args, moment=moment):
            for number, piece in enumerate(real(*args)):
                if number == moment:
                    raise KeyboardInterrupt
                yield piece

        monkeypatch.setattr(workers, 'in_order', stopped)
        with pytest.raises(KeyboardInterrupt):
            corpus(tmp_path / str(moment), folder, flag)
        monkeypatch.setattr(workers, 'in_order', real)
        assert corpus(tmp_path / str(moment), folder, flag) == whole


def test_too_many_bad_records_end_it_on_any_number_of_cores(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(files, '_PART_BYTES', 1)
    said = []
    for processes in (1, 3):
        flags = (f'--config.corpus.processes={processes}', '--config.corpus.max_bad=4')
        with pytest.raises(errors.InputError, match='max_bad=4 records are bad') as found:
            corpus(tmp_path / str(processes), folder, *flags)
        said.append(str(found.value).replace(f'{tmp_path}/{processes}/', ''))
    assert said[0] == said[1]


def test_lines_are_those_of_json():
    hard = [chr(c) for c in (*range(0x300), 0x2028, 0x2029, 0xFEFF, 0xFFFF, 0x1F600, 0x10FFFF)]
    for text in (*hard, ''.join(hard), '"\\\\/', ''):
        for more in ({}, {'more': True}):
            line = documents.line(documents.Document(text, 'valid', bool(more)))
            wanted = json.dumps({'text': text, 'split': 'valid'} | more, ensure_ascii=False)
            assert line == wanted.encode() + b'\n'


@pytest.mark.parametrize('most', [3, 2**40])
def test_what_was_seen_is_a_set(most):
    """Also where first numbers are shared by many."""
    rng, found, known = np.random.default_rng(0), seen.Seen(), set()
    for _ in range(60):
        pairs = rng.integers(0, most, (int(rng.integers(0, 40)), 2)).astype(np.uint64)
        pairs = np.concatenate([pairs, pairs[: len(pairs) // 3]])
        wanted = []
        for pair in map(tuple, pairs.tolist()):
            wanted.append(pair not in known)
            known.add(pair)
        assert found.add(pairs).tolist() == wanted
    assert sum(map(len, found._levels)) + len(found._others) == len(known)
    assert len(found._levels) < 12


def give(job, advance):
    number, secs = job
    for place in range(3):
        time.sleep(secs)
        advance(1)
        yield number, place, os.getpid()


def fail(job, advance):
    yield job
    if job == 2:
        raise errors.InputError('the third is wrong')
    if job == 7:
        os._exit(9)


def test_results_come_in_the_order_of_their_jobs():
    done = []
    jobs = [(number, 0.05 if number == 0 else 0.0) for number in range(20)]
    found = list(workers.in_order(give, jobs, 3, done.append))
    assert [each[:2] for each in found] == [(n, place) for n in range(20) for place in range(3)]
    assert sum(done) == 60
    assert len({pid for *_, pid in found}) == 3


def test_a_job_that_fails_or_dies_ends_the_others():
    with pytest.raises(errors.InputError, match='the third is wrong'):
        list(workers.in_order(fail, [0, 1, 2], 2, lambda done: None))
    with pytest.raises(errors.InputError, match='a process at work was killed'):
        list(workers.in_order(fail, [0, 7, 1], 2, lambda done: None))
