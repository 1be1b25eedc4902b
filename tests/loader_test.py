# SPDX-License-Identifier: Apache-2.0
"""The loader's promise about order, and how it reads."""

import dataclasses
import pathlib
import threading

import numpy as np
import pytest

from gptjax.configs import errors
from gptjax.data import loader, shards, token_manifest, tokens
from gptjax.runtime import mesh as mesh_lib
from gptjax.training import plan as plan_lib
from tests import helpers


def _numbers(first: int, length: int) -> tokens.TokenSet:
    """A token set of consecutive numbers."""
    array = np.arange(first, first + length)
    return helpers.token_set(array)


def _config(weights=(0.7, 0.3)):
    return loader.Config(
        ('a', 'b')[: len(weights)], weights, (('a', 'a'),), 2, 3, 'x', 'auto', 'changed'
    )


def _windows(plan, rows_of, steps, n_ctx, hosts, columns=1, start=0):
    """All windows in order, put together from what each host reads."""
    sets = [_numbers(0, 1001), _numbers(5000, 701)]
    found = []
    parts = []
    for host in range(hosts * columns):
        row, column = divmod(host, columns)
        width = n_ctx // columns

        def region(n, row=row, column=column, width=width):
            return np.arange(n)[rows_of(n, row)], slice(column * width, (column + 1) * width)

        parts.append(
            list(loader.batches(sets, _config(), n_ctx, 7, plan.examples, region, start, steps))
        )
    for step in zip(*parts, strict=True):
        rows = [
            np.concatenate([step[h * columns + c]['tokens'] for c in range(columns)], axis=1)
            for h in range(hosts)
        ]
        found.append(np.concatenate(rows))
    return np.concatenate(found)


@pytest.mark.parametrize('seed', range(3))
def test_first_windows_are_those_that_training_reads(seed):
    """Of two sets by weight, up to nearly all of them; what would come twice is refused."""
    sets, n_ctx, weights = [_numbers(0, 1001), _numbers(5000, 701)], 10, (0.6, 0.4)
    order = loader.windows(sets, weights, n_ctx, seed)
    for count in (1, 17, 150):
        chosen = loader.first_windows(sets, weights, n_ctx, seed, count)
        found = {
            int(start) + n_ctx * int(place)
            for start, places in zip((0, 5000), chosen, strict=True)
            for place in places
        }
        assert found == {int(order[i]()[0]) for i in range(count)}
        assert sum(map(len, chosen)) == count
        assert all((np.diff(places) > 0).all() for places in chosen)
    with pytest.raises(errors.InputError, match='holds .* windows of 10 tokens'):
        loader.first_windows(sets, weights, n_ctx, seed, 200)


def test_windows_are_the_same_for_ramps_hosts_and_columns():
    rng = np.random.default_rng(0)
    n_ctx = 10
    reference = loader.windows([_numbers(0, 1001), _numbers(5000, 701)], (0.7, 0.3), n_ctx, 7)
    for _ in range(12):
        hosts, columns = rng.choice([1, 2, 4]), rng.choice([1, 2, 5])
        full = int(rng.integers(2, 6)) * 4
        over, stages = int(rng.integers(50, 3000)), int(rng.integers(1, 6))
        config = plan_lib.Config(full * n_ctx, 1, 4 * n_ctx, over, stages)
        plan = plan_lib.of_tokens(config, n_ctx, 10_000)
        found = _windows(
            plan,
            lambda n, h, hosts=hosts: slice(h * n // hosts, (h + 1) * n // hosts),
            30,
            n_ctx,
            hosts,
            columns,
        )
        expected = np.stack([reference[i]()[:-1] for i in range(len(found))])
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize('sizes', [(8, 1, 1, 1), (2, 2, 1, 2), (1, 4, 2, 1), (1, 1, 1, 8)])
def test_windows_are_the_same_on_every_mesh(sizes):
    mesh, n_ctx = mesh_lib.Mesh(mesh_lib.Config(*sizes, slices=1, across='data')), 16
    plan = helpers.plan_of(24 * 16, 16, ramp_from_tokens=8 * 16, ramp_over_tokens=2000)
    sets = [_numbers(0, 1001), _numbers(5000, 701)]
    reference = loader.windows(sets, (0.7, 0.3), n_ctx, 7)
    batches = loader.batches(
        sets, _config(), n_ctx, 7, plan.examples, lambda n: mesh.region(n, n_ctx), 0, 12
    )
    for step, batch in enumerate(batches):
        first, count = plan.examples(step)
        found = mesh.put(batch)
        expected = np.stack([reference[first + row]() for row in range(count)])
        np.testing.assert_array_equal(found['tokens'], expected[:, :-1])
        np.testing.assert_array_equal(found['targets'], expected[:, 1:])


def test_windows_of_a_batch_are_read_side_by_side():
    """A disk that takes 20 ms to answer would else hold training up."""
    meet = threading.Barrier(16)  # breaks, unless sixteen wait at once

    class Slow(shards.Shard):
        def request(self, start, stop):
            def read():
                meet.wait(60)
                return np.arange(start, stop)

            return read

    record = token_manifest.Record('a.bin', 40 * 64 + 1, 1, 0, 0, '')
    slow = Slow(pathlib.Path('slow'), record)
    token_set = dataclasses.replace(_numbers(0, 10), _shards=[slow], _ends=[slow.n_tokens])
    plan = helpers.plan_of(16 * 40, 40)
    config = dataclasses.replace(_config((1.0,)), read_threads=16)
    found = next(
        loader.batches(
            [token_set], config, 40, 0, plan.examples, lambda n: (np.arange(n), slice(0, 40)), 0, 1
        )
    )
    assert found['tokens'].shape == (16, 40)


def test_starting_anywhere_gives_the_same_batches():
    plan = helpers.plan_of(8 * 10, 10, ramp_from_tokens=20, ramp_over_tokens=900, ramp_stages=3)
    whole = _windows(plan, lambda n, h: slice(0, n), 40, 10, 1)
    for start in (1, 7, 39):
        rest = _windows(plan, lambda n, h: slice(0, n), 40, 10, 1, start=start)
        np.testing.assert_array_equal(rest, whole[plan.examples(start)[0] :])


def test_an_epoch_has_every_window_once_and_the_next_another_order():
    windows = loader.windows([_numbers(0, 1001)], (1.0,), 10, 3)
    first = [int(windows[i]()[0]) for i in range(100)]
    second = [int(windows[i]()[0]) for i in range(100, 200)]
    assert sorted(first) == sorted(second) == list(range(0, 1000, 10))
    assert first != second
    assert first != sorted(first)


def test_mixture_keeps_its_weights():
    windows = loader.windows([_numbers(0, 1001), _numbers(5000, 701)], (0.7, 0.3), 10, 3)
    from_second = sum(int(windows[i]()[0]) >= 5000 for i in range(1000))
    assert from_second == pytest.approx(300, abs=2)


def test_a_late_step_comes_at_once():
    sets = [_numbers(0, 1001)]
    plan = helpers.plan_of(80, 10)
    batches = loader.batches(
        sets,
        _config((1.0,)),
        10,
        0,
        plan.examples,
        lambda n: (np.arange(n), slice(0, 10)),
        300_000,
        300_001,
    )
    assert next(batches)['tokens'].shape == (8, 10)
    with pytest.raises(StopIteration):
        next(batches)


def test_corpus_smaller_than_a_window():
    with pytest.raises(errors.InputError, match='less than one window'):
        loader.windows([_numbers(0, 10)], (1.0,), 10, 0)
