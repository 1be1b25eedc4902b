# SPDX-License-Identifier: Apache-2.0
"""Pinned losses: any change of what training computes shows here."""

import jax
import numpy as np

from gptjax.training import step as step_lib
from tests import helpers

PINNED = [4.203380, 4.193172, 4.058825, 3.920117, 3.909289]
MESSAGE = """
The losses of a fixed tiny run have changed. If you meant to change initialisation, model, loss,
random numbers or optimiser, say so in LOG.md and pin the new values in this file. If you did not,
you have found a bug: do not update the numbers. A new version of JAX may move them by 1e-5 at most.
"""


def test_losses_are_those_pinned():
    model = helpers.tiny_model(attention=('dense', 'banded'), band_width=4, residual_dropout=0.1)
    plan = helpers.plan_of(8 * 16, 16)
    optimizer = helpers.optimizer_of(plan, model)
    mesh = helpers.one_device()
    train_step = step_lib.make_train_step(
        helpers.loss_of(model), optimizer, 0, step_lib.Options(device_windows=4)
    )
    losses = []
    with mesh.scope():
        target = step_lib.abstract(model.init_params, optimizer, mesh.shardings)
        state = step_lib.init(model.init_params, optimizer, 0, target)
        for step in range(5):
            batch = mesh.put(helpers.batch_of(8, 16, 64, seed=step % 2))
            state, metrics = train_step(state, jax.device_put(batch))
            losses.append(float(metrics['train/loss']))
    np.testing.assert_allclose(losses, PINNED, rtol=1e-5, err_msg=f'{MESSAGE}\ngot {losses}')
