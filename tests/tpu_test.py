# SPDX-License-Identifier: Apache-2.0
"""Train steps compiled for real TPU topologies, without a TPU: memory, kernels, collectives."""

import json
import math
import os
import pathlib
import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow
LIBTPU = pathlib.Path(sys.prefix) / 'tpu'  # beside the environment: see the Makefile
PROGRAM = pathlib.Path(__file__).resolve().parents[1] / 'benchmarks' / 'tpu_memory.py'


def compiled(*flags: str) -> dict:
    if not LIBTPU.is_dir():
        pytest.skip('no libtpu; make test-all installs it')
    env = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
    ended = subprocess.run(
        [sys.executable, str(PROGRAM), *flags],
        capture_output=True,
        text=True,
        env=env | {'PYTHONPATH': f'{LIBTPU}{os.pathsep}{PROGRAM.parents[1]}'},
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(ended.stdout.splitlines()[-1])


def gathered(found: dict) -> list[tuple[int, ...]]:
    """Shapes of floats that are gathered from all devices."""
    if found['collectives'] is None:
        pytest.skip(f'the compiled text is not to be had: {found["why_not"]}')
    shapes = [
        re.fullmatch(r'all-gather (bf16|f32)\[([\d,]*)\]', name) for name in found['collectives']
    ]
    return [tuple(map(int, m[2].split(','))) for m in shapes if m and m[2]]


def holds_weights_only(found: dict) -> bool:
    """Whether nothing larger than a weight of one layer, or the vocabulary's table, is gathered."""
    model = found['model']
    table = math.prod((model['n_vocab'], model['d_model']))
    largest = model['d_model'] * max(model['d_ff'], model['n_heads'] * model['d_head'])
    sizes = [math.prod(shape) for shape in gathered(found)]
    return all(size <= largest or size == table for size in sizes)


# MaxText's setting: bf16 compute, fp32 weights and Adam, full remat, fsdp alone, 2048 tokens.
@pytest.mark.parametrize(
    ('size', 'topology', 'windows', 'billions', 'gib'),
    [
        ('gpt3-1.3b', 'v5e:4x4', 4, 1.316, 3.6),
        ('gpt3-13b', 'v5e:16x16', 4, 12.853, 8.0),
        ('gpt3-175b', 'v5p:8x8x8', 2, 174.604, 21.0),
    ],
)
def test_memory_at_the_peak(size, topology, windows, billions, gib):
    found = compiled(f'--size={size}', f'--topology={topology}', f'--windows={windows}')
    print({k: v for k, v in found.items() if k not in ('model', 'collectives')})
    assert found['parameters'] / 1e9 == pytest.approx(billions, abs=0.001)
    assert found['peak_gib'] <= gib
    assert any('dkv' in kernel for kernel in found['kernels'] or ['dkv'])
    assert holds_weights_only(found)


def test_the_program_does_not_grow_with_depth():
    shallow, deep = (
        compiled(
            '--size=gpt3-1.3b',
            '--set',
            f'n_layers={n}',
            '--set',
            'd_model=512',
            '--set',
            'd_ff=2048',
            '--set',
            'n_heads=4',
        )
        for n in (4, 48)
    )
    assert deep['lines'] < 1.1 * shallow['lines']


def test_every_axis_at_once():
    """Ring attention: keys and values travel, no activation is gathered."""
    found = compiled('--size=gpt3-1.3b', '--mesh=2,2,2,2', '--set', 'n_vocab=50304')
    assert any(name.startswith('collective-permute') for name in found['collectives'])
    model = found['model']
    assert all(len(shape) < 4 for shape in gathered(found))  # heads of queries, keys, values
    assert (4, model['n_ctx'], model['d_model']) not in gathered(found)


def test_the_host_takes_moments_and_borders():
    here = compiled('--size=gpt3-1.3b', '--set', 'remat=blocks')
    there = compiled('--size=gpt3-1.3b', '--set', 'remat=offload', '--offload')
    assert there['host_gib'] == pytest.approx(2 * 4 * 1.3157e9 / 16 / 2**30, rel=0.01)
    assert there['argument_gib'] < 0.4 * here['argument_gib']
    assert there['peak_gib'] < here['peak_gib'] - 0.4  # 0.75 GiB of borders


@pytest.mark.parametrize('shard_moments', [False, True])
def test_gradients_travel_once_a_step_however_many_microbatches(shard_moments):
    flags = ('--size=gpt3-1.3b', '--mesh=4,4,1,1', '--set', 'n_layers=4')
    flags += ('--shard_moments',) if shard_moments else ()
    sent = [compiled(*flags, *more) for more in ((), ('--device_windows=1',))]
    for found in sent:
        assert found['over_replicas']['in_loops'] == {}
        once, share = found['over_replicas']['once'], found['parameters'] / 4
        if shard_moments:
            assert once['reduce-scatter f32'] > 0.9 * share
            # One array, the table of positions, is added up whole before it is split.
            assert once['reduce-scatter f32'] + once['all-reduce f32'] < 1.05 * share
            assert once['all-gather f32'] > 0.5 * share
        else:
            assert once['all-reduce f32'] == pytest.approx(share, rel=0.02)
    assert sent[0]['over_replicas'] == sent[1]['over_replicas']


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_gradients_travel_in_the_dtype_that_is_asked_for(dtype):
    flags = ('--size=gpt3-125m', '--mesh=16,1,1,1', '--set', 'n_layers=2')
    found = compiled(*flags, f'--reduce_dtype={dtype}')
    kind = {'float32': 'f32', 'bfloat16': 'bf16'}[dtype]
    once = found['over_replicas']['once']
    assert once[f'all-reduce {kind}'] == pytest.approx(found['parameters'], rel=0.02)
    if kind == 'bf16':
        assert once.get('all-reduce f32', 0) < 100  # the sums


@pytest.mark.parametrize(
    ('topology', 'across'), [('v5e:4x4', 'data'), ('v5p:4x4x4', 'data'), ('v5e:4x4', 'fsdp')]
)
def test_two_slices_exchange_what_is_expected(topology, across):
    """Gradients alone; with fsdp across, weights, too, which are gathered in both passes."""
    flags = ('--size=gpt3-1.3b', f'--topology={topology}', '--set', 'n_layers=4')
    one = compiled(*flags)
    two = compiled(*flags, '--slices=2', f'--across={across}')
    inside = one['devices']
    sent = two['between_slices']
    print({k: two[k] for k in ('mesh', 'peak_gib', 'between_slices')}, one['peak_gib'])
    if across == 'data':
        assert set(sent) == {'ALL_REDUCE'}
        assert two['parameters'] <= inside * sent['ALL_REDUCE'] <= 1.05 * two['parameters']
        # Sums of gradients stand beside what is added to them, before they cross.
        assert two['peak_gib'] < 1.25 * one['peak_gib']
    else:
        assert set(sent) > {'ALL_GATHER'}
        # The gradient of the table of tokens is added up whole in each slice before it is split.
        assert two['peak_gib'] < 1.6 * one['peak_gib']
