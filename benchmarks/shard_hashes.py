# SPDX-License-Identifier: Apache-2.0
"""Seconds to open token shards by data.verify: hashed first, remembered, every time, never.

python benchmarks/shard_hashes.py --gigabytes=10     (writes that much into --dir)
"""

import argparse
import os
import pathlib
import statistics
import tempfile
import time

import numpy as np

from gptjax.data import token_manifest, tokens
from gptjax.storage import files
from gptjax.text import tokenizer as tokenizer_lib

SHARD = 2**28  # bytes


def prepare(folder: pathlib.Path, size: int) -> None:
    """Shards of random ids; one of them, a small one, is held out."""
    rng = np.random.default_rng(0)
    found = []
    for index, length in enumerate([*[SHARD // 2] * (size // SHARD), 2**19]):
        split = 'valid' if length == 2**19 else 'train'
        path = folder / f'{split}-{index:05d}.bin'
        rng.integers(0, 256, length, np.uint16).tofile(path)
        more = {}
        if split == 'valid':
            table = path.with_suffix('.documents.npy')
            np.save(table, np.array([[length, 0, 0]]))
            more = {'table': table.name, 'table_sha256': files.sha256(table)}
        digest = files.sha256(path)
        record = token_manifest.Record(path.name, length, 1, 0, 0, digest, **more)
        found.append({split: record})
    tokens.write_manifest(folder, found, tokenizer_lib.Bytes(), {})


def seconds(folder: pathlib.Path, verify: str) -> float:
    began = time.perf_counter()
    tokens.open_set(folder, 'train', verify)
    tokens.open_set(folder, 'valid', verify)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--gigabytes', type=float, default=10)
    parser.add_argument('--dir')
    parser.add_argument('--rounds', type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as name:
        folder = pathlib.Path(name)
        os.environ['XDG_CACHE_HOME'] = str(folder / 'cache')
        prepare(folder, int(args.gigabytes * 1e9))
        print(f'first start, all hashed: {seconds(folder, "changed"):.2f} s')
        for verify in ('changed', 'never', 'always'):
            found = [seconds(folder, verify) for _ in range(args.rounds)]
            print(f'{verify}: median {statistics.median(found):.3f} s of {args.rounds}')


if __name__ == '__main__':
    main()
