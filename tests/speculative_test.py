# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding gives the same texts where nothing is drawn, else the same distribution."""

import itertools

import jax
import numpy as np
import pytest

from gptjax.configs import errors
from gptjax.sampling import batch, decode, processors, speculative
from tests import helpers

asked = helpers.asked
LOOKUP = speculative.Lookup(4)
PROMPTS = [[5], [1, 2, 3, 1, 2, 3, 1], [60, 3, 9, 60, 3]]


def decoder_of(seed=0, **overrides):
    model = helpers.tiny_model(**({'n_ctx': 64} | overrides))
    return decode.Decoder(model, model.config.n_vocab), helpers.params_of(model, seed)


@pytest.mark.parametrize('kind', ['lookup', 'other', 'same'])
@pytest.mark.parametrize('number', [pytest.param(1, marks=pytest.mark.slow), 4])
def test_greedy_texts_are_equal(kind, number):
    decoder, params = decoder_of()
    proposer = speculative.Lookup(number)
    if kind != 'lookup':
        proposer = speculative.Draft(*decoder_of(seed=0 if kind == 'same' else 9), number)
    each = [
        asked(
            max_new_tokens=20,
            forced_bos_token_id=9,
            forced_eos_token_id=2,
            begin_suppress_tokens=[33],
            suppress_tokens=[17, 18],
        ),
        asked(
            max_new_tokens=17,
            repetition_penalty=1.2,
            min_new_tokens=3,
            eos_token_id=[5, 9],
            exponential_decay_length_penalty=(2, 1.1),
        ),
        asked(
            max_new_tokens=30,
            no_repeat_ngram_size=3,
            bad_words_ids=[[7]],
            encoder_no_repeat_ngram_size=2,
            encoder_repetition_penalty=1.5,
        ),
    ]
    plain = batch.generate(decoder, params, PROMPTS, each)
    found, stats = speculative.generate(decoder, params, PROMPTS, each, proposer)
    assert (found[0].tokens[0], found[0].tokens[-1], len(found[0].tokens)) == (9, 2, 20)
    for one, other in zip(found, plain, strict=True):
        assert (one.tokens, one.reason) == (other.tokens, other.reason)
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=2e-5)
    assert stats.proposed == stats.passes * number
    if kind == 'same':
        assert stats.accepted > 0.8 * (stats.proposed - 3 * number)


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['lookup', 'draft'])
def test_draws_have_the_same_distribution(kind):
    """Pairs of tokens behind a prompt, against probabilities computed exactly; 8 x 8 cells."""
    decoder, params = decoder_of(n_vocab=8, n_ctx=16)
    proposer = speculative.Lookup(2)
    if kind == 'draft':
        proposer = speculative.Draft(*decoder_of(seed=4, n_vocab=8, n_ctx=16), 2)
    options = asked(
        max_new_tokens=3, do_sample=True, temperature=0.8, top_k=7, epsilon_cutoff=0.05, top_h=0.9
    )
    prompt, count = [1, 2, 3, 1, 2], 8192
    found, stats = speculative.generate(
        decoder, params, [prompt] * count, [options] * count, proposer, range(count)
    )
    assert 0.05 < stats.accepted / stats.proposed < 0.95  # both outcomes are there to be judged
    counts = np.zeros((8, 8, 8))
    for text in found:
        counts[tuple(text.tokens)] += 1
    settings = processors.settings([options], [5], [8])

    def follow(ids):
        tokens = np.zeros((1, 16), np.int32)
        tokens[0, : len(ids)] = ids
        logits = helpers.applied(decoder.model)(params, tokens)[:, len(ids) - 1]
        length = np.array([len(ids)])
        return np.asarray(jax.nn.softmax(_process(logits, tokens, length, settings)))[0]

    expected = np.zeros((8, 8, 8))
    for a, b in itertools.product(range(8), repeat=2):
        if expected_pair := follow(prompt)[a] * follow([*prompt, a])[b]:
            expected[a, b] = count * expected_pair * follow([*prompt, a, b])
    assert counts[expected == 0].sum() == 0
    likely = expected > 5
    chi2 = ((counts - expected)[likely] ** 2 / expected[likely]).sum()
    degrees = likely.sum() - 1
    assert degrees > 60
    assert chi2 < degrees + 3.3 * np.sqrt(2 * degrees)  # about one draw in 2,000 exceeds it
    biased = np.roll(expected, 1, axis=0) * 0.1 + expected * 0.9
    power = ((biased - expected)[likely] ** 2 / expected[likely]).sum()
    assert power > 6 * np.sqrt(2 * degrees)  # a tenth of first tokens wrong would be seen


@jax.jit
def _process(logits, tokens, length, settings):
    return processors.process(logits, tokens, length, length * 0 + 5, settings)


def test_what_cannot_take_tokens_back_is_a_clear_error():
    decoder, params = helpers.baseline_decoder('lstm')
    with pytest.raises(errors.UsageError, match='which a rnn cannot'):
        speculative.generate(decoder, params, PROMPTS, [asked()] * 3, LOOKUP)
    gpt = decoder_of()
    other = speculative.Draft(*decoder_of(n_vocab=32), 4)
    with pytest.raises(errors.UsageError, match='the draft has a vocabulary of 32 ids'):
        speculative.generate(*gpt, PROMPTS, [asked(max_new_tokens=4)] * 3, other)
    with pytest.raises(errors.UsageError, match='4 proposals do not fit n_ctx = 64'):
        speculative.generate(*gpt, PROMPTS, [asked(max_new_tokens=60)] * 3, LOOKUP)
