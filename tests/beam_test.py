# SPDX-License-Identifier: Apache-2.0
"""Beam search beside exhaustive search and slow references."""

import itertools

import jax
import numpy as np
import pytest

from gptjax.configs import errors
from gptjax.sampling import beam, decode, texts
from gptjax.text import tokenizer as tokenizer_lib
from tests import helpers

asked = helpers.asked


@pytest.fixture(scope='module')
def five():
    """A model of five tokens, of which 4 ends a text."""
    model = helpers.tiny_model(n_vocab=5)
    return decode.Decoder(model, 5), helpers.params_of(model, seed=3)


def log_probs(decoder, params, sequences):
    """Log-probs of what follows each of equally long sequences."""
    ids = np.zeros((len(sequences), 16), np.int32)
    ids[:, : len(sequences[0])] = sequences
    logits = helpers.applied(decoder.model)(params, ids)[:, len(sequences[0]) - 1]
    return np.asarray(jax.nn.log_softmax(logits))


def all_texts(decoder, params, prompt, length, penalty, end=4):
    """{text: score} of all texts that end, or have the full length."""
    alive, scored = {(): 0.0}, {}
    for step in range(1, length + 1):
        follow = log_probs(decoder, params, [[*prompt, *text] for text in alive])
        grown = {}
        for (text, total), row in zip(alive.items(), follow, strict=True):
            for token in range(5):
                score = total + float(row[token])
                if token == end or step == length:
                    scored[(*text, token)] = score / step**penalty
                else:
                    grown[(*text, token)] = score
        alive = grown
    return scored


@pytest.mark.parametrize('penalty', [0.0, 1.0, 2.0])
def test_wide_beams_find_the_best_of_all_texts(penalty, five):
    prompt, length = [1, 2, 0], 4
    every = all_texts(*five, prompt, length, penalty)
    assert len(every) > 300
    best = sorted(every, key=every.get, reverse=True)[:3]
    options = asked(
        num_beams=256,
        num_return_sequences=3,
        max_new_tokens=length,
        length_penalty=penalty,
        eos_token_id=4,
        early_stopping='never',
    )
    found = beam.search(*five, [prompt], [options])[0]
    assert [tuple(text.tokens) for text in found] == best
    np.testing.assert_allclose([t.score for t in found], [every[b] for b in best], rtol=1e-5)
    for text in found:
        np.testing.assert_allclose(
            sum(text.logprobs), text.score * len(text.tokens) ** penalty, rtol=1e-5
        )


def diverse(decoder, params, prompt, options):
    """Groups in turns, as one would write it: [(score, tokens)], best first."""
    n_groups, size = options.num_beam_groups, options.num_beams // options.num_beam_groups
    groups = [[(0.0, ())] for _ in range(n_groups)]
    ended = [[] for _ in range(n_groups)]
    for step in range(1, options.max_new_tokens + 1):
        taken = np.zeros(5)
        for g in range(n_groups):
            if not groups[g]:
                continue
            rows = log_probs(decoder, params, [[*prompt, *text] for _, text in groups[g]])
            rows = rows - options.diversity_penalty * taken
            every = sorted(
                (
                    (score + float(row[token]), (*text, token))
                    for (score, text), row in zip(groups[g], rows, strict=True)
                    for token in range(5)
                ),
                reverse=True,
            )
            last = step == options.max_new_tokens
            groups[g] = []
            for place, (score, text) in enumerate(every[: 2 * size]):
                if text[-1] == 4 or last:
                    if place < size:
                        ended[g].append((score / step**options.length_penalty, text))
                elif len(groups[g]) < size:
                    groups[g].append((score, text))
            for _, text in [pair for pair in every[: 2 * size] if pair[1][-1] != 4][:size]:
                taken[text[-1]] += 1
    best = [pair for found in ended for pair in sorted(found, reverse=True)[:size]]
    return sorted(best, reverse=True)


@pytest.mark.parametrize(('n_groups', 'size', 'penalty'), [(2, 1, 1.0), (3, 2, 0.7), (2, 3, 5.0)])
def test_diverse_beams_equal_a_slow_reference(n_groups, size, penalty, five):
    options = asked(
        num_beams=n_groups * size,
        num_beam_groups=n_groups,
        diversity_penalty=penalty,
        num_return_sequences=n_groups * size,
        max_new_tokens=5,
        eos_token_id=4,
        length_penalty=0.0,
        early_stopping='never',
    )
    for prompt in ([1, 2, 0], [3], [0, 0, 2, 2]):
        found = beam.search(*five, [prompt], [options])[0]
        expected = diverse(*five, prompt, options)[: len(found)]
        assert [tuple(text.tokens) for text in found] == [text for _, text in expected]
        np.testing.assert_allclose([t.score for t in found], [s for s, _ in expected], rtol=1e-5)


def test_a_batch_of_prompts_equals_each_alone():
    model = helpers.tiny_model()
    decoder, params = decode.Decoder(model, 64), helpers.params_of(model)
    prompts = [[5], [1, 2, 3, 4, 5, 6, 7], [60, 3, 9]]
    each = [
        asked(num_beams=3, num_return_sequences=2, max_new_tokens=6, eos_token_id=[7, 9]),
        asked(
            num_beams=4,
            max_new_tokens=4,
            no_repeat_ngram_size=2,
            early_stopping=True,
            eos_token_id=3,
        ),
        asked(num_beams=2, do_sample=True, max_new_tokens=8, seed=3, top_p=0.9),
    ]
    together = beam.search(decoder, params, prompts, each)
    alone = [beam.search(decoder, params, [p], [o])[0] for p, o in zip(prompts, each, strict=True)]
    for one, other in zip(itertools.chain(*together), itertools.chain(*alone), strict=True):
        assert (one.tokens, one.reason) == (other.tokens, other.reason)
        np.testing.assert_allclose(one.score, other.score, rtol=1e-5)


def test_beam_samples_follow_the_models_distribution():
    """One beam's first token, of beams that live for one step, is drawn by its probability."""
    model = helpers.tiny_model(n_vocab=8)
    decoder, params = decode.Decoder(model, 8), helpers.params_of(model)
    each = [
        asked(num_beams=2, num_return_sequences=2, do_sample=True, max_new_tokens=1, seed=i)
        for i in range(2048)
    ]
    found = beam.search(decoder, params, [[1, 2]] * 2048, each)
    pairs = np.array([sorted(text.tokens[0] for text in texts_) for texts_ in found])
    counts = np.zeros((8, 8))
    np.add.at(counts, (pairs[:, 0], pairs[:, 1]), 1)
    p = np.exp(log_probs_of(decoder, params, [1, 2]))
    # Without replacement: p_i p_j / (1 - p_i) + p_j p_i / (1 - p_j).
    expected = (
        np.array(
            [
                [
                    p[i] * p[j] / (1 - p[i]) + p[j] * p[i] / (1 - p[j]) if i < j else 0
                    for j in range(8)
                ]
                for i in range(8)
            ]
        )
        * 2048
    )
    likely = expected > 5
    chi2 = ((counts - expected)[likely] ** 2 / expected[likely]).sum()
    assert counts.sum() == 2048
    assert np.trace(counts) == 0
    assert chi2 < 58  # 0.1 % of draws from 28 degrees of freedom exceed it; there are fewer


def log_probs_of(decoder, params, ids):
    padded = np.zeros((1, 16), np.int32)
    padded[0, : len(ids)] = ids
    return np.asarray(
        jax.nn.log_softmax(helpers.applied(decoder.model)(params, padded)[0, len(ids) - 1])
    )


def test_stop_strings_end_beams():
    model = helpers.tiny_model(n_vocab=257, n_ctx=64)
    decoder, params = decode.Decoder(model, 257), helpers.params_of(model)
    stops, tokenizer = texts.Stops(tokenizer_lib.Bytes()), tokenizer_lib.Bytes()
    free = beam.search(decoder, params, [[97, 98]], [asked(num_beams=3, max_new_tokens=12)])[0][0]
    string = tokenizer.decode(free.tokens[4:5])
    options = asked(num_beams=3, max_new_tokens=12, stop_strings=[string], early_stopping=True)
    found = beam.search(decoder, params, [[97, 98]], [options], stops)[0][0]
    text = tokenizer.decode(found.tokens)
    assert text.endswith(string)
    assert text.count(string) == 1
    assert (len(found.tokens) < 12) == (found.reason == 'stop')
    with pytest.raises(errors.UsageError, match='stop strings need a tokenizer'):
        beam.search(decoder, params, [[97]], [options])


def test_contradictions_are_clear_errors():
    for wrong, message in (
        ({'num_beams': 4, 'num_return_sequences': 5}, 'exceeds num_beams = 4'),
        ({'num_beams': 4, 'num_beam_groups': 3}, 'not a multiple of num_beam_groups = 3'),
        ({'num_beams': 4, 'diversity_penalty': 1.0}, 'needs num_beam_groups above 1'),
        ({'num_beam_groups': 0}, 'num_beam_groups must be above 0'),
        ({'num_beams': 2, 'logprobs': 3}, 'logprobs above 0 goes with num_beams = 1'),
        ({'logit_bias': {-3: 1.0}}, r'logit_bias is of token ids from 0 on, .*got \[-3\]'),
        ({'logit_bias': {3: float('nan')}}, r'are numbers; \(3,\) has a NaN'),
        ({'do_sample': 'no'}, 'do_sample is True or False'),
        ({'top_k': float('inf')}, 'top_k is a whole number, got inf'),
        ({'num_return_sequences': 3}, 'set do_sample=True or num_beams'),
    ):
        with pytest.raises(errors.UsageError, match=message):
            asked(**wrong)
