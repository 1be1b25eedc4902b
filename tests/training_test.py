# SPDX-License-Identifier: Apache-2.0
"""Losses, schedules, the batch plan, accumulation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.configs import errors
from gptjax.models import heads
from gptjax.training import guard, losses, optim
from gptjax.training import plan as plan_lib
from gptjax.training import step as step_lib
from tests import helpers


def test_lm_loss_is_masked_cross_entropy():
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(2, 3, 5)).astype(np.float32), rng.integers(0, 5, (2, 3))
    weights = np.array([[1, 0, 1], [0, 1, 1]], np.float32)
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    nats = -np.log(np.take_along_axis(probs, targets[..., None], -1))[..., 0]
    found = losses.lm(jnp.asarray(logits), jnp.asarray(targets), jnp.asarray(weights))
    np.testing.assert_allclose(found[0], (nats * weights).sum(), rtol=1e-6)
    assert float(found[1]['weight']) == 4


def config(**overrides) -> optim.Config:
    fields = {'peak_lr': 1.0, 'schedule': 'cosine', 'warmup_tokens': 100, 'decay_tokens': 300}
    return helpers.optim_config(**(fields | overrides))


@pytest.mark.parametrize(
    ('schedule', 'tokens', 'rate'),
    [
        ('cosine', 1, 0.01),
        ('cosine', 50, 0.5),
        ('cosine', 100, 1.0),
        ('cosine', 200, 0.55),
        ('cosine', 300, 0.1),
        ('cosine', 10**12, 0.1),
        ('linear', 200, 0.55),
        ('linear', 300, 0.1),
        ('constant', 100, 1.0),
        ('constant', 900, 1.0),
    ],
)
def test_learning_rate_by_tokens(schedule, tokens, rate):
    found = optim.learning_rate(config(schedule=schedule), 1000, float(tokens))
    assert float(found) == pytest.approx(rate, rel=1e-5)


@pytest.mark.parametrize(
    ('tokens', 'rate'), [(50, 0.5), (100, 1.0), (249, 1.0), (275, 0.55), (300, 0.1), (900, 0.1)]
)
def test_warm_up_stable_decay(tokens, rate):
    wsd = config(schedule='wsd', cooldown_tokens=50)
    assert float(optim.learning_rate(wsd, 1000, tokens)) == pytest.approx(rate, abs=0.02)


@pytest.mark.parametrize(('tokens', 'rate'), [(50, 0.5), (100, 1.0), (400, 0.5), (10_000, 0.1)])
def test_inverse_square_root(tokens, rate):
    found = optim.learning_rate(config(schedule='inverse_sqrt'), 1000, tokens)
    assert float(found) == pytest.approx(rate)


def test_schedules_that_do_not_fit_are_refused():
    with pytest.raises(errors.UsageError, match='above 0 exactly for wsd'):
        config(schedule='wsd')
    with pytest.raises(errors.UsageError, match='set warmup_tokens'):
        config(schedule='inverse_sqrt', warmup_tokens=0)
    with pytest.raises(errors.UsageError, match='b2 up to 0.99'):
        config(nu_dtype='bfloat16', b2=0.999)


def test_decay_to_the_end_of_training():
    assert float(optim.learning_rate(config(decay_tokens=0), 500, 500.0)) == pytest.approx(0.1)


def test_gpt3_schedule_at_its_landmarks():
    gpt3 = config(peak_lr=6e-4, warmup_tokens=375_000_000, decay_tokens=260_000_000_000)
    rates = [float(optim.learning_rate(gpt3, 300 * 10**9, t)) for t in (375e6, 260e9, 300e9)]
    assert rates == pytest.approx([6e-4, 6e-5, 6e-5], rel=1e-4)


def test_plan_is_a_sum_of_batches():
    rng = np.random.default_rng(0)
    for _ in range(30):
        full = int(rng.integers(2, 40)) * 4
        start, over = int(rng.integers(1, full)), int(rng.integers(100, 50_000))
        batch = plan_lib.Config(full * 16, 1, start * 16, over, int(rng.integers(1, 12)))
        plan = plan_lib.of_tokens(batch, 16, 10_000)
        first, after = 0, plan.length('tokens').after
        for step in range(60):
            assert plan.examples(step) == (first, plan.size(step))
            first += plan.size(step)
            assert float(after(jnp.asarray(step))) == first * 16
        sizes = plan.sizes()
        assert sizes == sorted(sizes)
        assert sizes[-1] == full
        assert len(sizes) <= batch.ramp_stages + 1
        assert all(size % start == 0 for size in sizes[:-1])
        for total in (1, 17, 5000, 70_000):
            steps = plan.steps(total)
            assert plan.tokens(steps) >= total > plan.tokens(steps - 1)


def test_ramp_is_near_the_straight_line():
    batch = plan_lib.Config(3_145_728, 1, 32_768, 12 * 10**9, 8)
    plan = plan_lib.of_tokens(batch, 2048, 300 * 10**9)
    assert plan.examples(0) == (0, 16)
    half = plan.steps(61 * 10**8)  # just inside the fifth of eight stages
    assert plan.size(half) * 2048 == pytest.approx((32_768 + 3_145_728) / 2, rel=0.02)
    assert plan.size(plan.steps(13 * 10**9)) * 2048 == 3_145_728


def test_plan_refuses_a_broken_batch():
    with pytest.raises(errors.UsageError, match='not a multiple of n_ctx = 16; use 96'):
        helpers.plan_of(100, 16)


def test_decay_spares_biases_and_gains():
    described = heads.describe(helpers.tiny_model())
    spared = {path for path, about in described.items() if not about.decays}
    assert all(path.endswith(('/bias', '/scale')) for path in spared)
    assert len(described) - len(spared) == 2 + 6  # two embeddings; q, k, v, out, up, down


def _after(batch, device_windows, model):
    optimizer = helpers.optimizer_of(helpers.plan_of(8 * 16, 16), model)
    step = step_lib.make_train_step(
        helpers.loss_of(model), optimizer, 0, step_lib.Options(device_windows)
    )
    params = helpers.params_of(model)
    params = jax.tree.map(jnp.copy, params)  # the step takes its state's memory
    state = helpers.state_of(params, optimizer)
    return step(state, batch)


@pytest.mark.parametrize('device_windows', [1, 2, 4])
@pytest.mark.parametrize('dropout', [0.0, 0.2])
def test_accumulation_of_masked_batches_equals_one_batch(device_windows, dropout):
    """Dropout, too: what it leaves out of a row depends on the row's number alone."""
    model = helpers.tiny_model(residual_dropout=dropout)
    batch = helpers.batch_of(8, 16, 64)
    keep = np.random.default_rng(1).random((8, 16)) < np.linspace(0.05, 1, 8)[:, None]
    batch['weights'] = keep.astype(np.float32)
    (one, metrics), (many, others) = _after(batch, 0, model), _after(batch, device_windows, model)
    np.testing.assert_allclose(metrics['train/loss'], others['train/loss'], rtol=1e-6)
    # Adam's first moments, not the weights: where a gradient is zero (key biases), Adam blows up
    # noise.
    for a, b in zip(*(jax.tree.leaves(s.opt_state[1].mu) for s in (one, many)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_what_dropout_draws_is_chosen_and_determinism_is_asked_for():
    """A CPU takes XLA's option, too, and is deterministic without it."""
    model = helpers.tiny_model(residual_dropout=0.2)
    optimizer = helpers.optimizer_of(helpers.plan_of(8 * 16, 16), model)
    found = []
    for how in ({}, {'deterministic': True}, {'dropout_bits': 'rbg'}):
        options = step_lib.Options(**how)
        step = step_lib.make_train_step(helpers.loss_of(model), optimizer, 0, options)
        state = helpers.state_of(jax.tree.map(jnp.copy, helpers.params_of(model)), optimizer)
        found.append(float(step(state, helpers.batch_of(8, 16, 64))[1]['train/loss']))
    assert found[0] == found[1] != found[2]
    assert found[2] == pytest.approx(found[0], rel=0.1)


def test_clipping_limits_the_gradient_before_adam():
    model = helpers.tiny_model()
    plan = helpers.plan_of(8 * 16, 16)
    params = helpers.params_of(model)
    grads = jax.tree.map(lambda p: jnp.full(p.shape, 100.0), params)
    optimizer = helpers.optimizer_of(plan, model, clip_norm=1.0)
    _, state = optimizer.update(grads, optimizer.init(params), params)
    mu = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    norm = float(jnp.sqrt(sum(jnp.sum(m**2) for m in mu[: len(mu) // 2])))
    assert norm == pytest.approx(0.1, rel=1e-4)  # (1 - b1) times a norm of 1


@pytest.mark.parametrize('param_dtype', ['float32', 'bfloat16'])
def test_a_step_keeps_every_shape_and_dtype(param_dtype):
    model = helpers.tiny_model(param_dtype=param_dtype)
    optimizer = helpers.optimizer_of(helpers.plan_of(8 * 16, 16), model)
    mesh = helpers.one_device()
    with mesh.scope():
        state = step_lib.abstract(model.init_params, optimizer, mesh.shardings)
        step = step_lib.make_train_step(helpers.loss_of(model), optimizer, 0, step_lib.Options())
        after, _ = jax.eval_shape(step, state, helpers.batch_of(8, 16, 64))
    kinds = [jax.tree.map(lambda x: (x.shape, str(x.dtype)), s) for s in (state, after)]
    assert kinds[0] == kinds[1]


def test_a_warm_up_longer_than_training_is_refused():
    plan = helpers.plan_of(8 * 16, 16, total_tokens=100)
    with pytest.raises(errors.UsageError, match='not below the 100 tokens of training'):
        helpers.optimizer_of(plan, helpers.tiny_model(), warmup_tokens=100)


def test_moments_in_bfloat16_take_half_the_memory_and_train_alike():
    model = helpers.tiny_model()
    params = helpers.params_of(model)
    plan = helpers.plan_of(8 * 16, 16)
    losses_of = {}
    for dtype in ('float32', 'bfloat16'):
        optimizer = helpers.optimizer_of(plan, model, mu_dtype=dtype, nu_dtype=dtype)
        step = step_lib.make_train_step(helpers.loss_of(model), optimizer, 0, step_lib.Options())
        state = helpers.state_of(jax.tree.map(jnp.copy, params), optimizer)
        moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
        assert {str(x.dtype) for x in moments} == {dtype}
        found = []
        for i in range(20):
            state, metrics = step(state, helpers.batch_of(8, 16, 64, seed=i % 2))
            found.append(float(metrics['train/loss']))
        assert {str(x.dtype) for x in jax.tree.leaves(state.opt_state) if x.ndim} == {dtype}
        losses_of[dtype] = found
    assert losses_of['bfloat16'][-1] < losses_of['bfloat16'][0] - 0.5
    np.testing.assert_allclose(losses_of['bfloat16'], losses_of['float32'], atol=0.1)


def _trained(options, batches, **overrides):
    model = helpers.tiny_model()
    optimizer = helpers.optimizer_of(helpers.plan_of(8 * 16, 16), model, **overrides)
    mesh = helpers.one_device()
    with mesh.scope():
        target = step_lib.abstract(model.init_params, optimizer, mesh.shardings, options)
        step = step_lib.make_train_step(helpers.loss_of(model), optimizer, 0, options, target)
        state = step_lib.init(model.init_params, optimizer, 0, target, options)
        found, states = [], [jax.tree.map(np.asarray, state)]
        for batch in batches:
            state, metrics = step(state, mesh.put(batch))
            found.append(metrics)
            states.append(jax.tree.map(np.asarray, state))
    return states, found


def test_the_average_of_the_weights_follows_them():
    batches = [helpers.batch_of(8, 16, 64, seed=i) for i in range(3)]
    states, _ = _trained(step_lib.Options(ema_decay=0.75), batches)
    expected = states[0].params
    for state in states[1:]:
        expected = jax.tree.map(lambda a, p: 0.75 * a + 0.25 * p, expected, state.params)
    for a, b in zip(*map(jax.tree.leaves, (states[-1].average, expected)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_moments_on_the_host_change_no_number():
    batches = [helpers.batch_of(8, 16, 64, seed=i) for i in range(3)]
    (here, _), (there, _) = (
        _trained(step_lib.Options(offload=offload), batches) for offload in (False, True)
    )
    for a, b in zip(*map(jax.tree.leaves, (here[-1], there[-1])), strict=True):
        np.testing.assert_array_equal(a, b)


def _spiked(batch):
    return batch | {'weights': np.full_like(batch['weights'], np.nan)}


def test_a_step_that_is_not_finite_is_skipped_but_counted():
    batches = [helpers.batch_of(8, 16, 64, seed=i) for i in range(3)]
    batches[1] = _spiked(batches[1])
    states, found = _trained(step_lib.Options(skip_spikes=True), batches)
    assert [float(m['train/spike']) for m in found] == [0, 1, 0]
    assert [int(s.step) for s in states] == [0, 1, 2, 3]
    for a, b in zip(*map(jax.tree.leaves, (states[1], states[2])), strict=True):
        if a.ndim:
            np.testing.assert_array_equal(a, b)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(states[-1]))


def test_a_loss_far_above_the_usual_is_a_spike():
    rng = np.random.default_rng(0)
    seen = guard.empty()
    look = jax.jit(guard.look, static_argnums=3)
    for loss in rng.normal(3.0, 0.1, 200):
        seen, spike = look(seen, jnp.float32(loss), jnp.float32(1.0), 6.0)
        assert not spike
    assert float(seen.mean) == pytest.approx(3.0, abs=0.05)
    assert float(seen.variance) ** 0.5 == pytest.approx(0.1, rel=0.4)
    for loss, norm, expected in ((3.2, 1.0, False), (4.0, 1.0, True), (3.0, np.inf, True)):
        after, spike = look(seen, jnp.float32(loss), jnp.float32(norm), 6.0)
        assert bool(spike) == expected
        assert (after.count > seen.count) != expected  # a spike teaches nothing
    assert not look(seen, jnp.float32(9.0), jnp.float32(1.0), 0.0)[1]


def test_norms_of_every_layer_on_request():
    options = step_lib.Options(norms_of=heads.describe(helpers.tiny_model()))
    _, (found,) = _trained(options, [helpers.batch_of(8, 16, 64)])
    grads = found['norm/grad']
    assert grads['network/block_0/norm_mlp/scale'].shape == (2,)
    assert grads['network/token_embedding'].shape == ()
    total = sum(np.square(x).sum() for x in grads.values()) ** 0.5
    assert total == pytest.approx(float(found['opt/grad_norm']), rel=1e-5)


def test_windows_left_out_are_passed_over():
    plan = helpers.plan_of(8 * 16, 16)
    plan.skip(4, 7)  # back to step 4 from a spike at step 7: the windows of steps 4, 5, 6
    assert [plan.examples(step)[0] for step in (3, 4, 5)] == [24, 56, 64]
    assert plan.tokens(5) == 5 * 8 * 16  # what was trained on
    plan.skip(4, 5)
    assert plan.examples(4) == (64, 8)
    plan = helpers.plan_of(8 * 16, 16)
    plan.skip(8, 10)
    plan.skip(4, 9)  # back further, from a spike in the first step after the gap
    assert plan.examples(4)[0] == 10 * 8 + 8
    assert plan.examples(8)[0] == plan.examples(4)[0] + 4 * 8  # the old gap is behind
