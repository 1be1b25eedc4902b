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
_DECIMALS, _LAST = 7, 4  # digits behind the point, and those of them in the second word
_LOWEST = 99  # what the format has for the logarithm of 0
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
    numbers = np.arange(len(orders[0]['token'])).astype(np.bytes_)
    ids = {end: _words(np.strings.add(numbers, end)) for end in (b' ', b'\t', b'\n')}
    logs = _Logs()
    with files.replacing(path) as file:
        sizes = (f'ngram {k}={len(t["token"]) + 3 * (k == 1)}' for k, t in enumerate(orders, 1))
        file.write('\n'.join(['\\data\\', *sizes, '']).encode())
        for k, table in enumerate(orders, 1):
            file.write(f'\n\\{k}-grams:\n'.encode())
            backoff = table.get('log_backoff')
            if k == 1:
                end = '\n' if backoff is None else '\t0\n'
                file.writelines(f'-99\t{word}{end}'.encode() for word in _EXTRA)
            for start, stop in columns.chunks(len(table['token']), _LINES):
                *before, last = _grams(orders, k, start, stop).T
                parts = [logs.words(table['log_prob'][start:stop], b'\t')]
                parts += [ids[b' '][token] for token in before]
                parts += [ids[b'\n' if backoff is None else b'\t'][last]]
                if backoff is not None:
                    parts.append(logs.words(backoff[start:stop], b'\n'))
                lines = np.concatenate(parts, axis=1).view(np.uint8).ravel()
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


class _Logs:
    """Logarithms to base 10 as fixed-point decimals, from tables of their digits."""

    def __init__(self) -> None:
        places = _DECIMALS - _LAST
        numbers = range((_LOWEST + 1) * 10**places)
        heads = [f'-{n // 10**places}.{n % 10**places:0{places}}'.encode() for n in numbers]
        self._heads = _words(np.array(heads))
        tails = np.array([f'{n:0{_LAST}}'.encode() for n in range(10**_LAST)])
        self._tails = {end: _words(np.strings.add(tails, end)) for end in (b'\t', b'\n')}

    def words(self, nats: np.ndarray, end: bytes) -> np.ndarray:
        """The digits of each, and what ends them (N 2)."""
        tenths = np.clip(nats.astype(np.float64) / -math.log(10), 0.0, _LOWEST)
        head, tail = np.divmod(np.rint(tenths * 10**_DECIMALS).astype(np.int64), 10**_LAST)
        return np.concatenate([self._heads[head], self._tails[end][tail]], axis=1)


def _words(texts: np.ndarray) -> np.ndarray:
    """Bytes as rows of whole words (N W), 0 behind the last byte: rows are gathered fast then."""
    width = -(-texts.itemsize // 8)
    return texts.astype(f'S{8 * width}').view(np.uint64).reshape(len(texts), width)
