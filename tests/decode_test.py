# SPDX-License-Identifier: Apache-2.0
"""Filters and decoding against plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import generate as generate_program
from gptjax.configs import errors
from gptjax.sampling import decode, processors
from tests import helpers


def logits_of(rows=3, n_vocab=20):
    return jnp.asarray(np.random.default_rng(0).normal(size=(rows, n_vocab)) * 2, jnp.float32)


def test_top_k_per_row():
    found = processors.top_k(logits_of(), jnp.asarray([1, 5, 0]))
    kept = (np.asarray(found) > -1e30).sum(axis=1)
    assert kept.tolist() == [1, 5, 20]
    assert np.argmax(found, axis=1).tolist() == np.argmax(logits_of(), axis=1).tolist()


@pytest.mark.parametrize('p', [0.05, 0.5, 0.9, 1.0])
def test_top_p_keeps_the_fewest_that_reach_p(p):
    logits = np.asarray(logits_of())
    found = np.asarray(processors.top_p(jnp.asarray(logits), jnp.full(3, p)))
    for row, kept in zip(logits, found > -1e30, strict=True):
        probs = np.exp(row) / np.exp(row).sum()
        order = np.argsort(-probs)
        count = int(np.searchsorted(np.cumsum(probs[order]), p)) + 1 if p < 1 else 20
        assert sorted(np.flatnonzero(kept)) == sorted(order[:count])


def test_temperature_scales_and_zero_is_greedy():
    found = processors.temperature(logits_of(), jnp.asarray([2.0, 1.0, 0.0]))
    np.testing.assert_allclose(found[0], logits_of()[0] / 2)
    assert np.flatnonzero(np.asarray(found[2]) > -1e30).tolist() == [int(np.argmax(logits_of()[2]))]


def _config(**overrides):
    fields = {'max_new_tokens': 6, 'temperature': 0.0, 'top_k': 0, 'top_p': 1.0, 'samples': 1}
    return decode.Config(**(fields | overrides))


def _greedy(model, params, prompt, steps, end_of_text):
    """The full forward for every token, no cache, no padding."""
    ids = list(prompt)
    for _ in range(steps):
        logits = model.apply({'params': params}, np.asarray([ids], np.int32))
        token = int(jnp.argmax(logits[0, -1]))
        if token == end_of_text:
            break
        ids.append(token)
    return ids[len(prompt) :]


PROMPTS = [[5], [1, 2, 3, 4, 5, 6, 7], [60, 3, 9]]


def test_greedy_in_a_ragged_batch_equals_a_plain_loop():
    model = helpers.tiny_model()
    params = helpers.params_of(model)
    decoder = generate_program.decoder(model, model.config.n_vocab)
    found = decode.generate(decoder, params, PROMPTS, _config(), 0, seed=0)
    assert found == [_greedy(model, params, prompt, 6, 0) for prompt in PROMPTS]


def test_end_of_text_stops_a_row_and_is_left_out():
    model = helpers.tiny_model()
    params = helpers.params_of(model)
    decoder = generate_program.decoder(model, model.config.n_vocab)
    free = decode.generate(decoder, params, PROMPTS, _config(), 100, seed=0)
    stop = free[1][2]
    found = decode.generate(decoder, params, PROMPTS, _config(), stop, seed=0)
    assert found[1] == free[1][: free[1].index(stop)]
    assert all(stop not in row for row in found)


def test_draws_have_the_models_distribution():
    model = helpers.tiny_model(n_vocab=8)
    params = helpers.params_of(model)
    decoder = generate_program.decoder(model, model.config.n_vocab)
    config = _config(temperature=0.7, max_new_tokens=1, samples=4000)
    found = decode.generate(decoder, params, [[1, 2]], config, 100, seed=3)
    counts = np.bincount([row[0] for row in found], minlength=8)
    logits = model.apply({'params': params}, np.asarray([[1, 2]], np.int32))[0, -1]
    probs = np.asarray(jax.nn.softmax(logits / 0.7))
    chi2 = ((counts - 4000 * probs) ** 2 / (4000 * probs)).sum()
    assert chi2 < 24.3  # 0.1 % of draws from 7 degrees of freedom exceed it


def test_the_seed_decides():
    model = helpers.tiny_model()
    params = helpers.params_of(model)
    decoder = generate_program.decoder(model, model.config.n_vocab)
    config = _config(temperature=1.0)
    one, same, other = (
        decode.generate(decoder, params, PROMPTS, config, 100, seed=s) for s in (0, 0, 1)
    )
    assert one == same != other


def test_what_does_not_fit_is_a_clear_error():
    model = helpers.tiny_model()
    decoder = generate_program.decoder(model, model.config.n_vocab)
    with pytest.raises(errors.InputError, match='do not fit n_ctx = 16'):
        decode.generate(decoder, {}, [[1] * 11], _config(), 0, seed=0)
    with pytest.raises(errors.InputError, match='a prompt is empty'):
        decode.generate(decoder, {}, [[1], []], _config(), 0, seed=0)
    with pytest.raises(errors.UsageError, match=r'top_p must be in \(0, 1\]'):
        _config(top_p=0.0)


def test_padding_of_the_vocabulary_is_never_drawn():
    model = helpers.tiny_model()
    config = _config(temperature=5.0, samples=50)
    decoder = generate_program.decoder(model, 10)
    found = decode.generate(decoder, helpers.params_of(model), [[1]], config, 100, seed=0)
    assert max(max(row) for row in found) < 10
