# SPDX-License-Identifier: Apache-2.0
"""The n-gram model against its formula in fractions, against kenlm, and as a distribution."""

import collections
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.configs import errors, sizes
from gptjax.models import heads, kneser_ney, ngram
from tests import helpers


def text(length, n_vocab, seed=0):
    """Tokens with a long tail, each a little like the one before."""
    rng = np.random.default_rng(seed)
    drawn = np.minimum(rng.zipf(1.5, length), n_vocab) - 1
    same = rng.random(length) < 0.3
    drawn[1:][same[1:]] = drawn[:-1][same[1:]]
    return drawn


class Formula:
    """Chen and Goodman 1998, section 3, written down in fractions; slow and plain."""

    def __init__(self, sequences, order, n_vocab):
        self.order, self.n_vocab = order, n_vocab
        self.counts = {k: collections.Counter() for k in range(1, order + 1)}
        before = {k: collections.defaultdict(set) for k in range(1, order + 1)}
        for sequence in sequences:
            sequence = [int(token) for token in sequence]
            for end in range(1, len(sequence) + 1):
                for k in range(1, min(order, end) + 1):
                    gram = tuple(sequence[end - k : end])
                    self.counts[k][gram] += 1
                    before[k][gram].add(sequence[end - k - 1] if end > k else 'start')
        for k in range(1, order):
            self.counts[k] = collections.Counter({g: len(s) for g, s in before[k].items()})
        self.discounts = {k: self._discounts(self.counts[k]) for k in self.counts}

    @staticmethod
    def _discounts(counts):
        t = collections.Counter(counts.values())
        if not all(t[k] for k in (1, 2, 3, 4)):
            return [Fraction(0), Fraction(1, 2), Fraction(1), Fraction(3, 2)]
        y = Fraction(t[1], t[1] + 2 * t[2])
        found = [k - (k + 1) * y * Fraction(t[k + 1], t[k]) for k in (1, 2, 3)]
        if not all(0 < d <= k for k, d in enumerate(found, 1)):
            return [Fraction(0), Fraction(1, 2), Fraction(1), Fraction(3, 2)]
        return [Fraction(0), *found]

    def prob(self, context, token):
        k = len(context) + 1
        below = Fraction(1, self.n_vocab) if k == 1 else self.prob(context[1:], token)
        after = {g: c for g, c in self.counts[k].items() if g[:-1] == context}
        total = sum(after.values())
        if not total:
            return below
        discount = self.discounts[k]
        left = sum(discount[min(c, 3)] for c in after.values())
        count = after.get((*context, token), 0)
        return (count - discount[min(count, 3)] + left * below) / total


@pytest.mark.parametrize(
    ('order', 'length', 'n_vocab'), [(1, 40, 9), (2, 300, 7), (3, 400, 6), (4, 120, 5), (3, 3, 5)]
)
def test_estimation_is_the_formula(order, length, n_vocab):
    sequences = [text(length, n_vocab), text(length // 2, n_vocab, seed=1)]
    formula = Formula(sequences, order, n_vocab)
    tables = kneser_ney.estimate([[s] for s in sequences], order, n_vocab, 10**6)
    rng = np.random.default_rng(0)
    for _ in range(60):
        context = tuple(rng.integers(0, n_vocab, order - 1).tolist())
        row = np.array([[*context]], np.int64) if context else np.zeros((1, 0), np.int64)
        row = np.concatenate([np.full((1, order - 1), -1), row], 1)
        # What follows the last token of the context: ask with a token in front where there is none.
        found = ngram.log_probs(tables, row if context else np.array([[0]]), max(order - 2, 0))
        wanted = [float(formula.prob(context, token)) for token in range(n_vocab)]
        np.testing.assert_allclose(np.exp(found[0, -1]), wanted, rtol=2e-6)


def test_some_orders_above_fell_back_and_some_did_not():
    found = [Formula([text(400, 6), text(200, 6, seed=1)], 3, 6).discounts[k] for k in (1, 2, 3)]
    fallback = [Fraction(0), Fraction(1, 2), Fraction(1), Fraction(3, 2)]
    assert fallback in found
    assert any(discount != fallback for discount in found)
    assert kneser_ney.discounts(np.array([1, 1, 2, 3])) == kneser_ney.FALLBACK
    nothing_left = np.array([1, 1, 1, 1, 2, 3, 4])  # the discount of 2 would be 0
    assert kneser_ney.discounts(nothing_left) == kneser_ney.FALLBACK


@pytest.fixture(scope='module')
def model():
    """A 4-gram model of 20,000 tokens as a language model, and its parameters."""
    tables = kneser_ney.estimate([[text(20_000, 50)]], 4, 50, 10**6)
    entries = tuple(len(table['token']) for table in tables.values())
    built = heads.build(sizes.ngram(4, n_ctx=16, n_vocab=50, entries=entries))
    return built, ngram.params_of(tables), tables


def test_probabilities_sum_to_one_for_seen_and_unseen_contexts(model):
    _, _, tables = model
    rng = np.random.default_rng(1)
    seen = np.lib.stride_tricks.sliding_window_view(text(20_000, 50), 3)
    seen = seen[rng.integers(0, len(seen), 500)]
    contexts = np.concatenate([seen, rng.integers(0, 50, (500, 3))])
    found = np.exp(ngram.log_probs(tables, contexts, 0)[:, -1].astype(np.float64))
    assert found.shape == (1000, 50)
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=2e-6)
    assert (found > 0).all()
    known = {tuple(row) for row in np.lib.stride_tricks.sliding_window_view(text(20_000, 50), 3)}
    assert 50 < sum(tuple(row) not in known for row in contexts) < 500


def test_it_is_a_language_model_like_the_others(model):
    built, params, _ = model
    tokens = text(32, 50, seed=5).reshape(2, 16)
    logits = built.apply({'params': params}, tokens)
    assert logits.shape == (2, 16, 50)
    np.testing.assert_allclose(np.exp(logits).sum(-1), 1, atol=1e-5)
    padded = np.concatenate([np.full((2, 3), 7), tokens], axis=1)
    positions = np.broadcast_to([-1] * 3 + list(range(16)), (2, 19))
    found = helpers.applied(built)(params, padded, positions)
    np.testing.assert_array_equal(found[:, 3:], logits)
    cache = built.config.empty_cache(2, 16)
    for start, stop in ((0, 5), (5, 6), (6, 16)):
        positions = jnp.broadcast_to(jnp.arange(start, stop)[None], (2, stop - start))
        found, cache = helpers.applied(built, 'extend')(
            params, jnp.asarray(tokens[:, start:stop], jnp.int32), positions, cache
        )
        np.testing.assert_allclose(found[:, 0], logits[:, stop - 1], rtol=1e-6)


def test_counts_spilled_to_disk_are_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(kneser_ney, 'MERGE_ROWS', 64)
    pieces = [text(3000, 40), text(500, 40, seed=2)]
    whole = kneser_ney.estimate([pieces, pieces[:1]], 5, 40, 10**6)
    told = []
    spilled = kneser_ney.estimate([pieces, pieces[:1]], 5, 40, 700, tmp_path, told.append)
    assert sum(told) == 6500
    for k, table in whole.items():
        for name, array in table.items():
            np.testing.assert_array_equal(array, spilled[k][name])
    assert not any(tmp_path.iterdir())  # the runs are gone


def test_wide_vocabularies_take_several_words():
    tokens = np.array([0, 70_000, 3, 70_000, 3, 99_999, 0, 70_000, 3])
    tables = kneser_ney.estimate([[tokens]], 5, 100_000, 10**6)
    formula = Formula([tokens], 3, 100_000)
    found = ngram.log_probs({k: tables[k] for k in ('order_1', 'order_2')}, tokens[None], 0)
    assert found.shape == (1, 9, 100_000)
    assert tables['order_3']['token'].size == len(formula.counts[3])


def test_arpa_scores_equally_in_kenlm(model, tmp_path):
    kenlm = pytest.importorskip('kenlm')
    _, _, tables = model
    ngram.write_arpa(tables, tmp_path / 'model.arpa')
    peer = kenlm.Model(str(tmp_path / 'model.arpa'))
    tokens = np.concatenate([text(200, 50, seed=8), np.random.default_rng(3).integers(0, 50, 200)])
    sentence = ' '.join(map(str, tokens))
    theirs = [score for score, _, _ in peer.full_scores(sentence, bos=False, eos=False)]
    before = np.concatenate([[-1, -1, -1], tokens])[None]
    log_probs = ngram.log_probs(tables, before, 0)[0]
    ours = log_probs[np.arange(2, len(tokens) + 2), tokens] / np.log(10)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_bad_input_is_said():
    with pytest.raises(errors.InputError, match=r'outside 0 \.\. 9'):
        kneser_ney.estimate([[np.array([3, 10])]], 2, 10, 100)
    with pytest.raises(errors.InputError, match='no token to count'):
        kneser_ney.estimate([[]], 2, 10, 100)
