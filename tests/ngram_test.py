# SPDX-License-Identifier: Apache-2.0
"""The n-gram model against its formula in fractions, against kenlm, and as a distribution."""

import collections
import contextlib
import itertools
import os
import resource
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.configs import errors, sizes
from gptjax.models import grams, heads, kneser_ney, ngram
from gptjax.models.published import arpa
from gptjax.sampling import score
from gptjax.storage import columns
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
    tables = helpers.ngram_tables([[s] for s in sequences], order, n_vocab)
    drawn = np.random.default_rng(0).integers(0, n_vocab, (60, order - 1))
    tokens = jnp.asarray(np.pad(drawn, ((0, 0), (1, 0)), constant_values=-1), jnp.int32)
    contexts = ngram.contexts(tables, tokens)
    found = ngram.log_probs(tables, contexts)
    wanted = [[formula.prob(tuple(c), v) for v in range(n_vocab)] for c in drawn.tolist()]
    wanted = np.array(wanted, np.float64)
    np.testing.assert_allclose(np.exp(found[:, 0]), wanted, rtol=5e-6)
    targets = jnp.broadcast_to(jnp.arange(n_vocab), (60, n_vocab))
    each = jnp.broadcast_to(contexts, (60, n_vocab, order - 1))
    alone = ngram.target_log_probs(tables, each, targets)
    np.testing.assert_allclose(np.exp(alone), wanted, rtol=5e-6)


def test_some_orders_above_fell_back_and_some_did_not():
    found = [Formula([text(400, 6), text(200, 6, seed=1)], 3, 6).discounts[k] for k in (1, 2, 3)]
    fallback = [Fraction(0), Fraction(1, 2), Fraction(1), Fraction(3, 2)]
    assert fallback in found
    assert any(discount != fallback for discount in found)
    assert kneser_ney.discounts((2, 1, 1, 0)) == kneser_ney.FALLBACK
    nothing_left = (4, 1, 1, 1)  # the discount of 2 would be 0
    assert kneser_ney.discounts(nothing_left) == kneser_ney.FALLBACK


@pytest.fixture(scope='module')
def model():
    """A 4-gram model of 20,000 tokens as a language model, and its parameters."""
    tables = helpers.ngram_tables([[text(20_000, 50)]], 4, 50)
    entries = tuple(len(table['token']) for table in tables.values())
    built = heads.build(sizes.ngram(4, n_ctx=16, n_vocab=50, entries=entries))
    return built, ngram.params_of(tables), tables


def test_probabilities_sum_to_one_for_seen_and_unseen_contexts(model):
    _, _, tables = model
    rng = np.random.default_rng(1)
    seen = np.lib.stride_tricks.sliding_window_view(text(20_000, 50), 3)
    seen = seen[rng.integers(0, len(seen), 500)]
    contexts = np.concatenate([seen, rng.integers(0, 50, (500, 3))])
    rows = ngram.contexts(tables, jnp.asarray(np.pad(contexts, ((0, 0), (1, 0))), jnp.int32))
    found = np.exp(np.asarray(ngram.log_probs(tables, rows)[:, -1], np.float64))
    assert found.shape == (1000, 50)
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=4e-6)
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


SPILLS = [(5, 40, 700, 64), (3, 40, 90, 30), (6, 70_000, 500, 5000), (1, 300, 50, 20), (2, 2, 9, 3)]


@pytest.mark.parametrize(('order', 'n_vocab', 'memory', 'block'), SPILLS)
def test_counts_spilled_to_disk_are_the_same(order, n_vocab, memory, block, tmp_path, monkeypatch):
    pieces = [text(3000, n_vocab), text(500, n_vocab, seed=2)]
    sequences = [pieces, pieces[:1], [np.zeros(900, np.int64)]]  # with one that repeats itself
    whole = helpers.ngram_tables(sequences, order, n_vocab)
    for module in (kneser_ney, grams):
        monkeypatch.setattr(module, '_BLOCK', block)
    told = collections.Counter()

    @contextlib.contextmanager
    def stage(what, total, unit):
        yield lambda done: told.update({what: done})

    spilled = kneser_ney.estimate(sequences, order, n_vocab, memory, tmp_path, stage)
    assert told['survey'] == told['count'] == 7400
    assert told['smooth'] == sum(len(table['token']) for table in spilled.values())
    assert whole.keys() == spilled.keys()
    for k, table in whole.items():
        assert table.keys() == spilled[k].keys()
        for name, array in table.items():
            np.testing.assert_array_equal(array, spilled[k][name])
    assert len(list(tmp_path.iterdir())) <= 4 * order  # the tables


def test_rows_are_held_so_many_at_a_time(tmp_path, monkeypatch):
    """Counts what is sorted at once, of ten times as many tokens."""
    held, sorted_ = [], columns.Sorter._sorted

    def watched(sorter):
        held.append(sum(len(part[0]) for part in sorter._held))
        return sorted_(sorter)

    monkeypatch.setattr(columns.Sorter, '_sorted', watched)
    for module in (kneser_ney, grams):
        monkeypatch.setattr(module, '_BLOCK', 100)
    kneser_ney.estimate([[text(20_000, 500)]], 4, 500, 2000, tmp_path)
    assert len(held) > 20
    assert max(held) <= 2100


@pytest.mark.parametrize(('length', 'order'), [(1, 2), (1, 5), (2, 3), (3, 20), (4, 4)])
def test_a_text_may_be_shorter_than_the_order(length, order):
    tokens = text(length, 5)
    tables = helpers.ngram_tables([[tokens]], order, 5)
    entries = tuple(table['token'].size for table in tables.values())
    assert entries[length:] == (0,) * (order - length)
    model = heads.build(sizes.ngram(order, n_ctx=8, n_vocab=5, entries=entries))
    params = {'params': ngram.params_of(tables)}
    weights = jnp.ones((1, length))
    logits = model.apply(params, tokens[None])
    np.testing.assert_allclose(np.exp(logits).sum(-1), 1, atol=1e-5)
    found = model.apply(params, tokens[None], tokens[None], weights, method='nats')
    expected = -np.take_along_axis(np.asarray(logits), tokens[None, :, None], 2).sum()
    assert found == pytest.approx(expected, rel=1e-5)
    jax.eval_shape(model.init_params, jax.random.key(0))
    jax.eval_shape(heads.build(sizes.ngram(order)).init_params, jax.random.key(0))


def test_any_number_of_runs_needs_few_open_files(tmp_path, monkeypatch):
    for module in (kneser_ney, grams):
        monkeypatch.setattr(module, '_BLOCK', 10)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    tokens = text(700, 60)
    whole = helpers.ngram_tables([[tokens]], 3, 60)
    opened = len(os.listdir('/proc/self/fd'))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 20, before[1]))
        found = kneser_ney.estimate([[tokens]], 3, 60, 10, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    jax.tree.map(np.testing.assert_array_equal, found, whole)


def test_contexts_of_no_tokens_are_picked():
    found = score._picked(jnp.zeros((2, 3, 0), jnp.int32), jnp.zeros((1, 2), jnp.int32))
    assert found.shape == (1, 2, 0)


def test_more_memory_than_there_are_ngrams_is_no_mistake(tmp_path):
    found = kneser_ney.estimate([[text(300, 60)]], 3, 60, 2**40, tmp_path)
    jax.tree.map(
        np.testing.assert_array_equal, found, helpers.ngram_tables([[text(300, 60)]], 3, 60)
    )


def test_equal_rows_are_never_in_two_blocks(tmp_path):
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 3, (2, 900)).astype(np.uint16)
    sorter = columns.Sorter(tmp_path / 'x', 50, add=False)
    for start in range(0, 900, 30):
        sorter.put(tuple(keys[:, start : start + 30]), np.arange(start, start + 30))
    blocks = list(sorter.blocks())
    seen = [{*zip(*rows, strict=True)} for rows, _ in blocks]
    assert sum(map(len, seen)) == len(set.union(*seen)) == 9
    assert sorted(np.concatenate([values for _, values in blocks]).tolist()) == list(range(900))
    for rows, values in blocks:
        np.testing.assert_array_equal(np.stack(rows), keys[:, values])
    assert not any(tmp_path.iterdir())


def test_the_number_of_ngrams_is_known_before(monkeypatch):
    drawn = text(60_000, 3000)
    exact = [len({*zip(*(drawn[i:] for i in range(k)), strict=False)}) for k in (1, 2, 3)]
    found = grams.survey([[drawn]], 3, 3000, kneser_ney._quiet)
    assert found.n_grams == (3000, exact[1] + 1, exact[2] + 2)  # with those after a boundary
    monkeypatch.setattr(grams, '_KEPT', 1 << 10)
    about = grams.survey([[drawn]], 3, 3000, kneser_ney._quiet)
    np.testing.assert_allclose(about.n_grams, found.n_grams, rtol=0.15)
    assert about.n_grams != found.n_grams


def test_what_does_not_fit_is_said_before_it_is_counted(tmp_path, monkeypatch):
    with pytest.raises(errors.InputError, match=r'GB of disk at .* are free: make room, or lower'):
        grams.Size(10**15, 50257, (50257, 10**9, 10**9)).check(tmp_path, 10**6)
    with pytest.raises(errors.InputError, match='about 2,147,483,648 different n-grams, and at'):
        grams.Size(3 * 10**9, 50257, (50257, 2**31)).check(tmp_path, 10**6)
    monkeypatch.setattr(grams, 'MOST', 1000)
    with pytest.raises(errors.InputError, match='at most 1,000 can be numbered; lower model.order'):
        kneser_ney.estimate([[text(20_000, 500)]], 4, 500, 2000, tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ('order', 'n_vocab', 'memory'), [(5, 50, 2000), (3, 3000, 700), (1, 99, 500), (6, 9, 10**6)]
)
def test_the_disk_that_is_asked_for_is_about_what_is_used(order, n_vocab, memory, tmp_path):
    used = [0]

    @contextlib.contextmanager
    def stage(what, total, unit):
        def look(done):
            used[0] = max(used[0], sum(p.stat().st_size for p in tmp_path.iterdir()))

        yield look

    tokens = text(20_000, n_vocab)
    size = grams.survey([[tokens]], order, n_vocab, kneser_ney._quiet)
    tables = kneser_ney.estimate([[tokens]], order, n_vocab, memory, tmp_path, stage)
    tables = sum(array.nbytes for table in tables.values() for array in table.values())
    assert max(used[0], 2 * tables) <= 1.01 * size.disk_bytes(memory)
    assert size.disk_bytes(memory) < 2.5 * max(used[0], 2 * tables)


def test_wide_vocabularies_take_several_words():
    tokens = np.array([0, 70_000, 3, 70_000, 3, 99_999, 0, 70_000, 3])
    tables = helpers.ngram_tables([[tokens]], 5, 100_000)
    formula = Formula([tokens], 3, 100_000)
    lower = {k: tables[k] for k in ('order_1', 'order_2')}
    found = ngram.log_probs(lower, ngram.contexts(lower, jnp.asarray(tokens, jnp.int32)[None]))
    assert found.shape == (1, 8, 100_000)
    assert tables['order_3']['token'].size == len(formula.counts[3])


def test_distributions_are_the_same_however_many_rows_are_written_at_once(model, monkeypatch):
    _, _, tables = model
    rows = ngram.contexts(tables, jnp.asarray(text(40, 50, seed=9), jnp.int32)[None])
    whole = ngram.log_probs(tables, rows)
    monkeypatch.setattr(ngram, '_ROWS', 17)
    np.testing.assert_array_equal(ngram.log_probs(tables, rows), whole)


def test_arpa_scores_equally_in_kenlm(model, tmp_path):
    kenlm = pytest.importorskip('kenlm')
    _, _, tables = model
    arpa.write(tables, tmp_path / 'model.arpa')
    peer = kenlm.Model(str(tmp_path / 'model.arpa'))
    tokens = np.concatenate([text(200, 50, seed=8), np.random.default_rng(3).integers(0, 50, 200)])
    sentence = ' '.join(map(str, tokens))
    theirs = [score for score, _, _ in peer.full_scores(sentence, bos=False, eos=False)]
    before = jnp.asarray(np.concatenate([[-1, -1, -1], tokens])[None, :-1], jnp.int32)
    rows = ngram.contexts(tables, before)
    ours = ngram.target_log_probs(tables, rows, jnp.asarray(tokens)[None, 1:])[0] / np.log(10)
    np.testing.assert_allclose(ours, theirs[1:], atol=1e-5)


@pytest.mark.parametrize('most', [3, 1 << 18])
def test_an_arpa_file_is_line_for_line_its_tables(most, tmp_path, monkeypatch):
    monkeypatch.setattr(arpa, '_LINES', most)
    tables = helpers.ngram_tables([[text(500, 120)]], 3, 120)
    tables = {k: {n: np.array(x) for n, x in table.items()} for k, table in tables.items()}
    tables['order_2']['log_backoff'][:2] = -np.inf, 0.0
    arpa.write(tables, tmp_path / 'x')
    lines = (tmp_path / 'x').read_text().splitlines()
    assert lines[0] == '\\data\\'
    assert lines[-1] == '\\end\\'
    number = {k: len(tables[f'order_{k}']['token']) for k in (1, 2, 3)}
    assert lines[1:4] == [f'ngram 1={number[1] + 3}', *(f'ngram {k}={number[k]}' for k in (2, 3))]
    contexts = {(): None}
    for k in (1, 2, 3):
        table = tables[f'order_{k}']
        begins = tables[f'order_{k - 1}']['first'] if k > 1 else [0, number[1]]
        found = {}
        for context, (first, last) in zip(contexts, itertools.pairwise(begins), strict=True):
            for row in range(first, last):
                backoff = [table['log_backoff'][row]] if k < 3 else []
                found[(*context, int(table['token'][row]))] = [table['log_prob'][row], *backoff]
        start = lines.index(f'\\{k}-grams:') + (4 if k == 1 else 1)
        for line, (gram, logs) in zip(lines[start : start + number[k]], found.items(), strict=True):
            prob, words, *backoff = line.split('\t')
            assert words == ' '.join(map(str, gram))
            wanted = np.maximum(np.array(logs, np.float64) / np.log(10), -99)
            np.testing.assert_allclose([float(x) for x in (prob, *backoff)], wanted, atol=6e-8)
        contexts = found


def test_bad_input_is_said():
    with pytest.raises(errors.InputError, match=r'outside 0 \.\. 9'):
        helpers.ngram_tables([[np.array([3, 10])]], 2, 10)
    with pytest.raises(errors.InputError, match='no token to count'):
        helpers.ngram_tables([[]], 2, 10)
