# SPDX-License-Identifier: Apache-2.0
"""Weights as decoding reads them compute the same; quantised ones differ as rounding allows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from gptjax.configs import errors
from gptjax.models import heads, quantize
from gptjax.models.kernels import dots
from tests import helpers


@pytest.mark.parametrize(
    'overrides', [{}, {'tied_embedding': False, 'n_heads': 4, 'n_kv_heads': 2}]
)
def test_weights_in_the_form_for_decoding_compute_the_same(overrides):
    model = helpers.tiny_model(**overrides)
    params, described = helpers.params_of(model), heads.describe(model)
    tokens = np.random.default_rng(0).integers(0, 64, (2, 16)).astype(np.int32)
    plain = helpers.applied(model)(params, tokens)
    found = helpers.applied(model)(quantize.for_decoding(params, described), tokens)
    np.testing.assert_allclose(found, plain, atol=1e-5)
    kinds = {'int8': 0.03, 'int4': 0.4}
    for weights, most in kinds.items():
        found = helpers.applied(model)(quantize.for_decoding(params, described, weights), tokens)
        error = np.abs(found - plain).max() / np.abs(plain).max()
        assert most / 20 < error < most


@pytest.mark.parametrize('weights', ['int8', 'int4'])
@pytest.mark.parametrize('rows', [1, 5, 20])
def test_products_are_those_of_the_rounded_weight(weights, rows):
    random = np.random.default_rng(0)
    weight = jnp.asarray(random.normal(size=(64, 3, 16)), jnp.float32)
    x = jnp.asarray(random.normal(size=(1, rows, 64)), jnp.float32)
    turned = quantize.turn(weight, (0,), (1, 2), weights)
    rounded = turned.matrix(jnp.float32).T.reshape(weight.shape)
    with helpers.one_device().scope():
        found = dots.linear('BLD,DHK->BLHK', x, turned)
    exact = jnp.einsum('BLD,DHK->BLHK', x, rounded)
    np.testing.assert_allclose(found, exact, atol=2e-3)
    scale = np.asarray(turned.scale_NxG)
    error = np.abs(np.asarray(rounded - weight)).reshape(64, -1).T.reshape(*scale.shape, -1)
    assert (error <= scale[..., None] / 2 + 1e-6).all()  # rounded to nearest
    assert turned.values_NxJ.nbytes == weight.size // (1 if weights == 'int8' else 2)


def test_integers_of_a_known_weight():
    weight = jnp.asarray([[1.0, -127.0], [0.4, 63.6]])  # two inputs of two outputs
    turned = quantize.turn(weight, (0,), (1,), 'int8')
    np.testing.assert_allclose(turned.scale_NxG[:, 0], [1 / 127, 1.0])
    assert turned.values_NxJ.tolist() == [[127, 51], [-127, 64]]
    packed = quantize.turn(jnp.asarray([[7.0], [-8.0], [0.4], [3.0]]), (0,), (1,), 'int4')
    assert packed.values_NxJ.tolist() == [[15 | 8 << 4, 0 | 11 << 4]]
    np.testing.assert_allclose(packed.matrix(jnp.float32), [[7, -8, 0, 3]])


def test_memory_is_what_it_says():
    model = helpers.tiny_model()
    params, described = helpers.params_of(model), heads.describe(model)
    for weights, bits in (('int8', 8), ('int4', 4)):
        network = quantize.for_decoding(params, described, weights)['network']
        for layer in network['block_0']:
            for name, leaf in traverse_util.flatten_dict(layer, sep='/').items():
                if name.endswith('kernel'):
                    assert leaf.values_NxJ.nbytes == np.prod(leaf.shape) * bits // 8
    assert len(jax.tree.leaves(params)) < len(jax.tree.leaves(network))  # layers are apart


def test_what_cannot_be_quantised_is_a_clear_error():
    decoder, lstm = helpers.baseline_decoder('lstm')
    described = heads.describe(decoder.model)
    with pytest.raises(errors.UsageError, match='is for GPTs'):
        quantize.for_decoding(lstm, described, 'int8')
    assert quantize.for_decoding(lstm, described)['network'] == lstm['network']
