# SPDX-License-Identifier: Apache-2.0
"""Token shards on disks: few open files however many shards, and nothing of a changed one."""

import concurrent.futures
import contextlib
import os
import pathlib
import resource

import numpy as np
import pytest

from gptjax.configs import errors
from gptjax.data import shards
from gptjax.data import token_manifest as manifest_lib

TOKENS = 50


def record(name: str) -> manifest_lib.Record:
    return manifest_lib.Record(name, TOKENS, documents=1, text_bytes=TOKENS, words=1, sha256='')


def made(folder: pathlib.Path, count: int) -> list[shards.Shard]:
    """Shards of ascending numbers, opened."""
    records = []
    for number in range(count):
        name = f'train-{number:05}.bin'
        first = number * TOKENS
        np.arange(first, first + TOKENS, dtype=np.uint32).tofile(folder / name)
        records.append(record(name))
    return shards.open_all(folder, records, np.dtype(np.uint32))


def test_a_thousand_shards_under_a_low_limit(tmp_path):
    """Read at random by eight threads, ten times as many as may be open."""
    opened = made(tmp_path, 2000)
    shards._opened.cache_clear()
    before, limits = len(os.listdir('/proc/self/fd')), resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before + shards._MOST_OPEN + 40, limits[1]))
    try:
        drawn = np.random.default_rng(0).integers(0, 2000, 20_000).tolist()

        def read(number: int) -> bool:
            found = opened[number].request(7, 19)()
            return found.tolist() == list(range(number * TOKENS + 7, number * TOKENS + 19))

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            assert all(pool.map(read, drawn))
        assert len(os.listdir('/proc/self/fd')) <= before + shards._MOST_OPEN + 2
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_limit_that_is_too_low_is_a_line(tmp_path):
    shard, other = made(tmp_path, 2)
    shards._opened.cache_clear()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = [os.open(tmp_path, os.O_RDONLY)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (held[0] + 8, limits[1]))
    try:
        with contextlib.suppress(OSError):  # until none is left
            while True:
                held.append(os.open(tmp_path, os.O_RDONLY))
        with pytest.raises(errors.InputError, match=r'let more files be open .ulimit -n.'):
            shard.request(0, 5)()
        with pytest.raises(errors.InputError, match=r'let more files be open .ulimit -n.'):
            shards.open_all(tmp_path, [record('train-00000.bin')], np.dtype(np.uint32))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for number in held:
            os.close(number)
    assert other.request(0, 2)().tolist() == [TOKENS, TOKENS + 1]


def cut(path):
    os.truncate(path, 100)


def grown(path):
    path.write_bytes(path.read_bytes() + bytes(4))


def replaced(path):
    other = path.with_suffix('.other')
    other.write_bytes(bytes(4 * TOKENS))
    other.replace(path)


def written(path):
    with path.open('r+b') as file:
        file.write(b'\1')


@pytest.mark.parametrize('held', [True, False])
@pytest.mark.parametrize('change', [cut, grown, replaced, written])
def test_a_shard_that_is_changed_meanwhile_is_a_line(tmp_path, change, held):
    """Whether it is open at the time or was closed since, as others were read."""
    shard = made(tmp_path, 1)[0]
    assert shard.request(0, 5)().tolist() == [0, 1, 2, 3, 4]
    change(shard.path)
    if not held:
        shards._opened.cache_clear()
    with pytest.raises(errors.InputError, match=r'train-00000.bin was changed while it was read'):
        shard.request(0, 5)()


def test_a_shard_that_is_removed_is_read_while_it_is_open(tmp_path):
    shard = made(tmp_path, 1)[0]
    shard.request(0, 5)()
    shard.path.unlink()
    assert shard.request(3, 5)().tolist() == [3, 4]
    shards._opened.cache_clear()
    with pytest.raises(errors.InputError, match='cannot be read any more .No such file'):
        shard.request(0, 5)()


def test_new_shards_of_the_same_names_are_the_new_ones(tmp_path):
    made(tmp_path, 1)[0].request(0, 5)()
    path = tmp_path / 'train-00000.bin'
    content = np.arange(900, 900 + TOKENS, dtype=np.uint32)
    path.unlink()
    content.tofile(path)
    shard = shards.open_all(tmp_path, [record('train-00000.bin')], np.dtype(np.uint32))[0]
    assert shard.request(0, 2)().tolist() == [900, 901]
