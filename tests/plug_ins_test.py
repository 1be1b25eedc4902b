# SPDX-License-Identifier: Apache-2.0
"""Plug-ins that a test writes: how options are read, and where sown losses and measures go."""

import importlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.configs import errors, lookup, sizes
from gptjax.models import heads, mlps
from gptjax.training import losses
from gptjax.training.objectives import next_token
from tests import helpers

NESTED = """
from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import linen as nn

from gptjax.models import layers


@dataclasses.dataclass(frozen=True)
class Options:
    weight: float
    note: str


class _Part(nn.Module):
    weight: float

    @nn.compact
    def __call__(self, x):
        layers.sow_loss(self, 'size', self.weight * jnp.square(x).mean())
        layers.sow_measure(self, 'one', jnp.ones(()))
        return x


def apply(module, config, options, x_BxLxD):
    return _Part(options.weight, name='part')(x_BxLxD)
"""


@pytest.fixture(autouse=True)
def nested(tmp_path, monkeypatch):
    (tmp_path / 'nested.py').write_text(NESTED)
    monkeypatch.setattr(mlps, '__path__', [*mlps.__path__, str(tmp_path)])
    monkeypatch.delitem(__import__('sys').modules, 'gptjax.models.mlps.nested', raising=False)


def test_options_have_their_types_whatever_the_module_does_with_annotations():
    _, options = lookup.plug_in('gptjax.models.mlps', 'nested:weight=2,note=3')
    assert (options.weight, options.note) == (2.0, '3')
    for written, said in (
        ('nested:weight=2', 'wants options: nested:weight=2.0,note=<str>'),
        ('nested:weight=high,note=a', "weight='high' must be a float"),
        ('nested:height=2', 'with a key of: weight, note'),
        ('dense:weight=2', 'with a key of: none'),
    ):
        with pytest.raises(errors.UsageError, match=said):
            lookup.plug_in('gptjax.models.mlps', written)


@pytest.mark.parametrize('package', sorted(lookup.WANTED))
def test_a_module_without_what_its_package_has_is_one_line(package, tmp_path, monkeypatch):
    parent = importlib.import_module(package)
    folder = tmp_path / 'more'
    folder.mkdir()
    monkeypatch.setattr(parent, '__path__', [*parent.__path__, str(folder)])
    monkeypatch.delitem(sys.modules, f'{package}.halfway', raising=False)
    *most, last = lookup.WANTED[package]
    (folder / 'halfway.py').write_text('\n'.join(f'{each} = print' for each in most))
    said = f'halfway.py has no {last}; it needs {" and ".join(lookup.WANTED[package])}, as '
    with pytest.raises(errors.UsageError, match=said) as caught:
        lookup.module(package, 'halfway')
    assert '\n' not in str(caught.value)
    for name in set(lookup.names(package)) - {'halfway', 'nested'}:
        lookup.module(package, name)


def twice(apply, options):
    """An objective that calls the model on both halves of a batch."""
    one = next_token.make(apply, options)

    def loss(params, batch, rng):
        halves = [{k: v[i::2] for k, v in batch.items()} for i in (0, 1)]
        (a, sums), (b, more) = (one(params, half, rng) for half in halves)
        return a + b, jax.tree.map(jnp.add, sums, more)

    return loss


@pytest.mark.parametrize('make', [next_token.make, twice])
@pytest.mark.parametrize('layers', [{}, {'scan_layers': False}, {'remat': 'full'}])
def test_what_parts_of_layers_sow_is_in_every_objective(make, layers):
    batch = helpers.batch_of(4, 16, 64)
    batch['weights'][:, :3] = 0.0

    def found(weight):
        model = helpers.tiny_model(mlp=f'nested:weight={weight},note=x', **layers)
        params = helpers.params_of(model)
        loss = losses.with_sown(make, model.apply, None)
        return jax.jit(loss)(params, batch, jax.random.key(0))

    plain, sums = found(0.0)
    assert float(sums['weight']) == batch['weights'].sum()
    assert float(sums['part/one'] / sums['weight']) == pytest.approx(1.0)
    assert float(sums['part/size']) == 0.0
    objective, more = found(0.5)
    assert float(more['part/size']) > 0
    assert float(objective - plain) == pytest.approx(float(more['part/size']), rel=1e-4)
    doubled, _ = found(1.0)
    assert float(doubled - plain) == pytest.approx(2 * float(more['part/size']), rel=1e-4)
    np.testing.assert_allclose(float(sums.get('nats', plain)), float(plain), rtol=1e-6)


def model_of(family):
    sections = {'gpt': sizes.model('tiny', n_vocab=64, n_ctx=16), 'lstm': sizes.rnn('lstm')}
    section = sections[family]
    section.update({'n_vocab': 64, 'n_ctx': 16})
    return heads.build(section)


@pytest.mark.parametrize('family', ['gpt', 'lstm'])
def test_a_z_loss_is_in_every_objective_and_in_no_score(family):
    model, batch = model_of(family), helpers.batch_of(4, 16, 64)
    params = helpers.params_of(model)

    @jax.jit
    @jax.value_and_grad
    def of_z(params, batch):
        logits = model.apply({'params': params}, batch['tokens'])
        return 0.1 * jnp.square(jax.nn.logsumexp(logits, axis=-1)).sum()

    def found(z_loss):
        loss = losses.with_sown(next_token.make, model.apply, None, z_loss)
        run = jax.jit(jax.value_and_grad(loss, has_aux=True))
        return run(params, batch, jax.random.key(0))

    (plain, sums), slope = found(0.0)
    assert 'z_loss' not in sums
    (objective, more), steeper = found(0.1)
    expected, of_z = of_z(params, batch)
    assert float(objective - plain) == pytest.approx(float(expected), rel=1e-3)
    assert float(more['z_loss']) == pytest.approx(float(expected), rel=1e-4)
    for a, b, z in zip(*map(jax.tree.leaves, (steeper, slope, of_z)), strict=True):
        np.testing.assert_allclose(a - b, z, atol=1e-3)
    scores = jax.jit(next_token.held_out(model.apply, None))(params, batch)
    assert float(scores['nats']) == pytest.approx(float(plain), rel=1e-5)


def test_a_z_loss_that_no_sum_takes_is_refused():
    model, batch = model_of('gpt'), helpers.batch_of(4, 16, 64)

    def make(apply, options):
        del options
        return lambda params, batch, rng: losses.lm(
            apply({'params': params}, batch['tokens']), batch['targets'], batch['weights']
        )

    loss = losses.with_sown(make, model.apply, None, 0.1)
    with pytest.raises(errors.UsageError, match=r'train.z_loss .* never calls'):
        jax.eval_shape(loss, helpers.params_of(model), batch, jax.random.key(0))


def of_own_weights(apply, options):
    """An objective that weighs every token by what the model itself says of it."""
    del options

    def loss(params, batch, rng):
        scale = jax.nn.sigmoid(params['network']['token_embedding'][batch['targets'], 0])
        arrays = (batch['tokens'], batch['targets'], batch['weights'] * scale)
        return losses.next_token(apply, params, *arrays, rng)

    return loss


def test_an_objective_may_weigh_every_token_by_anything():
    model, batch = model_of('gpt'), helpers.batch_of(4, 16, 64)
    params = helpers.params_of(model)

    def plainly(params, batch, key):
        del key
        logits = model.apply({'params': params}, batch['tokens'])
        scale = jax.nn.sigmoid(params['network']['token_embedding'][batch['targets'], 0])
        return losses.lm(logits, batch['targets'], batch['weights'] * scale)

    loss = losses.with_sown(of_own_weights, model.apply, None)
    found, expected = (
        jax.jit(jax.value_and_grad(f, has_aux=True))(params, batch, jax.random.key(0))
        for f in (loss, plainly)
    )
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
