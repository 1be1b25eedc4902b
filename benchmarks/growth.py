# SPDX-License-Identifier: Apache-2.0
"""What grows with the work: seconds of CPU and peak memory at sizes x 1, 10, 50, and exponents.

  python benchmarks/growth.py [--only=tokens] [--times=1,10,50]

Each size is a process of its own; an exponent is the slope between the last two sizes, of the
logarithms of what stands above an empty process of the same imports. 1 = as much as the work.
"""

import argparse
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable

import numpy as np

from gptjax.storage import documents as documents_lib

MB = 10**6
FLAGS = ('--config=experiments/quickstart.py', '--config.corpus.set=files')
SMALL = (
    *('--config.tokenizer.n_vocab=4096', '--config.tokenizer.sample_bytes=2000000'),
    '--config.tokens.processes=1',
)
READ = """
import pathlib, sys
import numpy as np
from gptjax.data import shards, token_manifest
folder, count = pathlib.Path(sys.argv[1]), int(sys.argv[2])
records = [
    token_manifest.Record(f'train-{i:05}.bin', 1_000_000, 1, 1, 1, '') for i in range(count)
]
opened = shards.open_all(folder, records, np.dtype('<u2')) if count else []
drawn = np.random.default_rng(0)
for _ in range(2000 if count else 0):
    shard = opened[int(drawn.integers(len(opened)))]
    start = int(drawn.integers(990_000))
    shard.request(start, start + 1025)()
"""
COUNT = """
import pathlib, sys
import numpy as np
from gptjax.models import kneser_ney
path = pathlib.Path(sys.argv[1])
class Tokens:
    def __iter__(self):
        with path.open('rb') as f:
            while read := f.read(2**20):
                yield np.frombuffer(read, '<u2')
if path.stat().st_size:
    kneser_ney.estimate([Tokens()], 5, 50257, 1_000_000, path.parent)
"""
ATTEND = """
import sys
import jax, jax.numpy as jnp
from gptjax.models import masks
from gptjax.models.kernels import flash
length = int(sys.argv[1])
arrays = [jnp.ones((1, max(length, 64), 4, 64)) * n for n in (0.1, 0.2, 0.3)]
def loss(*arrays):
    return flash.attend(*arrays, masks.Dense()).sum()
step = jax.jit(jax.grad(loss, (0, 1, 2)))
if length:
    jax.block_until_ready(step(*arrays))
"""
OVERLAPS = """
import sys
from gptjax.evals import contamination
if __name__ == '__main__':
    items = [f'{i} some words that stand nowhere in a corpus, eight of them' for i in range(2000)]
    contamination.Overlaps([items], sys.argv[1])
"""
ROWS = """
import pathlib, sys
from gptjax.runtime import metrics
metrics.past(pathlib.Path(sys.argv[1]), 10**9)
"""


def text(folder: pathlib.Path, size: int, document: int) -> pathlib.Path:
    """A file of made-up words, of so many bytes; in documents of that size, or one."""
    drawn = np.random.default_rng(0)
    words = [''.join(map(chr, drawn.integers(97, 123, n))) for n in drawn.integers(2, 11, 20_000)]
    path = folder / ('text.jsonl' if document else 'text.txt')
    with path.open('w') as f:
        while f.tell() < size:
            ranks = np.minimum(drawn.zipf(1.3, 4000 if not document else document // 7), 20_000) - 1
            said = ' '.join(words[i] for i in ranks)
            f.write(json.dumps({'text': said}) + '\n' if document else said + '\n')
    return path


def program(name: str, folder: pathlib.Path, path: pathlib.Path) -> list[str]:
    more = () if name == 'prepare_corpus' else SMALL
    flags = (*FLAGS, *more, f'--config.corpus.path={path}', f'--workdir={folder}')
    return [sys.executable, '-m', f'gptjax.{name}', *flags]


def prepared(size: int, document: int, folder: pathlib.Path, last: str, *flags: str) -> list[str]:
    """What is to be measured, all before it done; of an empty corpus, a few words."""
    path = text(folder, max(size, 20_000), document)
    before = ('prepare_corpus', 'train_tokenizer', 'prepare_tokens')
    for name in before[: before.index(last)]:
        subprocess.run(program(name, folder, path), check=True, capture_output=True)
    return [*program(last, folder, path), *flags]


def shards(count: int, folder: pathlib.Path) -> list[str]:
    """Sparse shards of 2 MB, from which 2,000 windows are read."""
    for number in range(count):
        with (folder / f'train-{number:05}.bin').open('wb') as f:
            f.truncate(2 * MB)
    return [sys.executable, '-c', READ, str(folder), str(count)]


def counted(count: int, folder: pathlib.Path) -> list[str]:
    """n-grams of so many tokens, a million in memory."""
    drawn = np.random.default_rng(0)
    with (folder / 'tokens').open('wb') as f:
        for _ in range(count // MB):
            f.write((np.minimum(drawn.zipf(1.3, MB), 50257) - 1).astype('<u2').tobytes())
    return [sys.executable, '-c', COUNT, str(folder / 'tokens')]


def overlaps(size: int, folder: pathlib.Path) -> list[str]:
    """2,000 items looked for in a corpus."""
    prepared(size, 2000, folder, 'train_tokenizer')
    code = folder / 'overlaps.py'  # which its processes import
    code.write_text(OVERLAPS)
    return [sys.executable, str(code), str(folder / 'corpus')]


def rows(count: int, folder: pathlib.Path) -> list[str]:
    """Rows of twenty numbers."""
    drawn = np.random.default_rng(0)
    with (folder / 'metrics.jsonl').open('w') as f:
        for step in range(count):
            numbers = {f'group/number_{i}': x for i, x in enumerate(drawn.random(20).tolist())}
            f.write(documents_lib.line({'step': step, 'tokens': step * 512} | numbers))
    return [sys.executable, '-c', ROWS, str(folder)]


def measured(make: Callable[[pathlib.Path], list[str]]) -> tuple[float, float]:
    """(seconds of CPU, peak in MB) of a command, its children aside."""
    with tempfile.TemporaryDirectory() as folder:
        command = make(pathlib.Path(folder))
        running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        said = running.stderr.read().decode()
        _, status, used = os.wait4(running.pid, 0)
        if status:
            raise SystemExit(said)
    return used.ru_utime + used.ru_stime, used.ru_maxrss * 1024 / MB


CASES = {
    'corpus, one text': (2 * MB, 'bytes', lambda n, f: prepared(n, 0, f, 'prepare_corpus')),
    'corpus, documents of 2 kB': (
        2 * MB,
        'bytes',
        lambda n, f: prepared(n, 2000, f, 'prepare_corpus'),
    ),
    'tokens, one text': (2 * MB, 'bytes', lambda n, f: prepared(n, 0, f, 'prepare_tokens')),
    'tokens, documents of 2 kB': (
        2 * MB,
        'bytes',
        lambda n, f: prepared(n, 2000, f, 'prepare_tokens'),
    ),
    'vocabulary, byte-level BPE': (
        2 * MB,
        'bytes',
        lambda n, f: prepared(n, 2000, f, 'train_tokenizer'),
    ),
    'vocabulary, SentencePiece': (
        2 * MB,
        'bytes',
        lambda n, f: prepared(
            n, 2000, f, 'train_tokenizer', '--config.tokenizer.kind=sentencepiece'
        ),
    ),
    'overlaps with evaluation items': (2 * MB, 'bytes', overlaps),
    'windows of token shards': (40, 'shards', shards),
    'metrics.jsonl at a start': (4000, 'rows', rows),
    'n-grams of order 5': (2 * MB, 'tokens', counted),
    'attention on CPUs, with gradients': (
        400,
        'tokens',
        lambda n, f: [sys.executable, '-c', ATTEND, str(n)],
    ),
}


def exponent(sizes: list[int], found: list[float], idle: float) -> float:
    above = [max(x - idle, 1e-3) for x in found[-2:]]
    return math.log(above[1] / above[0]) / math.log(sizes[-1] / sizes[-2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--only', default='', help='a part of the names to measure')
    parser.add_argument('--times', default='1,10,50')
    args = parser.parse_args()
    for name, (base, unit, make) in CASES.items():
        if args.only not in name:
            continue
        sizes = [base * int(n) for n in args.times.split(',')]
        idle = measured(lambda folder, make=make: make(0, folder))
        found = [measured(lambda folder, n=n, make=make: make(n, folder)) for n in sizes]
        print(f'{name}; idle {idle[0]:.1f} s, {idle[1]:.0f} MB')
        for size, (secs, peak) in zip(sizes, found, strict=True):
            print(f'  {size:>13,} {unit:7} {secs:8.1f} s CPU {peak:8.0f} MB', flush=True)
        for column, what in enumerate(('CPU', 'memory')):
            slope = exponent(sizes, [each[column] for each in found], idle[column])
            print(f'  exponent of {what}: {slope:.2f}')


if __name__ == '__main__':
    main()
