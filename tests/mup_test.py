# SPDX-License-Identifier: Apache-2.0
"""muP's coordinate check (Yang et al. 2022, section D.1): what a step changes, over the width."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.models import heads
from gptjax.training import step as step_lib
from tests import helpers

WIDTHS = (32, 128)
STEPS = 4


def changes(width: int, base_width: int) -> tuple[float, float]:
    """Mean size of the change of hidden states and of logits after a few steps."""
    model = helpers.tiny_model(
        d_model=width,
        n_heads=width // 16,
        d_head=16,
        d_ff=4 * width,
        mup_base_width=base_width,
        n_ctx=16,
    )
    plan = helpers.plan_of(8 * 16, 16)
    optimizer = helpers.optimizer_of(plan, model, weight_decay=0.0, clip_norm=0.0)
    step = step_lib.make_train_step(helpers.loss_of(model), optimizer, 0, step_lib.Options())
    params = jax.tree.map(
        jnp.asarray, jax.jit(lambda: _plain(model.init_params(jax.random.key(0))))()
    )
    tokens = helpers.batch_of(8, 16, 64, seed=9)['tokens']
    see = jax.jit(
        lambda p: (
            model.apply({'params': p}, tokens, method='hidden'),
            model.apply({'params': p}, tokens),
        )
    )
    before = see(params)
    state = helpers.state_of(params, optimizer)
    for i in range(STEPS):
        state, _ = step(state, helpers.batch_of(8, 16, 64, seed=i))
    after = see(state.params)
    return tuple(float(jnp.abs(a - b).mean()) for a, b in zip(after, before, strict=True))


def _plain(boxed):
    import flax

    return flax.linen.meta.unbox(boxed)


def slope(values) -> float:
    """Of log(change) over log(width): 0 where width does not matter."""
    return float(np.polyfit(np.log(WIDTHS), np.log(values), 1)[0])


@pytest.fixture(scope='module')
def measured():
    return {base: [changes(w, base) for w in WIDTHS] for base in (0, WIDTHS[0])}


def test_logits_move_as_much_at_every_width(measured):
    logits = [logits for _, logits in measured[WIDTHS[0]]]
    assert abs(slope(logits)) < 0.25
    assert slope([logits for _, logits in measured[0]]) > 0.5  # the standard one does not manage


def test_hidden_states_move_as_much_at_every_width(measured):
    assert abs(slope([hidden for hidden, _ in measured[WIDTHS[0]]])) < 0.25


def test_the_base_model_is_the_standard_one():
    assert changes(32, 32) == changes(32, 0)


def test_rates_fall_for_hidden_weights_only():
    described = heads.describe(
        helpers.tiny_model(d_model=64, n_heads=4, d_head=16, mup_base_width=16)
    )
    assert described['network/block_0/attention/query/kernel'].rate == 0.25
    hidden = {path for path, about in described.items() if about.rate != 1}
    assert hidden == {path for path in described if path.endswith('kernel')}
