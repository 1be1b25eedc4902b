# SPDX-License-Identifier: Apache-2.0
"""Counting and smoothing n-grams, beside KenLM's lmplz on the same tokens.

  python benchmarks/ngram_speed.py --tokens=20000000 [--lmplz=kenlm/build/bin/lmplz]

Tokens are phrases and words of Zipf laws over 50,257 ids. Seconds of CPU, and the peak of memory
that is the process's own (pages of files that are mapped can be given up). lmplz also writes its
ARPA file, ours with --arpa.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np

from gptjax.models import kneser_ney
from gptjax.models.published import arpa

N_VOCAB = 50257
BLOCK = 1 << 20


def drawn(number: int) -> np.ndarray:
    """Tokens: words, and of four million phrases those that are common."""
    rng, n_phrases = np.random.default_rng(0), 4_000_000
    lengths = rng.integers(2, 7, n_phrases)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    phrases = (np.minimum(rng.zipf(1.2, starts[-1]), N_VOCAB) - 1).astype(np.uint16)
    found, done = np.empty(number, np.uint16), 0
    while done < number:
        which = np.minimum(rng.zipf(1.15, 400_000), n_phrases) - 1
        alone = rng.random(len(which)) < 0.4
        size = np.where(alone, 1, lengths[which])
        start = np.where(alone, rng.integers(0, len(phrases), len(which)), starts[which])
        place = np.repeat(start - np.cumsum(size) + size, size) + np.arange(size.sum())
        piece = phrases[place][: number - done]
        found[done : done + len(piece)] = piece
        done += len(piece)
    return found


def own_memory() -> int:
    """kB of this process that stand in no file."""
    status = pathlib.Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith('RssAnon'))


def ours(path: pathlib.Path, args: argparse.Namespace) -> str:
    tokens, peak = np.load(path, mmap_mode='r'), [0]

    def watch() -> None:
        while True:
            peak[0] = max(peak[0], own_memory())
            time.sleep(0.02)

    threading.Thread(target=watch, daemon=True).start()
    pieces = [tokens[at : at + BLOCK] for at in range(0, len(tokens), BLOCK)]
    began = time.process_time()
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        where = pathlib.Path(folder)
        sizes = (args.order, N_VOCAB, args.memory_tokens, where)
        tables = kneser_ney.estimate([pieces], *sizes)
        secs, entries = time.process_time() - began, sum(len(t['token']) for t in tables.values())
        if args.arpa:
            arpa.write(tables, where / 'x.arpa')
        written = time.process_time() - began - secs
    more = f', ARPA {written:.1f} s' if args.arpa else ''
    return f'{secs:.1f} s of CPU{more}, {peak[0] / 1e6:.2f} GB, {entries:,} n-grams'


def theirs(path: pathlib.Path, args: argparse.Namespace) -> str:
    tokens, words = np.load(path, mmap_mode='r'), path.with_suffix('.txt')
    with words.open('w') as f:
        for at in range(0, len(tokens), BLOCK):
            f.write(' '.join(map(str, tokens[at : at + BLOCK].tolist())) + ' ')
    command = [args.lmplz, '-o', str(args.order), '-S', args.lmplz_memory, '-T', f'{path.parent}/']
    with words.open() as given, open(os.devnull, 'w') as nowhere:
        running = subprocess.Popen(
            [*command, '--discount_fallback'],
            stdin=given,
            stdout=path.with_suffix('.arpa').open('w'),
            stderr=nowhere,
        )
        _, status, used = os.wait4(running.pid, 0)
    if status:
        raise SystemExit('lmplz failed')
    return f'{used.ru_utime + used.ru_stime:.1f} s of CPU, {used.ru_maxrss / 1e6:.2f} GB'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--tokens', type=int, default=20_000_000)
    parser.add_argument('--order', type=int, default=5)
    parser.add_argument('--memory_tokens', type=int, default=5_000_000)
    parser.add_argument('--arpa', action='store_true')
    parser.add_argument('--lmplz', default='')
    parser.add_argument('--lmplz_memory', default='1G', help='its option -S')
    parser.add_argument('--of', default='', help='a file of tokens, for a process of its own')
    args = parser.parse_args()
    if args.of:
        print(ours(pathlib.Path(args.of), args))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, 'tokens.npy')
        np.save(path, drawn(args.tokens))
        command = [sys.executable, __file__, f'--of={path}', *sys.argv[1:]]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        print(f'{args.tokens:,} tokens, order {args.order}')
        print(f'  ours   {said.strip()}', flush=True)
        if args.lmplz:
            print(f'  lmplz  {theirs(path, args)}')


if __name__ == '__main__':
    main()
