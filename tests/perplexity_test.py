# SPDX-License-Identifier: Apache-2.0
"""The held-out measure: every token once, bytes of the original text, end-of-text is context."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.configs import errors
from gptjax.data import tokens
from gptjax.evals import perplexity
from gptjax.training import losses
from gptjax.training import step as step_lib
from tests import helpers

N_CTX = 16


@pytest.fixture(scope='module')
def held_out(tmp_path_factory, corpus_file):
    folder = tmp_path_factory.mktemp('held_out')
    helpers.prepare(helpers.tiny_config(folder, corpus_file), folder)
    return tokens.open_set(folder / 'tokens', 'valid')


def score(held_out, loss, params=None, stride=0, max_tokens=0, batch_windows=8):
    config = perplexity.Config(0, stride, batch_windows, max_tokens, ())
    mesh = helpers.one_device()

    def measure(params, batch):
        nats, sums = loss(params, batch)
        return {perplexity.SCORE: {'nats': nats} | sums}

    return perplexity.score(step_lib.make_eval_step(measure), params, held_out, N_CTX, config, mesh)


def uniform(params, batch):
    del params
    return losses.lm(jnp.zeros((*batch['tokens'].shape, 257)), batch['targets'], batch['weights'])


@pytest.mark.parametrize('stride', [0, 1, 5, 16])
def test_a_uniform_model_gives_the_vocabulary(held_out, stride):
    found = score(held_out, uniform, stride=stride)
    table = held_out.table()
    text_tokens = int(table[:, 0].sum()) - len(table)
    assert found.tokens == text_tokens == table[:, 1].sum()  # a byte a token
    metrics = found.metrics()
    assert metrics['token_perplexity'] == pytest.approx(257, rel=1e-5)
    assert metrics['bits_per_byte'] == pytest.approx(math.log2(257), rel=1e-5)
    words = int(table[:, 2].sum())
    assert metrics['word_perplexity'] == pytest.approx(
        math.exp(min(text_tokens * math.log(257) / words, 700)), rel=1e-4
    )


@pytest.mark.parametrize('stride', [16, 6])
def test_equals_brute_force(held_out, stride):
    model = helpers.tiny_model(n_vocab=257, n_ctx=N_CTX)
    params = helpers.params_of(model)

    def loss(params, batch):
        logits = model.apply({'params': params}, batch['tokens'])
        return losses.lm(logits, batch['targets'], batch['weights'])

    found = score(held_out, loss, params, stride, max_tokens=1)  # one document
    ids = held_out.read(0, int(held_out.table()[0, 0])).astype(np.int32)
    nats = 0.0
    for target in range(1, len(ids)):
        # The earliest window that reaches the target.
        first = max(0, -(-(target - N_CTX) // stride) * stride)
        row = np.zeros((1, N_CTX), np.int32)
        row[0, : target - first] = ids[first:target]
        logits = np.asarray(helpers.applied(model)(params, row))[0, target - first - 1]
        nats += float(
            np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[ids[target]]
        )
    assert found.tokens == len(ids) - 1
    assert found.nats == pytest.approx(nats, rel=1e-5)
    assert found.documents == 1


def test_whole_documents_within_a_budget(held_out):
    table = held_out.table()
    budget = int(table[:2, 0].sum()) + 3
    found = score(held_out, uniform, max_tokens=budget)
    assert found.documents == 2
    assert found.text_bytes == table[:2, 1].sum()


def test_little_held_out_text_is_told(held_out, caplog):
    config = perplexity.Config(0, 0, 8, 1, ())  # one document
    perplexity.check(held_out, N_CTX, config)
    number = int(held_out.table()[0, 0]) - 1
    assert (f'holds out {number} tokens' in caplog.text) == (number < 1000)
    found = score(held_out, uniform, max_tokens=1)
    assert ('too little to measure' in found.protocol) == (number < 100)
    assert bool(perplexity.notes({'a': held_out}, config)) == (number < 100)
    caplog.clear()
    perplexity.check(held_out, N_CTX, perplexity.Config(0, 0, 8, 0, ()))
    assert not caplog.text
    assert 'too little' not in score(held_out, uniform).protocol


def test_windows_are_counted(held_out):
    for stride, batch_windows in ((0, 8), (5, 4)):
        config = perplexity.Config(0, stride, batch_windows, 0, ())
        batches = list(perplexity._batches(held_out, len(held_out), N_CTX, config))
        windows = perplexity.n_windows(held_out, N_CTX, config)
        assert len(batches) == -(-windows // batch_windows)


def test_bad_strides_and_empty_splits(held_out, tmp_path):
    with pytest.raises(errors.UsageError, match='would leave tokens unscored'):
        score(held_out, uniform, stride=17)
    empty = tokens.TokenSet(tmp_path, 'valid', 256, 257, '', '', [], [])
    with pytest.raises(errors.InputError, match='holds no held-out text'):
        score(empty, uniform)
