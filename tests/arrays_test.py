# SPDX-License-Identifier: Apache-2.0
"""Arrays of checkpoints that several devices hold: each part is read by one of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.runtime import arrays, checkpoint, replicas
from gptjax.runtime import mesh as mesh_lib


@pytest.mark.parametrize('sizes', [(8, 1, 1, 1), (4, 2, 1, 1), (2, 2, 2, 1), (1, 8, 1, 1)])
def test_every_byte_is_read_once_however_many_hold_it(tmp_path, monkeypatch, sizes):
    monkeypatch.setattr(replicas, '_WORTH', 1)
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
