# SPDX-License-Identifier: Apache-2.0
"""The gradient noise scale: unbiased, on any number of microbatches and groups of devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptjax.runtime import mesh as mesh_lib
from gptjax.training import losses, noise
from gptjax.training import step as step_lib
from tests import helpers


def test_is_right_where_it_is_known():
    """Gradients of known mean and variance: both estimates are right on average."""
    rng = np.random.default_rng(0)
    pieces, rows, mean, spread = 4, 8, np.array([0.3, -0.1, 0.2]), 1.5
    steps = mean + spread * rng.standard_normal((4000, pieces, rows, 3))

    @jax.jit
    @jax.vmap
    def measured(grads):
        sums = jax.vmap(lambda g: noise.of_piece(g.sum(0), jnp.array(float(rows))))(grads)
        norm = jnp.linalg.norm(grads.mean((0, 1)))
        return noise.measured(
            {name: each.sum() for name, each in sums.items()}, jnp.array(float(pieces * rows)), norm
        )

    found = measured(jnp.asarray(steps))
    trace, square = (float(found[name].mean()) for name in (noise.TRACE, noise.SQUARE))
    assert trace == pytest.approx(3 * spread**2, rel=0.02)
    assert square == pytest.approx(mean @ mean, rel=0.1)
    assert noise.scale({noise.TRACE: trace, noise.SQUARE: square})[noise.SCALE] > 0
    assert noise.scale({noise.TRACE: 1.0, noise.SQUARE: -1.0}) == {}


@pytest.mark.parametrize(('data', 'fsdp', 'device_windows'), [(1, 1, 2), (2, 4, 1), (8, 1, 2)])
def test_a_step_measures_it_as_gradients_of_its_microbatches_say(data, fsdp, device_windows):
    """Beside the gradient of each microbatch, taken by itself, on any mesh."""
    model, rows = helpers.tiny_model(), 16
    batch = helpers.batch_of(rows, 16, 64)
    optimizer = helpers.optimizer_of(helpers.plan_of(rows * 16, 16), model)
    mesh = helpers.one_device()
    if data * fsdp > 1:
        mesh = mesh_lib.Mesh(mesh_lib.Config(data, fsdp, 1, 1, slices=1, across='data'))
    with mesh.scope():
        target = step_lib.abstract(model.init_params, optimizer, mesh.shardings)
        options = step_lib.Options(device_windows=device_windows, measure_noise=True)
        step = step_lib.make_train_step(helpers.loss_of(model), optimizer, 0, options, target)
        state = step_lib.init(model.init_params, optimizer, 0, target)
        params = jax.tree.map(np.asarray, state.params)
        _, found = step(state, mesh.put(batch))
    loss = helpers.loss_of(model)
    grad = jax.jit(jax.grad(lambda p, b: loss(p, b, jax.random.key(0))[0]))
    in_group = rows // data
    strides = in_group // (fsdp * device_windows)  # microbatches of a group: every so many rows
    places = np.arange(rows).reshape(data, in_group // strides, strides)
    pieces = places.transpose(0, 2, 1).reshape(-1, in_group // strides)
    grads = []
    for some in pieces:
        part = {name: x[some] for name, x in batch.items()} | {losses.ROWS: some}
        tokens = part['weights'].sum()
        grads.append(jax.tree.map(functools.partial(np.multiply, 1 / tokens), grad(params, part)))
    small = np.mean([float(optax.tree.norm(g)) ** 2 for g in grads])
    large = float(optax.tree.norm(jax.tree.map(lambda *g: sum(g) / len(g), *grads))) ** 2
    tokens = rows * 16
    trace = (small - large) / (len(pieces) / tokens - 1 / tokens)
    square = (tokens * large - tokens / len(pieces) * small) / (tokens - tokens / len(pieces))
    assert float(found[noise.TRACE]) == pytest.approx(trace, rel=1e-3)
    assert float(found[noise.SQUARE]) == pytest.approx(square, rel=1e-2, abs=1e-5)
