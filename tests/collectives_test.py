# SPDX-License-Identifier: Apache-2.0
"""What travels between devices that hold the same weights: once a step, in the dtype asked for."""

import jax
import numpy as np
import pytest

from benchmarks import hlo
from gptjax.runtime import mesh as mesh_lib
from gptjax.runtime import replicas
from gptjax.training import step as step_lib
from tests import helpers

SIZES = (4, 2, 1, 1)


@pytest.fixture(scope='module')
def mesh():
    return mesh_lib.Mesh(mesh_lib.Config(*SIZES, slices=1, across='data'))


def made(mesh, model, **options):
    """(the step, the state's shapes)"""
    options = step_lib.Options(**options)
    optimizer = helpers.optimizer_of(helpers.plan_of(256, 16), model, eps=1e-3)
    target = step_lib.abstract(model.init_params, optimizer, mesh.shardings, options)
    loss = helpers.loss_of(model)
    step = step_lib.make_train_step(loss, optimizer, 0, options, target)
    return step, target, lambda: step_lib.init(model.init_params, optimizer, 0, target, options)


def sent(mesh, **options) -> dict:
    model = helpers.tiny_model(n_layers=4, scan_layers=True, compute_dtype='bfloat16')
    with mesh.scope():
        step, target, _ = made(mesh, model, **options)
        text = step.lower(target, mesh.abstract_batch(16, 16)).compile().as_text()
    parameters = sum(x.size for x in jax.tree.leaves(target.params))
    return hlo.over_replicas(text, SIZES) | {'parameters': parameters}


@pytest.mark.parametrize('device_windows', [0, 1])
def test_gradients_travel_once_a_step(mesh, device_windows):
    found = sent(mesh, device_windows=device_windows)
    assert found['in_loops'] == {}
    # Each device sends its share of the weights, and some sums.
    assert found['once']['all-reduce f32'] == pytest.approx(found['parameters'] / 2, rel=0.2)
    assert 'all-reduce bf16' not in found['once']


def test_otherwise_they_would_travel_in_every_microbatch_and_layer(mesh, monkeypatch):
    """What the test above looks for is found where it is."""
    monkeypatch.setattr(replicas, 'count', lambda: 1)
    monkeypatch.setattr(replicas, 'at_once', lambda rows, each: rows // 2)
    found = sent(mesh, device_windows=1)
    assert sum(found['in_loops'].values()) > found['parameters'] / 10  # each time round


def trained(mesh, monkeypatch, **options):
    """Losses and weights after three steps, and the state's shapes."""
    monkeypatch.setattr(replicas, '_WORTH', 64)
    model = helpers.tiny_model(residual_dropout=0.1)
    losses = []
    with mesh.scope():
        step, target, fresh = made(mesh, model, **options)
        state = fresh()
        for number in range(3):
            state, metrics = step(state, mesh.put(helpers.batch_of(16, 16, 64, seed=number)))
            losses.append(float(metrics['train/loss']))
        for x, wanted in zip(*map(jax.tree.leaves, (state, target)), strict=True):
            assert x.sharding.is_equivalent_to(wanted.sharding, x.ndim)
    return losses, jax.tree.map(np.asarray, state.params), target


@pytest.mark.parametrize(
    ('options', 'rtol'),
    [
        ({'shard_moments': True}, 1e-6),
        ({'shard_moments': True, 'ema_decay': 0.9, 'device_windows': 1}, 1e-6),
        ({'reduce_dtype': 'bfloat16'}, 1e-3),
    ],
)
def test_however_they_travel_losses_are_the_same(mesh, monkeypatch, options, rtol):
    alone, _, _ = trained(helpers.one_device(), monkeypatch)
    losses, _, target = trained(mesh, monkeypatch, **options)
    np.testing.assert_allclose(losses, alone, rtol=max(rtol, 1e-5))
    if 'shard_moments' in options:
        (mu,) = (s.mu for s in jax.tree.leaves(target.opt_state, is_leaf=_has_mu) if _has_mu(s))
        held = sum(np.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(mu))
        whole = sum(x.size for x in jax.tree.leaves(mu))
        assert held < 1.2 * whole / 8


def _has_mu(x: object) -> bool:
    return hasattr(x, 'mu')


def test_the_dtype_that_is_asked_for_is_what_is_added(mesh, monkeypatch):
    """As XLA is told on accelerators; its CPUs cannot add bfloat16 up between devices."""
    monkeypatch.setattr(replicas, 'platform', lambda: 'tpu')
    with mesh.scope():
        step, target, _ = made(mesh, helpers.tiny_model(), reduce_dtype='bfloat16')
        traced = step.trace(target, mesh.abstract_batch(16, 16)).jaxpr
    widths = {x.aval.dtype.name for x in added(traced.jaxpr) if x.aval.ndim > 1}
    assert widths == {'bfloat16'}


def added(jaxpr) -> list:
    """What is added up over the replicas."""
    found = []
    for equation in jaxpr.eqns:
        over = equation.params.get('axes', ())
        if equation.primitive.name.startswith('psum') and replicas.AXIS in over:
            found += equation.invars
        for value in equation.params.values():
            inner = getattr(value, 'jaxpr', value)
            if hasattr(inner, 'eqns'):
                found += added(inner)
    return found
