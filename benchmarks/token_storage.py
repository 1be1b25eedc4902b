# SPDX-License-Identifier: Apache-2.0
"""Random windows of 1,025 tokens from three storages, and through the loader.

  python benchmarks/token_storage.py     (needs the data extra)

Flat files through memory maps, ArrayRecord (one record a window) and TensorStore (zarr3,
uncompressed chunks of 64 windows), each of 50 million uint16 tokens, read in the same random
order, one window at a time; then training batches through Grain's prefetching loader with one
thread, and how soon the first batch of step 300,000 comes.
"""

import argparse
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable

import numpy as np
import tensorstore as ts
from array_record.python import array_record_module

from gptjax.data import loader, shards, token_manifest, tokens
from gptjax.training import plan as plan_lib

N_CTX, TOKENS, READS, ROUNDS = 1024, 50_000_000, 3000, 5


def flat(folder: pathlib.Path, stream: np.ndarray) -> Callable[[int], np.ndarray]:
    path = folder / 'flat.bin'
    path.write_bytes(stream.tobytes())
    mapped = np.memmap(path, np.uint16, mode='r')
    return lambda i: np.array(mapped[i * N_CTX : i * N_CTX + N_CTX + 1])


def array_record(folder: pathlib.Path, stream: np.ndarray) -> Callable[[int], np.ndarray]:
    path = str(folder / 'windows.array_record')
    writer = array_record_module.ArrayRecordWriter(path, 'group_size:1,uncompressed')
    for i in range(TOKENS // N_CTX - 1):
        writer.write(stream[i * N_CTX : i * N_CTX + N_CTX + 1].tobytes())
    writer.close()
    reader = array_record_module.ArrayRecordReader(path)
    return lambda i: np.frombuffer(reader.read([i])[0], np.uint16)


def tensorstore(folder: pathlib.Path, stream: np.ndarray) -> Callable[[int], np.ndarray]:
    store = ts.open(
        {'driver': 'zarr3', 'kvstore': {'driver': 'file', 'path': str(folder / 'zarr')}},
        create=True,
        dtype=ts.uint16,
        shape=[TOKENS],
        chunk_layout=ts.ChunkLayout(chunk_shape=[64 * N_CTX]),
        codec=ts.CodecSpec({'driver': 'zarr3', 'codecs': [{'name': 'bytes'}]}),
    ).result()
    store.write(stream).result()
    return lambda i: store[i * N_CTX : i * N_CTX + N_CTX + 1].read().result()


def through_the_loader(folder: pathlib.Path, stream: np.ndarray) -> tuple[float, float]:
    """(tokens/s with 16 threads, seconds to the first batch of step 300,000)."""
    record = token_manifest.Record('flat.bin', len(stream), 1, 0, 0, '')
    (shard,) = shards.open_all(folder, [record], np.dtype(np.uint16))
    token_set = tokens.TokenSet(folder, 'train', 0, 50257, '', '', [shard], [len(stream)])
    config = loader.Config(('x', 'y'), (0.7, 0.3), (('x', 'x'),), 4, 16, 'staged', 'auto', 'never')
    plan = plan_lib.of_tokens(plan_lib.Config(32 * N_CTX, 1, 0, 0, 1), N_CTX, 10**12)
    began = time.perf_counter()
    batches = loader.batches(
        [token_set, token_set],
        config,
        N_CTX,
        0,
        plan.examples,
        lambda n: (np.arange(n), slice(0, N_CTX)),
        300_000,
        301_000,
    )
    next(batches)
    first = time.perf_counter() - began
    speeds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for _ in range(100):
            next(batches)
        speeds.append(100 * 32 * N_CTX / (time.perf_counter() - began))
    return statistics.median(speeds), first


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    rng = np.random.default_rng(0)
    stream = rng.integers(0, 50257, TOKENS).astype(np.uint16)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        kinds = {f.__name__: f(folder, stream) for f in (flat, array_record, tensorstore)}
        speeds: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(ROUNDS):
            order = rng.integers(0, TOKENS // N_CTX - 1, READS)
            for kind, read in kinds.items():
                began = time.perf_counter()
                for i in order.tolist():
                    read(i)
                speeds[kind].append(READS * N_CTX / (time.perf_counter() - began))
        for kind, found in speeds.items():
            print(f'{kind:14} {statistics.median(found) / 1e6:8.1f} million tokens/s')
        speed, first = through_the_loader(folder, stream)
        print(f'{"loader":14} {speed / 1e6:8.1f} million tokens/s, 16 threads, two sets mixed')
        print(f'{"step 300,000":14} {first:8.3f} s to the first batch')


if __name__ == '__main__':
    main()
