# SPDX-License-Identifier: Apache-2.0
"""The decoder: causality, bands, padding, caches, one tree for scanned and unrolled layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.configs import errors, sizes
from gptjax.models import attention, axes, heads, masks
from tests import helpers

RNNS = {kind: sizes.rnn(kind, n_ctx=16, n_vocab=64, d_model=32) for kind in ('lstm', 'gru')}
KINDS = {
    'gpt1': {'norm': 'post'},
    'gpt2': {},
    'gpt3': {'attention': ('dense', 'banded'), 'band_width': 4, 'n_layers': 4},
    'no_bias': {'attention_bias': False, 'mlp_bias': False, 'norm_bias': False},
    'gptj': {
        'parallel_residual': True,
        'positions': 'rotary',
        'rotary_dims': 16,
        'attention_bias': False,
        'head_bias': True,
        'tied_embedding': False,
    },
    'llama': {
        'norm_kind': 'rms',
        'positions': 'rotary',
        'rotary_dims': 32,
        'activation': 'silu',
        'gated_mlp': True,
        'n_heads': 4,
        'n_kv_heads': 2,
        'attention_bias': False,
        'mlp_bias': False,
        'norm_bias': False,
    },
}


def model_of(kind):
    return heads.build(RNNS[kind]) if kind in RNNS else helpers.tiny_model(**KINDS[kind])


def tokens_of(rows=2, length=16, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 64, (rows, length)), jnp.int32)


@pytest.mark.parametrize('kind', [*KINDS, *RNNS])
def test_no_gradient_reaches_later_positions(kind):
    model = model_of(kind)
    params = helpers.params_of(model)
    tokens = jnp.arange(16)[None]  # token j stands at place j

    def hidden_sum(table, at):
        changed = params | {'network': params['network'] | {'token_embedding': table}}
        hidden = model.apply({'params': changed}, tokens, method='hidden')
        return (hidden[0, at] * jnp.arange(hidden.shape[-1])).sum()

    table = params['network']['token_embedding']
    gradient = jax.jit(jax.grad(hidden_sum))
    for at in (0, 5, 15):
        grad = np.abs(gradient(table, at)).sum(axis=1)
        assert (grad[at + 1 :] == 0).all()  # exactly
        assert (grad[max(at - 3, 0) : at + 1] > 0).all()


def test_a_banded_layer_sees_its_band_only():
    model = helpers.tiny_model(attention=('banded',), band_width=4, n_layers=1)
    params = helpers.params_of(model)
    table = params['network']['position_embedding']

    def logit_sum(table):
        changed = params | {'network': params['network'] | {'position_embedding': table}}
        return model.apply({'params': changed}, tokens_of(1))[0, 10].sum()

    seen = np.abs(jax.jit(jax.grad(logit_sum))(table)).sum(axis=1) > 0
    assert np.flatnonzero(seen).tolist() == [7, 8, 9, 10]


def test_mask_by_hand():
    positions = jnp.asarray([[-1, 0, 1, 2]])
    found = attention.visible(positions, positions, masks.Banded(2))[0].astype(int).tolist()
    assert found == [[0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]


@pytest.mark.parametrize(
    ('kind', 'remat'),
    [
        ('gpt1', 'none'),
        pytest.param('gpt3', 'none', marks=pytest.mark.slow),
        ('gpt2', 'dots'),
        ('gpt3', 'full'),
    ],
)
def test_scanned_unrolled_and_rematerialised_agree(kind, remat):
    found = []
    for scan in (True, False):
        model = helpers.tiny_model(
            **KINDS[kind],
            scan_layers=scan,
            remat=remat,
            residual_dropout=0.2,
            attention_dropout=0.2,
        )
        params = helpers.params_of(model)

        def loss(params, model=model):
            key = jax.random.key(3)
            logits = model.apply({'params': params}, tokens_of(), rngs={'dropout': key})
            return jnp.square(logits).mean()

        found.append(jax.jit(jax.value_and_grad(loss))(params))
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5)


def test_dropout_needs_a_key_and_changes_the_result():
    model = helpers.tiny_model(embed_dropout=0.5)
    params = helpers.params_of(model)
    plain = helpers.applied(model)(params, tokens_of())
    np.testing.assert_array_equal(plain, helpers.applied(model)(params, tokens_of()))
    dropped = model.apply({'params': params}, tokens_of(), rngs={'dropout': jax.random.key(0)})
    assert not np.allclose(plain, dropped)


@pytest.mark.parametrize('kind', [*KINDS, *RNNS])
def test_cached_decoding_equals_the_full_forward(kind):
    model = model_of(kind)
    params, tokens = helpers.params_of(model), tokens_of()
    full = helpers.applied(model)(params, tokens)
    cache = model.config.empty_cache(2, 16)
    for start, stop in ((0, 7), (7, 8), (8, 9), (9, 16)):
        positions = jnp.broadcast_to(jnp.arange(start, stop)[None], (2, stop - start))
        logits, cache = helpers.applied(model, 'extend')(
            params, tokens[:, start:stop], positions, cache
        )
        np.testing.assert_allclose(logits[:, 0], full[:, stop - 1], atol=2e-5)


@pytest.mark.parametrize('kind', [*KINDS, *RNNS])
def test_padding_is_invisible(kind):
    model = model_of(kind)
    params, tokens = helpers.params_of(model), tokens_of(1, 10)
    alone = helpers.applied(model)(params, tokens)
    for filler in (0, 63):
        padded = jnp.concatenate([jnp.full((1, 5), filler), tokens], axis=1)
        positions = jnp.asarray([[-1] * 5 + list(range(10))])
        found = helpers.applied(model)(params, padded, positions)
        np.testing.assert_allclose(found[:, 5:], alone, atol=2e-5)
        assert np.isfinite(found).all()


def test_logits_are_float32_and_bfloat16_is_close():
    params = helpers.params_of(helpers.tiny_model())
    exact = helpers.tiny_model().apply({'params': params}, tokens_of())
    found = helpers.tiny_model(compute_dtype='bfloat16').apply({'params': params}, tokens_of())
    assert found.dtype == jnp.float32
    assert np.abs(found - exact).max() < 0.15 * np.abs(exact).max()


def test_initialisation_has_the_published_deviations():
    model = helpers.tiny_model(
        n_layers=8, d_model=128, d_head=64, d_ff=512, n_vocab=500, residual_init_std=0.005
    )
    params = jax.tree.map(np.asarray, jax.jit(model.init_params)(jax.random.key(0)))
    flat = {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    for name, leaf in flat.items():
        if "'bias'" in name:
            assert (leaf == 0).all()
        elif "'scale'" in name:
            assert (leaf == 1).all()
        else:
            residual = "'out'" in name or "'down'" in name
            expected = 0.005 if residual else 0.01 if 'position' in name else 0.02
            assert leaf.std() == pytest.approx(expected, rel=0.05), name
    blocks = params['network']['block_0']['up']['kernel'].value
    assert not np.allclose(blocks[0], blocks[1])


def test_too_long_is_a_clear_error():
    model = helpers.tiny_model()
    with pytest.raises(errors.InputError, match='17 tokens do not fit n_ctx = 16'):
        model.apply({'params': helpers.params_of(model)}, tokens_of(1, 17))


def test_misspelt_axes_raise():
    init = jax.nn.initializers.zeros
    with pytest.raises(ValueError, match="no logical axis 'embd'"):
        axes.vector(init, 'embd')
    with pytest.raises(ValueError, match="no logical axis 'lenght'"):
        axes.constrain(jnp.zeros((2, 2)), 'batch', 'lenght')
    with pytest.raises(ValueError, match='do not fit the shape'):
        axes.constrain(jnp.zeros((2, 2)), 'batch')
    with pytest.raises(ValueError, match='do not fit the shape'):
        axes.vector(init, 'embed')(jax.random.key(0), (2, 2), jnp.float32)


@pytest.mark.parametrize('family', ['gpt', 'rnn'])
@pytest.mark.parametrize('wrong', [-1, 40, 10**6])
def test_an_id_outside_the_vocabulary_is_an_error_where_it_is_seen(family, wrong):
    lstm = sizes.rnn('lstm', n_ctx=12, n_vocab=40, d_model=16)
    model = heads.build(lstm) if family == 'rnn' else helpers.tiny_model(n_vocab=40)
    params = helpers.params_of(model)
    for tokens in (np.array([[1, wrong]]), jnp.array([[wrong, 2]], jnp.int32)):
        with pytest.raises(errors.InputError, match=f'token {wrong} is outside the vocabulary'):
            model.apply({'params': params}, tokens)
    weights = np.ones((1, 2), np.float32)
    with pytest.raises(errors.InputError, match=f'token {wrong} is outside the vocabulary'):
        model.apply({'params': params}, np.array([[1, 2]]), tokens, weights, method='nats')
    assert np.isfinite(model.apply({'params': params}, np.array([[0, 39]]))).all()
