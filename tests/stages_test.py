# SPDX-License-Identifier: Apache-2.0
"""Batches of other sizes: their programs are compiled while the present one runs."""

import contextlib
import threading

import jax
import jax.numpy as jnp
import pytest
from jax._src import monitoring

from gptjax.training import stages
from gptjax.training import step as step_lib
from tests import helpers


@pytest.fixture
def compiled():
    """The names of the threads that compiled something, as often as they did."""
    found = []

    def heard(event, seconds, **more):
        if event == '/jax/core/compile/backend_compile_duration':
            found.append(threading.current_thread().name)

    jax.monitoring.register_event_duration_secs_listener(heard)
    yield found
    monitoring.unregister_event_duration_listener(heard)


def test_the_next_stage_of_a_ramp_is_compiled_beside_the_one_before(compiled):
    model = helpers.tiny_model()
    optimizer = helpers.optimizer_of(helpers.plan_of(8 * 16, 16), model)
    mesh = helpers.one_device()
    batches = {
        size: [mesh.put(helpers.batch_of(size, 16, 64, seed=i)) for i in range(2)]
        for size in (2, 4, 8)
    }

    def losses(wrap):
        with mesh.scope():
            target = step_lib.abstract(model.init_params, optimizer, mesh.shardings)
            step = wrap(
                step_lib.make_train_step(
                    helpers.loss_of(model), optimizer, 0, step_lib.Options(), target
                )
            )
            state, found = step_lib.init(model.init_params, optimizer, 0, target), []
            counts = []
            for some in batches.values():
                for batch in some:
                    state, metrics = step(state, batch)
                    found.append(float(metrics['train/loss']))
                counts.append(compiled.count(threading.main_thread().name))
        return found, counts

    plain, _ = losses(lambda step: step)
    ahead, counts = losses(lambda step: stages.Stages(step, [2, 4, 8], mesh.scope))
    assert ahead == plain
    assert counts[0] == counts[1] == counts[2]
    assert sum('compiler' in name for name in compiled) == 2


def test_a_stage_that_does_not_compile_is_left_to_the_step():
    """Which then says what is wrong."""

    def step(state, batch):
        return state, {'rows': len(batch['x'])}

    staged = stages.Stages(step, [2, 4], contextlib.nullcontext)  # it cannot be lowered
    for rows in (2, 4):
        assert staged(jnp.zeros(1), {'x': jnp.zeros(rows)})[1] == {'rows': rows}
