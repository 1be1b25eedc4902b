# SPDX-License-Identifier: Apache-2.0
"""ARPA files, as kenlm and SRILM read them: an n-gram model with token ids as words.

Every line is made of bytes in an array: a Python loop over a billion n-grams takes hours.
"""

import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gptjax.storage import columns, files

_LINES = 1 << 18  # made at once
_DECIMALS = 7
_LOWEST = 99.0  # what the format has for the logarithm of 0
_EXTRA = ('<unk>', '<s>', '</s>')


def write(
    tables: Mapping[str, Mapping[str, Any]],
    path: pathlib.Path,
    progress: Callable[[int], None] = lambda lines: None,
) -> None:
    """Writes ngram.NGram's tables; kenlm reads them from order 2 on.

    <s>, </s> and <unk> are there because the format wants them: no text has them.

    Args:
      progress: is told the lines written.
    """
    orders = [{n: np.asarray(x) for n, x in table.items()} for table in tables.values()]
    words_VxD = _decimal(np.arange(len(orders[0]['token'])))
    with files.replacing(path) as file:
        sizes = (f'ngram {k}={len(t["token"]) + 3 * (k == 1)}' for k, t in enumerate(orders, 1))
        file.write('\n'.join(['\\data\\', *sizes, '']).encode())
        for k, table in enumerate(orders, 1):
            file.write(f'\n\\{k}-grams:\n'.encode())
            if k == 1:
                end = '\t0\n' if 'log_backoff' in table else '\n'
                file.writelines(f'-99\t{word}{end}'.encode() for word in _EXTRA)
            for start, stop in columns.chunks(len(table['token']), _LINES):
                grams_NxK = _grams(orders, k, start, stop)
                parts = [_log10(table['log_prob'][start:stop]), _filled(grams_NxK, '\t')]
                for column in grams_NxK.T:
                    parts += [words_VxD[column], _filled(grams_NxK, ' ')]
                if 'log_backoff' in table:
                    parts[-1:] = [_filled(grams_NxK, '\t')]
                    parts += [_log10(table['log_backoff'][start:stop]), None]
                parts[-1] = _filled(grams_NxK, '\n')
                lines = np.concatenate(parts, axis=1).ravel()
                file.write(lines[lines > 0].data)
                progress(stop - start)
        file.write(b'\n\\end\\\n')


def _grams(orders: list[dict[str, np.ndarray]], k: int, start: int, stop: int) -> np.ndarray:
    """The tokens of the k-grams from start to stop (N K)."""
    token = orders[k - 1]['token'][start:stop, None]
    if k == 1:
        return token
    first = orders[k - 2]['first']
    one = int(np.searchsorted(first, start, side='right')) - 1
    last = int(np.searchsorted(first, stop))
    sizes = np.diff(np.clip(first[one : last + 1], start, stop))
    return np.concatenate([np.repeat(_grams(orders, k - 1, one, last), sizes, axis=0), token], 1)


def _log10(nats: np.ndarray) -> np.ndarray:
    """Logarithms of probabilities as fixed-point decimals (N D), 0 where there is no digit."""
    tenths = np.clip(nats.astype(np.float64) / -math.log(10), 0.0, _LOWEST)
    scaled = np.rint(tenths * 10**_DECIMALS).astype(np.int64)
    whole, rest = np.divmod(scaled, 10**_DECIMALS)
    places = 10 ** np.arange(_DECIMALS - 1, -1, -1)
    decimals = (rest[:, None] // places % 10 + ord('0')).astype(np.uint8)
    return np.concatenate(
        [_filled(decimals, '-'), _decimal(np.arange(100))[whole], _filled(decimals, '.'), decimals],
        axis=1,
    )


def _decimal(numbers: np.ndarray) -> np.ndarray:
    """Numbers in decimal digits (N D), 0 behind the last of each."""
    text = numbers.astype(np.bytes_)
    return text.view(np.uint8).reshape(len(numbers), text.itemsize)


def _filled(rows: np.ndarray, letter: str) -> np.ndarray:
    return np.full((len(rows), 1), ord(letter), np.uint8)
