# SPDX-License-Identifier: Apache-2.0
"""What a bucket costs beside a disk: requests, seconds to the first step, step time, tokens/s.

Storage is emulated on this machine, so times without added latency are a lower bound.

  python benchmarks/buckets.py [--rounds=3]
"""

import argparse
import collections
import itertools
import os
import pathlib
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from gptjax.configs import base
from gptjax.data import loader, staging, token_manifest, tokens
from gptjax.storage import buckets, documents, files
from tests import emulator

CONFIG = 'experiments/quickstart.py'
SMALL = ('--config.model.n_layers=2', '--config.model.d_model=64', '--config.model.d_head=16')
SMALL += ('--config.model.d_ff=256', '--config.train.eval_every_steps=0')
SMALL += ('--config.optim.warmup_tokens=0',)
TOKENS, N_CTX, WINDOWS = 4_000_000, 256, 32


def shards(folder: pathlib.Path) -> None:
    """A set of token shards of random text."""
    folder.mkdir(parents=True)
    ids = np.random.default_rng(0).integers(1, 50000, TOKENS).astype('<u2')
    records = []
    for number, part in enumerate(np.split(ids, 4)):
        path = folder / f'train-{number:05d}.bin'
        path.write_bytes(part.tobytes())
        records.append(
            {
                'name': path.name,
                'tokens': len(part),
                'documents': 1,
                'text_bytes': len(part),
                'words': 1,
                'sha256': files.sha256(path),
                'crc32c': buckets.crc32c_of(path),
            }
        )
    said = {'format': 1, 'source': {}, 'tokenizer': '', 'n_vocab': 50257, 'end_of_text': 0}
    said |= {'dtype': '<u2', 'splits': {'train': records, 'valid': []}}
    documents.write(folder / token_manifest.NAME, said)


def read(place: buckets.Anywhere, secs: float) -> float:
    """Tokens/s through the loader."""
    section = dict(base.get_config().data) | {'sets': ('x',), 'weights': (1.0,)}
    found = loader.batches(
        [tokens.open_set(place, 'train', 'never')],
        loader.configure(section),
        N_CTX,
        0,
        lambda step: (step * WINDOWS, WINDOWS),
        lambda count: (np.arange(count), slice(None)),
        0,
        10**6,
    )
    next(found)
    began, steps = time.monotonic(), 0
    while time.monotonic() - began < secs:
        next(found)
        steps += 1
    return steps * WINDOWS * N_CTX / (time.monotonic() - began)


def streams(storage: emulator.Storage, folder: pathlib.Path) -> None:
    shards(folder)
    place = buckets.of(f'gs://{storage.bucket()}/tokens')
    for path in folder.iterdir():
        (place / path.name).put(path)
    staged = staging.locate(
        str(place), folder, str(folder / 'staged'), lambda n: None, 'train', 'stage'
    )
    print(f'staged: {read(staged, 3):,.0f} tokens/s')
    for delay in (0, 20, 50):
        storage.delay_secs = delay / 1000
        print(f'streamed, {delay} ms a request: {read(place, 6):,.0f} tokens/s')
    storage.delay_secs = 0.0


def train(
    workdir: object,
    *flags: str,
    at_first: Callable[[subprocess.Popen], None] = lambda process: None,
) -> tuple[float, float]:
    """(seconds from the command to the first step done, seconds from then to the end)."""
    said = [sys.executable, '-m', 'gptjax.train', f'--config={CONFIG}', f'--workdir={workdir}']
    began = time.monotonic()
    first = 0.0
    with subprocess.Popen([*said, *SMALL, *flags], stderr=subprocess.PIPE, text=True) as process:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if 'first step done' in line:
                first = time.monotonic()
                at_first(process)
    if process.returncode not in (0, 75):
        raise RuntimeError(''.join(lines))
    return first - began, time.monotonic() - first


def prepare(workdir: object) -> None:
    for program in ('prepare_corpus', 'train_tokenizer', 'prepare_tokens'):
        command = [sys.executable, '-m', f'gptjax.{program}', f'--config={CONFIG}']
        subprocess.run([*command, f'--workdir={workdir}'], check=True, stderr=subprocess.DEVNULL)


def asked(storage: emulator.Storage, begun: int, ended: int | None = None) -> str:
    found = collections.Counter(request.method for request in storage.requests[begun:ended])
    return f'{sum(found.values())} ({", ".join(f"{n} {m}" for m, n in found.items())})'


def runs(storage: emulator.Storage, folder: pathlib.Path, rounds: int) -> None:
    local, remote = folder / 'run', f'gs://{storage.bucket()}/run'
    prepare(local)
    begun = len(storage.requests)
    prepare(remote)
    print(f'requests of the three programs that prepare: {asked(storage, begun)}')
    step = 16 * 128  # tokens
    none = ('--config.checkpoint.every_steps=0', '--config.checkpoint.every_secs=0')
    for what in ('start', 'resume'):
        begun, reached = len(storage.requests), []

        def stop(process: subprocess.Popen, reached: list[int] = reached) -> None:
            reached.append(len(storage.requests))
            process.send_signal(signal.SIGTERM)

        train(remote, f'--config.train.total_tokens={2000 * step}', *none, at_first=stop)
        print(f'requests, {what} to the first step: {asked(storage, begun, reached[0])}')
        print(f'requests, from then to a stop, one save: {asked(storage, reached[0])}')
    counts = []
    for saves in (1, 0):
        where = f'{remote}-counted-{saves}'
        copy(buckets.of(remote), where)
        begun = len(storage.requests)
        length = f'--config.train.total_tokens={6 * step}'
        train(where, length, f'--config.checkpoint.every_steps={saves}', none[1])
        made = [r for r in storage.requests[begun:] if r.method == 'POST']
        committed = {r.name for r in made if re.search(r'checkpoints/\d+/manifest.json$', r.name)}
        counts.append((len(storage.requests) - begun, len(committed)))
    (many, saves), (few, last) = counts
    print(f'requests, each save more: {(many - few) / (saves - last):.0f}')
    times = collections.defaultdict(list)
    for number, (kind, place) in itertools.product(
        range(rounds), (('disk', local), ('bucket', buckets.of(remote)))
    ):
        for saves in (0, 100):
            where = f'{place}-{number}-{saves}'
            copy(place, where)
            length = f'--config.train.total_tokens={200 * step}'
            first, rest = train(
                where, length, f'--config.checkpoint.every_steps={saves}', *none[1:]
            )
            times[kind, saves].append((first, rest))
    for (kind, saves), found in times.items():
        first, rest = (statistics.median(x) for x in zip(*found, strict=True))
        print(f'{kind}, a save every {saves} steps: first step {first:.1f} s, rest {rest:.2f} s')


def copy(place: pathlib.Path | buckets.Path, where: str) -> None:
    """A workdir with its tokens and tokenizer alone."""
    for name in ('tokens', 'tokenizer'):
        if isinstance(place, pathlib.Path):
            shutil.copytree(place / name, pathlib.Path(where) / name)
        else:
            for found in (place / name).objects():
                target = buckets.of(where) / name / found
                target.write_bytes((place / name / found).read_bytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rounds', type=int, default=3)
    rounds = parser.parse_args().rounds
    storage = emulator.Storage()
    emulator.connect(storage.url)
    with tempfile.TemporaryDirectory() as folder:
        os.environ['XDG_CACHE_HOME'] = folder
        streams(storage, pathlib.Path(folder) / 'set')
        runs(storage, pathlib.Path(folder), rounds)
    storage.close()


if __name__ == '__main__':
    main()
