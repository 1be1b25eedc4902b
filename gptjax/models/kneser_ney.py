# SPDX-License-Identifier: Apache-2.0
"""Estimating an n-gram model: interpolated modified Kneser-Ney smoothing.

Chen and Goodman 1998 (TR-10-98, section 3): the highest order is discounted from its counts, each
lower one from the number of distinct tokens that precede an n-gram. The empty context falls back to
the uniform distribution, so that no token is impossible. Text begins with a boundary that counts as
a preceding token but is never predicted.

What is counted stands on disk, a level an order: distinct k-grams in the order of their tokens.
Without their first tokens, and sorted again, those of one level are the next one's. Then from order
1 on a level's probabilities are sent to the k-grams above that end alike. Memory is that of the
rows that are sorted at once, however many there are (Heafield et al. 2013, section 3, sort by last
tokens instead, and once more for each use).
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
from jaxtyping import Integer

from gptjax.configs import errors
from gptjax.models import grams
from gptjax.storage import columns

# Where a count of counts is zero or a discount leaves its range, these are used for that order, as
# by KenLM's --discount_fallback: for counts of 1, 2, and 3 or more.
FALLBACK = (0.5, 1.0, 1.5)
_BLOCK = 1 << 20  # rows read at once


@dataclasses.dataclass(frozen=True)
class Config:
    """The ngram section of configs/base.py."""

    memory_tokens: int
    total_tokens: int

    def __post_init__(self) -> None:
        errors.require_positive(self, 'memory_tokens')
        errors.require_between(self, 0, 2**60, 'total_tokens')


def _quiet(
    what: str, total: int | None, unit: str
) -> AbstractContextManager[Callable[[int], None]]:
    del what, total, unit
    return nullcontext(lambda done: None)


def estimate(
    sequences: Sequence[Iterable[np.ndarray]],
    order: int,
    n_vocab: int,
    memory_tokens: int,
    folder: pathlib.Path,
    stages: grams.Stages = _quiet,
) -> dict[str, dict[str, np.ndarray]]:
    """The parameters of ngram.NGram, in files.

    Args:
      sequences: texts that are not joined, each in pieces of token ids; gone through twice.
      order: n; at least 1.
      n_vocab: ids are below it.
      memory_tokens: n-grams in memory at once, some 60 bytes each.
      folder: empty, for these files; the arrays are good until it is removed.

    Raises:
      InputError: there is no token, an id is out of range, there are more n-grams of an order than
        can be numbered, or they do not fit on the disk: said before they are counted.
    """
    size = grams.survey(sequences, order, n_vocab, stages)
    size.check(folder, memory_tokens)
    counter = _counted(sequences, size, memory_tokens, folder, stages)
    with stages('sort', sum(size.n_grams[1:]) + size.n_grams[-1], ' n-grams') as advance:
        top = _Level(grams.Keys(order, n_vocab), folder, size.dtype)
        top.extend(_told(counter.blocks(), advance))
        levels = [top]
        while levels[0].keys.order > 1:
            levels.insert(0, _below(levels[0], memory_tokens, folder, advance))
    levels[0].rows.remove()
    with stages('smooth', sum(level.n for level in levels), ' n-grams') as advance:
        return _smooth(levels, memory_tokens, folder, advance)


def discounts(t: Integer[np.ndarray, '4'] | Sequence[int]) -> tuple[float, float, float]:
    """Discounts of counts of 1, 2 and 3 or more, one order (Chen and Goodman 1998, equation 26).

    Args:
      t: how many n-grams have counts of 1, 2, 3 and 4.
    """
    t1, t2, t3, t4 = (int(x) for x in t)
    if not (t1 and t2 and t3 and t4):
        return FALLBACK
    y = t1 / (t1 + 2 * t2)
    found = (1 - 2 * y * t2 / t1, 2 - 3 * y * t3 / t2, 3 - 4 * y * t4 / t3)
    in_range = all(0 < d <= k for k, d in enumerate(found, 1))  # none: nothing left for others
    return found if in_range else FALLBACK


class _Level:
    """The distinct k-grams, sorted by their tokens; those that begin with a boundary are last.

    Attributes:
      n: how many have no boundary.
      token: the last one, of those.
      count: adjusted, of all.
      above: k-gram after k-gram, the places of the (k+1)-grams that end in it; None at the top.
      first: where those begin that extend each, of those without a boundary; None at the top.
    """

    def __init__(self, keys: grams.Keys, folder: pathlib.Path, dtype: np.dtype | type) -> None:
        self.keys, self.n = keys, 0
        self.rows = columns.Table(folder / f'rows-{keys.order}', *keys.dtypes)
        self.token = columns.Column(folder / f'token-{keys.order}', np.int32)
        self.count = columns.Column(folder / f'count-{keys.order}', dtype)
        self.above: columns.Column | None = None
        self.first: columns.Column | None = None
        self._t = np.zeros(5, np.int64)

    def extend(self, blocks: Iterable[tuple[columns.Rows, np.ndarray]]) -> None:
        """Adds distinct k-grams, sorted, and their counts; unigrams that are missing count 0."""
        if self.keys.order == 1:
            blocks = [self._filled(blocks)]
        for rows, counts in blocks:
            n_real = len(counts) - int(np.count_nonzero(self.keys.is_at_start(rows)))
            self._t += np.bincount(np.minimum(counts[:n_real], 5), minlength=6)[:5]
            self.n += n_real
            grams.check_number(self.n)
            self.rows.append(*rows)
            self.token.append(self.keys.last(rows)[:n_real])
            self.count.append(counts)

    def discounts(self) -> np.ndarray:
        """Of counts of 0, 1, 2, and 3 or more."""
        return np.array([0.0, *discounts(self._t[1:])])

    def _filled(self, blocks: Iterable[tuple[columns.Rows, np.ndarray]]) -> tuple:
        everything = np.zeros(self.keys.boundary, self.count.dtype)
        for (token,), counts in blocks:
            everything[token] = counts
        return (np.arange(len(everything)).astype(self.keys.dtypes[0]),), everything


def _counted(
    sequences: Sequence[Iterable[np.ndarray]],
    size: grams.Size,
    rows: int,
    folder: pathlib.Path,
    stages: grams.Stages,
) -> columns.Sorter:
    """The n-grams of the highest order, with counts."""
    keys = grams.Keys(size.order, size.n_vocab)
    sorter = columns.Sorter(folder / 'runs', rows, add=True)
    with stages('count', size.tokens, ' tokens') as advance:
        for found in grams.rows(sequences, keys, min(rows, _BLOCK)):
            sorter.put(found, np.ones(len(found[0]), size.dtype))
            advance(len(found[0]))
    return sorter


def _told(blocks: Iterable[tuple], advance: Callable[[int], None]) -> Iterator[tuple]:
    for keys, values in blocks:
        yield keys, values
        advance(len(values))


def _below(
    above: _Level, rows: int, folder: pathlib.Path, advance: Callable[[int], None]
) -> _Level:
    """The next lower order, its counts those of distinct tokens before; the rows above go."""
    level = _Level(above.keys.shorter(), folder, np.uint32)
    k = level.keys.order
    level.above = columns.Column(folder / f'above-{k}', np.uint32)
    sorter = columns.Sorter(folder / 'runs', rows, add=False)
    for start, stop in columns.chunks(len(above.rows), min(rows, _BLOCK)):
        suffixes = above.keys.without_first(above.rows.read(start, stop))
        sorter.put(suffixes, np.arange(start, stop, dtype=np.uint32))
    level.extend(_adjusted(_told(sorter.blocks(), advance), level.above))
    level.first = columns.Column(folder / f'first-{k}', np.int32)
    for places in _firsts(above, level):
        level.first.append(places)
    above.rows.remove()
    return level


def _adjusted(blocks: Iterable[tuple], above: columns.Column) -> Iterator[tuple]:
    """Distinct rows with how often each stands there; what they belong to goes to a column."""
    for keys, numbers in blocks:
        first = np.flatnonzero(columns.is_new(keys))
        above.append(numbers)
        yield tuple(key[first] for key in keys), np.diff(first, append=len(numbers))


def _firsts(above: _Level, level: _Level) -> Iterator[np.ndarray]:
    """For each k-gram, how many (k+1)-grams extend those before it; in the end, all."""
    told = read = extended = 0  # k-grams told, and read; (k+1)-grams told
    window: list[np.ndarray] = []  # the rows read and not told
    sizes = np.zeros(0, np.int64)
    for start, stop in columns.chunks(above.n, _BLOCK):
        prefixes = above.keys.without_last(above.rows.read(start, stop))
        new = np.flatnonzero(columns.is_new(prefixes))
        asked = [key[new] for key in prefixes]
        while not window or columns.key_of(window, -1) < columns.key_of(asked, -1):
            more = level.rows.read(read, min(read + _BLOCK, level.n))
            window = list(map(np.concatenate, zip(window, more, strict=True))) if window else more
            read += len(more[0])
            sizes = np.concatenate([sizes, np.zeros(len(more[0]), np.int64)])
        places = columns.places(window, asked)
        sizes[places] += np.diff(new, append=stop - start)
        whole = places[-1]  # what comes next may extend this one, too
        yield extended + np.cumsum(sizes[:whole]) - sizes[:whole]
        told, extended = told + whole, extended + int(sizes[:whole].sum())
        window, sizes = [key[whole:] for key in window], sizes[whole:]
    yield extended + np.cumsum(sizes) - sizes
    yield np.full(level.n - told - len(sizes) + 1, above.n)


def _smooth(
    levels: Sequence[_Level], rows: int, folder: pathlib.Path, advance: Callable[[int], None]
) -> dict[str, dict[str, np.ndarray]]:
    """Probabilities and backoffs, from order 1 on."""
    found: dict[str, dict[str, np.ndarray]] = {}
    n_vocab = levels[0].n
    first = columns.Column(folder / 'first-0', np.int32)
    first.append(np.array([0, n_vocab]))
    lower = columns.Column(folder / 'lower-1', np.float32)
    lower.append(np.full(n_vocab, 1 / n_vocab))  # below the unigrams: uniform
    for k, level in enumerate(levels, 1):
        names = (f'prob-{k}', f'log_prob-{k}', f'log_backoff-{k - 1}')
        prob, log_prob, log_backoff = (columns.Column(folder / x, np.float32) for x in names)
        for probs, backoffs in _probs(level, first, lower):
            prob.append(probs)
            log_prob.append(np.log(probs))
            with np.errstate(divide='ignore'):
                log_backoff.append(np.log(backoffs))
            advance(len(probs))
        lower.remove()
        context = {'log_backoff': log_backoff.mapped(), 'first': first.mapped()}
        found.setdefault(f'order_{k - 1}', {}).update(context)
        found[f'order_{k}'] = {'token': level.token.mapped(), 'log_prob': log_prob.mapped()}
        if k < len(levels):
            first = level.first
            lower = _sent(level, prob, levels[k].n, rows, folder)
            level.above.remove()
        level.count.remove()
        prob.remove()
    del found['order_0']  # the empty context
    return found


def _probs(
    level: _Level, first: columns.Column, lower: columns.Column
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Probabilities of k-grams, and what their contexts leave for the order below.

    Args:
      first: where each context's k-grams begin; in the end, their number.
      lower: the probability of each k-gram without its first token.
    """
    discount = level.discounts()
    for start, stop in columns.chunks(len(first) - 1, _BLOCK):
        begins = first.read(start, stop + 1).astype(np.int64)
        for one, last in columns.pieces(begins[1:] - begins[0], _BLOCK):
            n, here, there = last - one, int(begins[one]), int(begins[last])
            count = level.count.read(here, there)
            kind = np.minimum(count, 3).astype(np.int64)
            context = np.repeat(np.arange(n), np.diff(begins[one : last + 1]))
            total = np.bincount(context, count, n)
            kinds = np.bincount(4 * context + kind, minlength=4 * n).reshape(n, 4)
            given_up = sum(kinds[:, i] * discount[i] for i in (1, 2, 3))
            backoff = np.where(total > 0, given_up / np.maximum(total, 1), 1.0)
            prob = (count - discount[kind]) / np.maximum(total, 1)[context]
            yield prob + backoff[context] * lower.read(here, there), backoff


def _sent(
    level: _Level, prob: columns.Column, n_above: int, rows: int, folder: pathlib.Path
) -> columns.Column:
    """For each (k+1)-gram, the probability of the k-gram that it ends in.

    They are known k-gram by k-gram: each goes to the file of its share of the (k+1)-grams, and the
    shares, which fit in memory, are put in order.
    """
    rows = min(rows, max(1, n_above))
    shares = [
        columns.Table(folder / f'share-{number}', np.uint32, np.float32)
        for number in range(max(1, -(-n_above // rows)))
    ]
    done = 0
    for start, stop in columns.chunks(level.n, _BLOCK):
        counts, probs = level.count.read(start, stop), prob.read(start, stop)
        ends = np.cumsum(counts, dtype=np.int64)
        for first, last in columns.pieces(ends, _BLOCK):
            n = int(counts[first:last].sum())
            places = level.above.read(done, done + n)
            real = places < n_above  # others begin with a boundary
            places, sent = places[real], np.repeat(probs[first:last], counts[first:last])[real]
            done += n
            for share, mine in zip(shares, _dealt(places // rows, len(shares)), strict=True):
                share.append(places[mine] % rows, sent[mine])
    lower = columns.Column(folder / f'lower-{level.keys.order + 1}', np.float32)
    for number, share in enumerate(shares):
        found = np.zeros(min(rows, n_above - number * rows), np.float32)
        for start, stop in columns.chunks(len(share), _BLOCK):
            places, sent = share.read(start, stop)
            found[places] = sent
        lower.append(found)
        share.remove()
    return lower


def _dealt(number: np.ndarray, n: int) -> list[np.ndarray]:
    """The places of each of n numbers."""
    order = np.argsort(number.astype(np.min_scalar_type(n)), kind='stable')  # few: by radix
    return np.split(order, np.cumsum(np.bincount(number, minlength=n))[:-1])
