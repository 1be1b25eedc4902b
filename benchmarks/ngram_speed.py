# SPDX-License-Identifier: Apache-2.0
"""Counting and smoothing a million tokens in order 5, in memory and spilled to disk.

  taskset -c 0 python benchmarks/ngram_speed.py

Tokens of a Zipf law over 50,257 ids; process time, so one core's work whatever else runs.
"""

import statistics
import time

import numpy as np

from gptjax.models import kneser_ney

TOKENS, ORDER, N_VOCAB, ROUNDS = 1_000_000, 5, 50257, 3


def main() -> None:
    rng = np.random.default_rng(0)
    tokens = np.minimum(rng.zipf(1.2, TOKENS), N_VOCAB) - 1
    for name, memory_tokens in (('in memory', 2 * TOKENS), ('spilled', TOKENS // 10)):
        secs = []
        for _ in range(ROUNDS):
            began = time.process_time()
            tables = kneser_ney.estimate([[tokens]], ORDER, N_VOCAB, memory_tokens)
            secs.append(time.process_time() - began)
        entries = sum(len(table['token']) for table in tables.values())
        median = statistics.median(secs)
        print(f'{name:10} {median:.1f} s of one core, {entries:,} n-grams of orders 1 to {ORDER}')


if __name__ == '__main__':
    main()
