# SPDX-License-Identifier: Apache-2.0
"""Training batches on Grain: window i is f(seed, i), so a batch is a function of its place alone.

Neither the number of hosts, nor the mesh, nor accumulation, nor the batch ramp changes which
windows come in which order; a process merely reads the rows and columns that its own devices hold.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple, TypeVar

import grain
import ml_collections
import numpy as np

from gptjax.configs import errors, fields
from gptjax.data import tokens
from gptjax.storage import buckets

# windows -> the (rows, columns) of a (windows, n_ctx) batch that this process reads
Region = Callable[[int], tuple[np.ndarray, slice]]


_MOST_APART = 10**5  # windows between two of a set
_STREAMED_STEPS = 8  # whose windows are asked for at once, of sets in buckets
T = TypeVar('T')


@dataclasses.dataclass(frozen=True)
class Config:
    """The data section of configs/base.py."""

    sets: tuple[str, ...]
    weights: tuple[float, ...]
    eval_sets: tuple[tuple[str, str], ...]  # (label, folder)
    prefetch_steps: int
    read_threads: int
    stage_dir: str
    read: Literal['auto', 'stage', 'stream']
    verify: Literal['changed', 'always', 'never']

    def __post_init__(self) -> None:
        errors.require(bool(self.sets), 'data.sets is empty; name at least one folder of shards')
        errors.require(
            all(isinstance(s, str) for s in self.sets), f'data.sets holds a non-string: {self.sets}'
        )
        errors.require(
            len(self.sets) == len(self.weights),
            f'data.weights has {len(self.weights)} entries for {len(self.sets)} data.sets',
        )
        errors.require(
            all(isinstance(w, int | float) and 1e-9 <= w <= 1e9 for w in self.weights),
            f'data.weights must be numbers from 1e-9 to 1e9, got {self.weights}',
        )
        errors.require_between(self, 1, 1024, 'prefetch_steps', 'read_threads')
        errors.require_choice(self, 'read', ('auto', 'stage', 'stream'))
        errors.require_choice(self, 'verify', ('changed', 'always', 'never'))
        for label, folder in self.eval_sets:
            errors.require(
                isinstance(folder, str) and bool(label) and '/' not in label,
                f'data.eval_sets is label -> folder, a label without "/"; got {label!r} -> '
                f'{folder!r}',
            )


def configure(section: fields.Values) -> Config:
    """The Config of a data section; held-out sets without a folder are none.

    Raises:
      UsageError: a field is unknown, missing or out of range.
    """
    fields.check(section, (f.name for f in dataclasses.fields(Config)), 'the data section')
    sets = section['eval_sets']
    errors.require(
        isinstance(sets, Mapping | ml_collections.ConfigDict),
        f'data.eval_sets is label -> folder, as data.eval_sets.wiki=wiki/tokens; got {sets!r}',
    )
    named = tuple((label, folder) for label, folder in sorted(sets.items()) if folder)
    return fields.make(Config, {**section, 'eval_sets': named}, 'data')


class Order(NamedTuple):
    """From which window on sets are mixed as they are, and how far each was read before.

    at: windows that have come before. numbers: one of each set, for its shuffle. offsets: windows
    of each set among those before. gone: [what identifies it, number, offset] of sets that were
    mixed before and are not now.
    """

    at: int
    numbers: list[int]
    offsets: list[int]
    gone: list[list]


def from_start(count: int) -> Order:
    """The order of so many sets from the beginning."""
    return Order(0, list(range(count)), [0] * count, [])


def mixed_anew(
    before: Order,
    sets: Sequence[str],
    weights: Sequence[float],
    at: int,
    wanted: Sequence[str],
) -> Order:
    """The order of other sets, or of the same by other weights, behind the first `at` windows.

    Args:
      before: the order so far, of `sets`, which were mixed by `weights`.
      sets, wanted: what identifies each set, before and from there on.

    Each set goes on where it stands, also if it was away; one that is new begins, with a number
    that none had. Of a set that is named twice each goes its own way.
    """
    read = _read(weights, at - before.at)
    ends = [offset + more for offset, more in zip(before.offsets, read, strict=True)]
    known = [list(each) for each in zip(sets, before.numbers, ends, strict=True)] + before.gone
    new = itertools.count(max(number for _, number, _ in known) + 1)
    numbers, offsets = [], []
    for name in wanted:
        found = next((each for each in known if each[0] == name), None)
        if found:
            known.remove(found)
        _, number, offset = found or (name, next(new), 0)
        numbers.append(number)
        offsets.append(offset)
    return Order(at, numbers, offsets, known)


def _read(weights: Sequence[float], count: int) -> list[int]:
    """How many of the first `count` windows of a mixture are of each set."""
    endless = [grain.MapDataset.range(2**60) for _ in weights]
    labelled = [each.map(functools.partial(_label, n)) for n, each in enumerate(endless)]
    mixture, found = grain.MapDataset.mix(labelled, list(weights)), {}
    for index in range(count, count + _MOST_APART):  # the next of each set says how many came
        number, place = mixture[index]
        found.setdefault(number, place)
        if len(found) == len(weights):
            break
    # Of a set whose next one is out of sight: its share, to a window.
    return [found.get(n, int(count * w / sum(weights))) for n, w in enumerate(weights)]


def _label(number: int, place: int) -> tuple[int, int]:
    return number, place


def windows(
    sets: Sequence[tokens.TokenSet],
    weights: Sequence[float],
    n_ctx: int,
    seed: int,
    columns: slice = slice(None),
    order: Order | None = None,
) -> grain.MapDataset:
    """The endless sequence of training windows; element i is f(seed, i), called for its tokens.

    Each set is cut into windows of n_ctx + 1 tokens (the last token of one is the first of the
    next), shuffled anew every epoch, without replacement within it; sets are mixed by weight.

    Args:
      columns: the part of 0 .. n_ctx that is read; an element has one token more, the target.
      order: None = from the beginning; element 0 is the window `at` of another one.

    Raises:
      InputError: a set is smaller than one window.
    """
    mixed, order = [], order or from_start(len(sets))
    for index, token_set in enumerate(sets):
        source = _Windows(token_set, n_ctx, columns)
        if len(source) == 0:
            raise errors.InputError(
                f'{token_set.folder} holds {len(token_set):,} training tokens, less than one '
                f'window of n_ctx + 1 = {n_ctx + 1}; use more text or a smaller '
                '--config.model.n_ctx'
            )
        dataset = grain.MapDataset.source(source)
        number, offset = order.numbers[index], order.offsets[index]
        endless = dataset.shuffle(seed=_seed_of(seed, number)).repeat()
        mixed.append(endless[offset:] if offset else endless)
    return grain.MapDataset.mix(mixed, list(weights))


def first_windows(
    sets: Sequence[tokens.TokenSet], weights: Sequence[float], n_ctx: int, seed: int, count: int
) -> list[np.ndarray]:
    """Which windows of each set are among the first so many of windows(), in the set's order.

    Raises:
      InputError: a set is to be read a second time before they are so many.
    """
    sizes = [len(_Windows(token_set, n_ctx, slice(None))) for token_set in sets]
    mixed = [
        grain.MapDataset.range(size)
        .shuffle(seed=_seed_of(seed, number))
        .repeat()
        .map(functools.partial(_label, number))
        for number, size in enumerate(sizes)
    ]
    mixture = grain.MapDataset.mix(mixed, list(weights))
    found = np.array([mixture[i] for i in range(count)], np.int64).reshape(count, 2)
    chosen = [np.sort(found[found[:, 0] == number, 1]) for number in range(len(sets))]
    for token_set, places, size in zip(sets, chosen, sizes, strict=True):
        if len(places) > size:
            raise errors.InputError(
                f'{token_set.folder} holds {size:,} windows of {n_ctx} tokens, and '
                f'{len(places):,} are wanted; ask for fewer tokens'
            )
    return chosen


def _seed_of(seed: int, number: int) -> int:
    """Of the shuffle of the set with a number."""
    return (seed * 1009 + number) % 2**31


def batches(
    sets: Sequence[tokens.TokenSet],
    config: Config,
    n_ctx: int,
    seed: int,
    examples: Callable[[int], tuple[int, int]],
    region: Region,
    start_step: int,
    stop_step: int,
    order: Order | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Prefetched batches of steps start_step .. stop_step - 1.

    Args:
      examples: step -> (first window, number of windows), training.plan's closed form.
      region: which part of the batch this process holds.
      order: as windows() takes it.

    Yields:
      'tokens' and 'targets' (rows, columns) int32, 'weights' (rows, columns) float32.
    """
    columns = region(examples(start_step)[1])[1]
    source = _Steps(
        windows(sets, config.weights, n_ctx, seed, columns, order),
        order.at if order else 0,
        examples,
        region,
        stop_step,
        config.read_threads,
    )
    steps = grain.MapDataset.source(source)[start_step:]
    threads = _STREAMED_STEPS if _are_streamed(sets) else 1
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=steps_held(sets, config))
    return iter(steps.to_iter_dataset(options))


def steps_held(sets: Sequence[tokens.TokenSet], config: Config) -> int:
    """How many batches are held at most."""
    return max(config.prefetch_steps, _STREAMED_STEPS if _are_streamed(sets) else 1)


def _are_streamed(sets: Sequence[tokens.TokenSet]) -> bool:
    return any(isinstance(s.folder, buckets.Path) for s in sets)


class _Windows:
    """Non-overlapping windows over one token set."""

    def __init__(self, token_set: tokens.TokenSet, n_ctx: int, columns: slice) -> None:
        self._set, self._n_ctx = token_set, n_ctx
        self._first, stop, _ = columns.indices(n_ctx)
        self._length = stop - self._first + 1

    def __len__(self) -> int:
        return (len(self._set) - 1) // self._n_ctx

    def __getitem__(self, index: int) -> Callable[[], np.ndarray]:
        return self._set.request(index * self._n_ctx + self._first, self._length)


class _Steps:
    """Batches by step."""

    def __init__(
        self,
        source: grain.MapDataset,
        at: int,
        examples: Callable[[int], tuple[int, int]],
        region: Region,
        stop_step: int,
        threads: int,
    ) -> None:
        self._windows, self._at = source, at
        self._examples, self._region = examples, region
        self._stop, self._threads = stop_step, threads
        self._readers = concurrent.futures.ThreadPoolExecutor(threads, 'reader')

    def __len__(self) -> int:
        return self._stop

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        first, count = self._examples(step)
        rows = (first - self._at + self._region(count)[0]).tolist()
        asked = [self._windows[row] for row in rows]  # all of them are on their way
        read = np.stack(self._called(asked)).astype(np.int32)
        tokens_BxL, targets_BxL = read[:, :-1], read[:, 1:]
        weights_BxL = np.ones(tokens_BxL.shape, np.float32)
        return {'tokens': tokens_BxL, 'targets': targets_BxL, 'weights': weights_BxL}

    def _called(self, requests: Sequence[Callable[[], T]]) -> list[T]:
        """What each gives, a share of them in each thread: a disk may take long to answer."""
        share = -(-len(requests) // self._threads)
        shares = [requests[i : i + share] for i in range(0, len(requests), share)]
        found = self._readers.map(lambda some: [request() for request in some], shares)
        return [each for some in found for each in some]
