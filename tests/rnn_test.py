# SPDX-License-Identifier: Apache-2.0
"""The RNNs against torch's, and where their gradients are cut."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.configs import errors, sizes
from gptjax.models import heads
from tests import helpers

torch = pytest.importorskip('torch')


def model_of(cell, **overrides):
    return heads.build(sizes.rnn(cell, n_ctx=12, n_vocab=20, d_model=16, **overrides))


@pytest.mark.parametrize('cell', ['lstm', 'gru'])
def test_hidden_states_are_those_of_torch(cell):
    model = model_of(cell)
    params = helpers.params_of(model)
    network = jax.tree.map(np.asarray, params['network'])
    peer = {'lstm': torch.nn.LSTM, 'gru': torch.nn.GRU}[cell](
        16, 16, num_layers=2, batch_first=True
    )
    with torch.no_grad():
        for i in range(2):
            layer = network[f'layer_{i}']
            hidden_bias = np.zeros_like(layer['bias'])
            if cell == 'gru':
                hidden_bias[32:] = layer['hidden_bias']
            for name, value in (
                ('weight_ih', layer['input_kernel'].T),
                ('weight_hh', layer['hidden_kernel'].T),
                ('bias_ih', layer['bias']),
                ('bias_hh', hidden_bias),
            ):
                getattr(peer, f'{name}_l{i}').copy_(torch.tensor(np.array(value)))
        tokens = np.random.default_rng(0).integers(0, 20, (3, 12))
        embedded = torch.tensor(np.array(network['token_embedding'][tokens]))
        theirs, _ = peer(embedded)
    ours = helpers.applied(model, 'hidden')(params, jnp.asarray(tokens, jnp.int32))
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-5)


@pytest.mark.parametrize('cell', ['lstm', 'gru'])
def test_gradients_stop_at_the_borders_and_values_do_not_change(cell):
    tokens = jnp.arange(12)[None]  # token j stands at place j

    def seen(bptt_tokens, at):
        model = model_of(cell, bptt_tokens=bptt_tokens)
        params = helpers.params_of(model)

        def hidden_sum(table):
            changed = params | {'network': params['network'] | {'token_embedding': table}}
            return model.apply({'params': changed}, tokens, method='hidden')[0, at].sum()

        value, gradient = jax.value_and_grad(hidden_sum)(params['network']['token_embedding'])
        return float(value), np.flatnonzero(np.abs(gradient).sum(axis=1)).tolist()

    assert seen(4, 9)[1] == [8, 9]
    assert seen(4, 3)[1] == [0, 1, 2, 3]
    assert seen(0, 9)[1] == list(range(10))
    assert seen(4, 9)[0] == pytest.approx(seen(0, 9)[0], rel=1e-6)


def test_an_lstm_begins_by_remembering():
    params = jax.jit(model_of('lstm').init_params)(jax.random.key(0))
    bias = params['network']['layer_0']['bias'].value
    assert bias.tolist() == [0.0] * 16 + [1.0] * 16 + [0.0] * 32


def test_an_unknown_cell_is_an_error():
    with pytest.raises(errors.UsageError, match='cell must be one of lstm, gru'):
        model_of('elman')
