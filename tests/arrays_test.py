# SPDX-License-Identifier: Apache-2.0
"""Arrays of checkpoints that several devices hold: each part is read by one of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import train
from gptjax.models import pretrained
from gptjax.runtime import arrays, checkpoint, program, replicas
from gptjax.runtime import mesh as mesh_lib
from tests import helpers


@pytest.mark.parametrize('sizes', [(8, 1, 1, 1), (4, 2, 1, 1), (2, 2, 2, 1), (1, 8, 1, 1)])
def test_every_byte_is_read_once_however_many_hold_it(tmp_path, monkeypatch, sizes):
    monkeypatch.setattr(replicas, '_WORTH', 1)
    monkeypatch.setattr(arrays, '_SPREAD_BYTES', 600)  # each array for itself
    drawn = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    params, rest = {'a': drawn}, {'step': np.int32(3), 'mu': {'a': drawn * 2}}
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=2)
    expected = jax.tree.map(jnp.asarray, {'params': params, 'rest': rest})
    checkpoints.save(3, expected, {'config': {}})
    checkpoints.close()
    mesh = mesh_lib.Mesh(mesh_lib.Config(*sizes, slices=1, across='data'))
    split = jax.sharding.NamedSharding(mesh.mesh, jax.sharding.PartitionSpec('fsdp', 'tensor'))
    whole = jax.sharding.NamedSharding(mesh.mesh, jax.sharding.PartitionSpec())

    def wanted(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split if x.ndim else whole)

    asked, restore = [], arrays.restore

    def counting(folder, items):
        for x in jax.tree.leaves(items):
            if x.ndim:
                asked.append(np.prod(x.sharding.shard_shape(x.shape)) * 8 / x.size)
        return restore(folder, items)

    monkeypatch.setattr(arrays, 'restore', counting)
    targets = jax.tree.map(wanted, expected)
    arrays.compile_ahead(targets)
    found = checkpoint.restore(*checkpoint.latest(tmp_path), **targets)
    assert asked == [1.0, 1.0]
    for x, target, value in zip(*map(jax.tree.leaves, (found, targets, expected)), strict=True):
        assert x.sharding.is_equivalent_to(target.sharding, x.ndim)
        np.testing.assert_array_equal(x, value)


@pytest.mark.parametrize(
    'flags',
    [
        pytest.param((), marks=pytest.mark.slow),  # each compiles for a minute
        ('--config.optim.shard_moments=True',),
    ],
)
def test_a_run_whose_arrays_are_read_in_parts_goes_on_bit_equal(
    config_file, tmp_path, monkeypatch, flags
):
    """Moments that are split over devices already are read as they are."""
    monkeypatch.setattr(replicas, '_WORTH', 64)
    helpers.prepare(config_file, tmp_path / 'data')
    mesh = ('--config.mesh.data=2', '--config.mesh.fsdp=4', '--config.model.n_layers=1')

    def run(name, looks):
        workdir = tmp_path / name
        if not workdir.exists():
            helpers.fresh(workdir, tmp_path / 'data')
        looks = iter(looks)
        monkeypatch.setattr(program, 'stop_requested', lambda: next(looks, False))
        train.main(helpers.args(config_file, workdir, *mesh, *flags))
        found = pretrained.load(str(workdir)).params
        return [np.asarray(x).tobytes() for x in jax.tree.leaves(found)]

    with pytest.raises(program.Preempted):
        run('stopped', [False, True])
    assert run('stopped', []) == run('alone', [])
