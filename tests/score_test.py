# SPDX-License-Identifier: Apache-2.0
"""Scores of continuations: packed and behind shared prefixes as one by one; null models."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.configs import errors
from gptjax.evals import answers, fewshot, measures
from gptjax.runtime import mesh as mesh_lib
from gptjax.sampling import decode, score, texts
from gptjax.sampling import loaded as loaded_lib
from gptjax.text import tokenizer as tokenizer_lib
from tests import helpers


def _decoder(kind: str):
    if kind in ('lstm', 'ngram'):
        return helpers.baseline_decoder(kind)
    model = helpers.tiny_model(n_ctx=64)
    if kind == 'banded':
        model = helpers.tiny_model(n_ctx=64, attention=('dense', 'banded'), band_width=8)
    if kind == 'rotary':
        model = helpers.tiny_model(n_ctx=64, positions='rotary', rotary_dims=8, n_kv_heads=1)
    return decode.Decoder(model, model.config.n_vocab), helpers.params_of(model)


def _requests(n_vocab: int, shared: int, seed: int = 0, items: int = 12) -> list[score.Query]:
    rng = np.random.default_rng(seed)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(rng.integers(0, n_vocab, count).tolist())

    head, found = ids(shared), []
    for _ in range(items):
        context = head + ids(rng.integers(1, 12))
        found += [score.Query(context, ids(rng.integers(1, 6))) for _ in range(3)]
    return found


def _one_by_one(decoder, params, request: score.Query) -> tuple[float, bool]:
    read = (request.context + request.target)[:-1]
    padded = np.array([read + (0,) * (64 - len(read))])
    logits = np.asarray(helpers.applied(decoder.model)(params, padded), np.float64)[0, : len(read)]
    logits -= logits.max(axis=-1, keepdims=True)
    log_probs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    scored = log_probs[-len(request.target) :]
    picked = [row[i] for row, i in zip(scored, request.target, strict=True)]
    return sum(picked), all(
        row.argmax() == i for row, i in zip(scored, request.target, strict=True)
    )


@pytest.mark.parametrize('shared', [0, 40])
@pytest.mark.parametrize('kind', ['gpt', 'banded', 'rotary', 'lstm', 'ngram'])
def test_batched_is_one_by_one(kind, shared):
    decoder, params = _decoder(kind)
    requests = _requests(decoder.n_vocab, shared)
    found = score.Scorer(decoder, params, 512).scores(requests)
    for request, one in zip(requests, found, strict=True):
        log_prob, greedy = _one_by_one(decoder, params, request)
        assert one.log_prob == pytest.approx(log_prob, abs=1e-5)
        assert one.greedy == greedy
        assert (one.tokens, one.truncated) == (len(request.target), False)


@pytest.mark.parametrize('shape', [(8, 1, 1, 1), (2, 2, 2, 1)])
def test_a_mesh_gives_the_same(shape):
    model = helpers.tiny_model(n_ctx=64)
    params = helpers.params_of(model)
    decoder = decode.Decoder(model, model.config.n_vocab)
    requests = _requests(decoder.n_vocab, 0)
    plain = score.Scorer(decoder, params, 512).scores(requests)
    mesh = mesh_lib.Mesh(mesh_lib.Config(*shape, slices=1, across='data'))
    with mesh.scope():
        boxed = jax.eval_shape(model.init_params, jax.random.key(0))
        placed = jax.device_put(params, mesh.shardings(boxed))
        found = score.Scorer(decoder, placed, 512, shape[0] * shape[1]).scores(requests)
    for one, other in zip(plain, found, strict=True):
        assert one.log_prob == pytest.approx(other.log_prob, abs=1e-5)
        assert one.greedy == other.greedy


def test_neighbours_do_not_touch():
    decoder, params = _decoder('gpt')
    one, *others = _requests(decoder.n_vocab, 0)
    scorer = score.Scorer(decoder, params, 1024)
    other_neighbours = _requests(decoder.n_vocab, 0, seed=7)
    a = scorer.scores([one, *others])[0].log_prob
    b = scorer.scores([one, *other_neighbours])[0].log_prob
    assert a == pytest.approx(b, abs=1e-6)


def test_a_context_that_does_not_fit_loses_its_beginning():
    decoder, params = _decoder('gpt')
    rng = np.random.default_rng(0)
    context = tuple(rng.integers(0, 64, 100).tolist())
    scorer = score.Scorer(decoder, params, 256)
    cut, fits = scorer.scores(
        [score.Query(context, (1, 2, 3)), score.Query(context[-62:], (1, 2, 3))]
    )
    assert (cut.truncated, fits.truncated) == (True, False)
    assert cut.log_prob == pytest.approx(fits.log_prob, abs=1e-5)
    long = scorer.scores([score.Query(context[:5], context)])[0]
    assert long.tokens == 100
    assert math.isfinite(long.log_prob)


@pytest.mark.parametrize(('n_ctx', 'stride'), [(8, 0), (8, 3), (8, 8), (64, 0)])
def test_windows_score_every_token_once(n_ctx, stride):
    tokens = tuple(range(30))
    found = score.windows(tokens, n_ctx, stride)
    assert [i for request in found for i in request.target] == list(range(1, 30))
    for request in found:
        whole = request.context + request.target
        assert whole == tuple(range(whole[0], whole[0] + len(whole)))
        assert len(whole) - 1 <= n_ctx
    with pytest.raises(errors.UsageError, match='stride'):
        score.windows(tokens, 8, 9)


def test_bad_requests_are_told():
    decoder, params = _decoder('gpt')
    scorer = score.Scorer(decoder, params, 256)
    with pytest.raises(errors.InputError, match='no context'):
        scorer.scores([score.Query((), (1,))])
    with pytest.raises(errors.InputError, match='outside the vocabulary'):
        scorer.scores([score.Query((1,), (999,))])
    assert scorer.scores([score.Query((1,), ())])[0] == score.Score(0.0, True, 0, False)


def test_forbidden_tokens_do_not_count_as_likelier():
    decoder, params = _decoder('gpt')
    logits = decoder.model.apply({'params': params}, np.array([[3, 5]]))[0, -1]
    best, second = np.argsort(np.asarray(logits))[::-1][:2].tolist()
    request = score.Query((3, 5), (second,))
    assert not score.Scorer(decoder, params, 256).scores([request])[0].greedy
    banned = frozenset((best,))
    assert score.Scorer(decoder, params, 256, banned=banned).scores([request])[0].greedy


def test_pairs_are_cut_from_tokens_of_both():
    bytes_ = tokenizer_lib.Bytes()
    pair = texts.pair(bytes_, 'Answer: ', 'yes')
    assert bytes_.decode(pair.target) == ' yes'
    assert bytes_.decode(pair.context) == 'Answer:'
    assert not pair.straddles
    empty = texts.pair(bytes_, '', 'yes')
    assert (empty.context, bytes_.decode(empty.target)) == ([bytes_.end_of_text], 'yes')


class _Merging(tokenizer_lib.Bytes):
    """Bytes, but 'ab' is one token."""

    def encode(self, text, allow_special=False):
        ids = super().encode(text.replace('ab', '\x00'))
        return [256 + 1 if i == 0 else i for i in ids]


def test_a_token_of_both_counts_to_the_target():
    pair = texts.pair(_Merging(), 'xa', 'by')
    assert pair.straddles
    assert (pair.context, len(pair.target)) == ([ord('x')], 2)


def _uniform() -> answers.Respondent:
    """A model to which all 257 bytes are equally likely."""
    model = helpers.tiny_model(n_vocab=257, n_ctx=128)
    params = jax.tree.map(jnp.zeros_like, helpers.params_of(model))
    loaded = loaded_lib.Loaded(
        decode.Decoder(model, 257), params, tokenizer_lib.Bytes(), {'eos_token_id': (256,)}
    )
    return answers.Respondent(loaded, 512, 1, 128, 0, 4)


def _written(tmp_path, name: str, split: str, records: list[dict]) -> str:
    folder = tmp_path / name
    folder.mkdir(parents=True, exist_ok=True)
    lines = ''.join(json.dumps(record) + '\n' for record in records)
    (folder / f'{split}.jsonl').write_text(lines)
    return str(tmp_path)


def _asked(respondent: answers.Respondent, name: str, data_dir: str, k: int = 0):
    task = fewshot.find(name)
    prompts = fewshot.prompts(task, k, 0, data_dir).prompts
    units = respondent.units(task, prompts)
    rows = [row for some in respondent.rows(task, units, 0) for row in some]
    return task, sorted(rows, key=lambda row: row['i'])


def test_a_uniform_model_has_perplexity_v_and_chance_accuracy(tmp_path):
    words = ['one', 'three', 'thirteen', 'at']
    data_dir = _written(
        tmp_path,
        'piqa',
        'validation',
        [{'query': f'{i} is', 'choices': words, 'gold': i % 4} for i in range(10)],
    )
    _, rows = _asked(_uniform(), 'piqa', data_dir)
    assert measures.measure('accuracy', rows, 'token').value == pytest.approx(25.0)
    # Summed, the shortest is the likeliest: the tie rule does not help where there is no tie.
    assert measures.measure('accuracy_sum', rows).value == pytest.approx(20.0)
    text = 'no men but sailors or the like are like to be interested .\n' * 3
    _written(tmp_path, 'ptb', 'validation', [{'text': text}])
    _, rows = _asked(_uniform(), 'ptb_valid', data_dir)
    assert measures.measure('token_perplexity', rows).value == pytest.approx(257, rel=1e-5)
    assert measures.measure('bits_per_byte', rows).value == pytest.approx(math.log2(257), rel=1e-5)
    assert sum(row['words'] for row in rows) == pytest.approx(3 * (13 + 1))


class _Oracle:
    """Scores that know the right answers, in the place of a model's."""

    def __init__(self, right: set[tuple[int, ...]]) -> None:
        self._right = right

    def score(self, requests, progress=lambda n: None):
        yield [
            (
                i,
                score.Score(
                    0.0 if r.target in self._right else -50.0,
                    r.target in self._right,
                    len(r.target),
                    False,
                ),
            )
            for i, r in enumerate(requests)
        ]


def test_an_oracle_has_everything_right(tmp_path, monkeypatch):
    data_dir = _written(
        tmp_path,
        'piqa',
        'validation',
        [{'query': f'{i} is', 'choices': ['wrong', f'right {i}'], 'gold': 1} for i in range(5)],
    )
    _written(tmp_path, 'lambada', 'test', [{'text': f'it is right {i}'} for i in range(5)])
    bytes_ = tokenizer_lib.Bytes()
    right = {tuple(bytes_.encode(f' right {i}')) for i in range(5)}
    right |= {tuple(bytes_.encode(f' {i}')) for i in range(5)}
    monkeypatch.setattr(answers.Respondent, 'scorer', lambda *a, **k: _Oracle(right))
    for name in ('piqa', 'lambada'):
        task, rows = _asked(_uniform(), name, data_dir)
        assert measures.measure('accuracy', rows, task.normalise).value == 100.0


def test_an_unconditional_probability_divides(tmp_path):
    rows = [
        {'log_probs': [-2.0, -3.0], 'tokens': [1, 3], 'unconditional': [-1.0, -4.0], 'gold': [1]}
    ]
    assert measures.measure('accuracy_sum', rows).value == 0
    assert measures.measure('accuracy_token', rows).value == 100  # -2 against -1 a token
    assert measures.measure('accuracy_answer_context', rows).value == 100  # -1 against 1


def test_measures_of_text():
    row = {'text': 'The Beatles!', 'answers': ['a beatles', 'Queen'], 'word': '', 'gold': [0]}
    assert measures.measure('exact_match', [row]).value == 100
    assert measures.measure('exact', [row]).value == 0
    assert measures.f1('the red house', 'a red car') == pytest.approx(0.5)
    values = measures.measure('accuracy', [{'greedy': i < 3} for i in range(4)])
    assert values.value == 75
    assert values.stderr == pytest.approx(100 * math.sqrt(0.75 * 0.25 / 3))
    bleu = [{'text': 'the cat sat on the mat', 'answers': ['the cat sat on the mat']}] * 2
    assert measures.measure('bleu', bleu).value == pytest.approx(100)


def test_paired_bootstrap_sees_a_difference_and_none():
    rng = np.random.default_rng(0)
    base = (rng.random(400) < 0.5) * 100.0
    better = np.maximum(base, (rng.random(400) < 0.2) * 100.0)
    difference, low, high, p = measures.paired(better, base)
    assert low > 0
    assert p < 0.01
    assert low <= difference <= high
    same = measures.paired(base, base)
    assert same[0] == 0
    assert same[3] == 1
