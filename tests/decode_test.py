# SPDX-License-Identifier: Apache-2.0
"""Prefill and decode against plain loops: rows are what they would be alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.configs import errors
from gptjax.models import heads, quantize
from gptjax.sampling import batch, decode, texts
from gptjax.text import tokenizer as tokenizer_lib
from tests import helpers

asked = helpers.asked
PROMPTS = [[5], [1, 2, 3, 4, 5, 6, 7], [60, 3, 9]]


@pytest.fixture(scope='module')
def tiny():
    model = helpers.tiny_model()
    return decode.Decoder(model, model.config.n_vocab), helpers.params_of(model)


def logits_after(decoder, params, ids):
    """The full forward, no cache, no padding; of one shape, so that it compiles once."""
    padded = np.zeros((1, decoder.model.config.n_ctx), np.int32)
    padded[0, : len(ids)] = ids
    return helpers.applied(decoder.model)(params, padded)[0, len(ids) - 1]


def plain(decoder, params, prompt, steps, end=-1):
    """Greedy decoding as one would write it first."""
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(jnp.argmax(logits_after(decoder, params, ids))))
        if ids[-1] == end:
            break
    return ids[len(prompt) :]


def tokens_of(found):
    return [text.tokens for text in found]


@pytest.mark.parametrize('cell', ['', 'lstm', 'ngram'])
def test_a_ragged_batch_equals_a_plain_loop(cell, tiny):
    decoder, params = tiny
    if cell:
        decoder, params = helpers.baseline_decoder(cell)
    found = batch.generate(decoder, params, PROMPTS, [asked(max_new_tokens=6)] * 3)
    assert tokens_of(found) == [plain(decoder, params, prompt, 6) for prompt in PROMPTS]
    assert {text.reason for text in found} == {'length'}


def test_rows_of_one_batch_may_differ_in_every_option(tiny):
    each = [
        asked(max_new_tokens=9, no_repeat_ngram_size=2, repetition_penalty=1.3),
        asked(max_new_tokens=3, do_sample=True, top_p=0.8, seed=4, logprobs=2),
        asked(max_length=8, bad_words_ids=[[3], [9, 12]], do_sample=True, min_p=0.02, seed=5),
        asked(max_new_tokens=5, presence_penalty=1.5, frequency_penalty=-0.5, min_new_tokens=2),
    ]
    prompts = [*PROMPTS, [2, 2]]
    together = batch.generate(*tiny, prompts, each)
    alone = [batch.generate(*tiny, [p], [o])[0] for p, o in zip(prompts, each, strict=True)]
    assert tokens_of(together) == tokens_of(alone)
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)


def test_an_end_token_stops_a_row_and_padding_may_be_one(tiny):
    free = batch.generate(*tiny, PROMPTS, [asked(max_new_tokens=6)] * 3)
    end = free[1].tokens[2]
    for ends in ([end], [end, 0], [63, 62, 61, 60, 59, 58, end]):
        found = batch.generate(*tiny, PROMPTS, [asked(max_new_tokens=6, eos_token_id=ends)] * 3)
        assert found[1].tokens == free[1].tokens[: free[1].tokens.index(end) + 1]
        assert found[1].reason == 'stop'


def test_log_probs_are_those_of_the_prompt_alone(tiny):
    options = asked(
        max_new_tokens=4, echo=True, logprobs=3, repetition_penalty=5.0, no_repeat_ngram_size=1
    )
    found = batch.generate(*tiny, PROMPTS, [options] * 3)
    for prompt, text in zip(PROMPTS, found, strict=True):
        ids = [*prompt, *text.tokens]
        told = [*text.prompt_logprobs, *text.logprobs]
        tops = [*text.prompt_top, *text.top]
        for i in range(1, len(ids)):
            log_probs = jax.nn.log_softmax(logits_after(*tiny, ids[:i]))
            np.testing.assert_allclose(told[i - 1], log_probs[ids[i]], atol=1e-5)
            best = np.argsort(-np.asarray(log_probs))[:3]
            assert list(tops[i - 1]) == best.tolist()
            np.testing.assert_allclose(list(tops[i - 1].values()), log_probs[best], atol=1e-5)
        np.testing.assert_allclose(text.score, sum(text.logprobs), rtol=1e-6)


def test_padding_has_no_influence_at_all(tiny):
    decoder, params = tiny
    tokens = jnp.asarray([[7, 8, 9, 0, 0, 0]])
    positions = jnp.asarray([[0, 1, 2, -1, -1, -1]])

    def after(table, tokens):
        network = params['network'] | {'token_embedding': table}
        cache = decoder.empty_cache(1, 8)
        return decoder.extend({'network': network}, tokens, positions, cache)[0]

    table = params['network']['token_embedding']
    untied = helpers.tiny_model(tied_embedding=False)
    np.testing.assert_array_equal(
        after(table, tokens), after(table, tokens.at[0, 3:].set(jnp.asarray([5, 63, 11])))
    )
    params = params | {'network': params['network'] | {'unembedding': table}}
    decoder = decode.Decoder(untied, 64)
    gradient = jax.grad(lambda table: jnp.square(after(table, tokens)).sum())(table)
    touched = np.flatnonzero(np.abs(np.asarray(gradient)).sum(axis=1))
    assert touched.tolist() == [7, 8, 9]  # exactly zero for the padding's token 0


def test_penalties_never_read_padding(tiny):
    options = asked(max_new_tokens=6, repetition_penalty=50.0, no_repeat_ngram_size=1)
    free = plain(*tiny, PROMPTS[0], 1)
    ragged = batch.generate(*tiny, PROMPTS, [options] * 3)
    alone = batch.generate(*tiny, PROMPTS[:1], [options])
    assert ragged[0].tokens == alone[0].tokens
    assert alone[0].tokens[0] == free[0] or free[0] == PROMPTS[0][0]
    assert len({*ragged[0].tokens, *PROMPTS[0]}) == 7  # no unigram twice, 0 not among the banned


def test_draws_have_the_models_distribution():
    model = helpers.tiny_model(n_vocab=8)
    params, decoder = helpers.params_of(model), decode.Decoder(model, 8)
    options = asked(max_new_tokens=1, do_sample=True, temperature=0.7, seed=3)
    found = batch.generate(decoder, params, [[1, 2]] * 4096, [options] * 4096, range(4096))
    counts = np.bincount([text.tokens[0] for text in found], minlength=8)
    expected = 4096 * np.asarray(jax.nn.softmax(logits_after(decoder, params, [1, 2]) / 0.7))
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert chi2 < 24.3  # 0.1 % of draws from 7 degrees of freedom exceed it


def test_guided_texts_equal_a_plain_loop_whoever_their_neighbours_are(tiny):
    each = [
        asked(max_new_tokens=7, guidance_scale=2.5, logprobs=2),
        asked(max_new_tokens=9, no_repeat_ngram_size=2, echo=True),
        asked(max_new_tokens=5, guidance_scale=0.0, eos_token_id=[9]),
    ]
    found = batch.generate(*tiny, PROMPTS, each)
    for prompt, one, text in zip(PROMPTS, each, found, strict=True):
        if not one.guided:
            assert text.tokens == batch.generate(*tiny, [prompt], [one])[0].tokens
            continue
        ids, free, told = list(prompt), prompt[-1:], []
        while len(ids) < one.limit(len(prompt)) and ids[len(prompt) :][-1:] != [9]:
            with_, without = (jax.nn.log_softmax(logits_after(*tiny, x)) for x in (ids, free))
            token = int(jnp.argmax(without + one.guidance_scale * (with_ - without)))
            told.append(float(with_[token]))
            ids, free = [*ids, token], [*free, token]
        assert text.tokens == ids[len(prompt) :]
        np.testing.assert_allclose(text.logprobs, told, atol=1e-5)


def test_guided_draws_have_the_guided_distribution():
    model = helpers.tiny_model(n_vocab=8)
    params, decoder = helpers.params_of(model), decode.Decoder(model, 8)
    options = asked(max_new_tokens=1, do_sample=True, guidance_scale=3.0, seed=3)
    found = batch.generate(decoder, params, [[1, 2]] * 4096, [options] * 4096, range(4096))
    counts = np.bincount([text.tokens[0] for text in found], minlength=8)
    one, other = (jax.nn.log_softmax(logits_after(decoder, params, x)) for x in ([1, 2], [2]))
    expected = 4096 * np.asarray(jax.nn.softmax(other + 3 * (one - other)))
    assert np.abs(np.asarray(jax.nn.softmax(one)) * 4096 - expected).max() > 100
    assert ((counts - expected) ** 2 / expected).sum() < 24.3  # 7 degrees of freedom, 0.1 %


def test_the_seed_of_a_request_decides_whatever_its_neighbours(tiny):
    hot = {'max_new_tokens': 6, 'do_sample': True, 'temperature': 2.0}
    one, same, other, moved = (
        batch.generate(*tiny, prompts, [asked(**hot, seed=seed)] * len(prompts))
        for prompts, seed in ((PROMPTS, 0), (PROMPTS, 0), (PROMPTS, 1), (PROMPTS[::-1], 0))
    )
    assert tokens_of(one) == tokens_of(same) == tokens_of(moved)[::-1]
    assert tokens_of(one) != tokens_of(other)


def test_beyond_the_context_the_last_half_is_read_again(tiny):
    decoder, params = tiny
    options = asked(max_new_tokens=40, beyond_context='slide')
    full = batch.generate(decoder, params, [list(range(16))], [options])[0]
    assert len(full.tokens) == 40  # a prompt that fills the context goes on, too
    found = batch.generate(decoder, params, [*PROMPTS, list(range(30))], [options] * 4)
    for prompt, text in zip([*PROMPTS, list(range(30))], found, strict=True):
        ids, first = list(prompt), 0
        for _ in range(40):
            if len(ids) - first > 16:
                first = len(ids) - 8
            ids.append(int(jnp.argmax(logits_after(decoder, params, ids[first:]))))
        assert text.tokens == ids[len(prompt) :]


def test_stop_strings_end_a_text_and_tokens_after_them_are_dropped():
    model = helpers.tiny_model(n_vocab=257, n_ctx=64)
    decoder, params = decode.Decoder(model, 257), helpers.params_of(model)
    stops = texts.Stops(tokenizer_lib.Bytes())
    prompts = [[104, 105], [97]]
    hot = {'max_new_tokens': 30, 'do_sample': True, 'seed': 1}
    free = batch.generate(decoder, params, prompts, [asked(**hot)] * 2)
    string = bytes(free[0].tokens[9:11]).decode('utf-8', 'replace')
    options = [asked(**hot, stop_strings=[string, 'never there']), asked(**hot)]
    guided = asked(max_new_tokens=30, guidance_scale=2.0, suppress_tokens=range(128, 257))
    whole = batch.generate(decoder, params, [[97]], [guided])[0].tokens
    strings = {'stop_strings': (tokenizer_lib.Bytes().decode(whole[4:5]),)}
    ended = batch.Batch(decoder, params, [[97]], [dataclasses.replace(guided, **strings)])
    assert batch.finish(ended, ended.advance, stops)[0].tokens == whole[: whole.index(whole[4]) + 1]
    assert not ended.running  # nor the row without its prompt
    found = batch.generate(decoder, params, prompts, options, stops=stops)
    decoded = tokenizer_lib.Bytes().decode
    kept = next(n for n in range(1, 31) if string in decoded(free[0].tokens[:n]))
    assert found[0].tokens == free[0].tokens[:kept]
    assert (found[0].reason, len(found[0].logprobs)) == ('stop', kept)
    assert found[1].tokens == free[1].tokens
    with pytest.raises(errors.UsageError, match='stop strings need a tokenizer'):
        batch.generate(decoder, params, prompts, options)


def test_what_does_not_fit_is_a_clear_error(tiny):
    with pytest.raises(errors.InputError, match=r"do not fit n_ctx = 16.*beyond_context='slide'"):
        batch.generate(*tiny, [[1] * 11], [asked(max_new_tokens=6)])
    with pytest.raises(errors.InputError, match='a prompt is empty'):
        batch.generate(*tiny, [[1], []], [asked(max_new_tokens=1)] * 2)
    with pytest.raises(errors.InputError, match='max_length = 3, which includes the prompt'):
        batch.generate(*tiny, [[1, 2, 3]], [asked(max_length=3)])
    with pytest.raises(errors.InputError, match='outside the vocabulary: ids are from 0 to 63'):
        batch.generate(*tiny, [[1, 64]], [asked(max_new_tokens=1)])
    with pytest.raises(errors.UsageError, match='names token 64, not below the vocabulary size 64'):
        batch.generate(*tiny, [[1]], [asked(max_new_tokens=1, logit_bias={64: 1.0})])
    with pytest.raises(errors.UsageError, match='has no keys and values to quantise'):
        decode.Decoder(helpers.baseline_decoder('lstm')[0].model, 64, 'int8')


def test_padding_of_the_vocabulary_is_never_drawn():
    model = helpers.tiny_model()
    options = asked(max_new_tokens=6, do_sample=True, temperature=5.0, top_k=0)
    found = batch.generate(
        decode.Decoder(model, 10), helpers.params_of(model), [[1]] * 50, [options] * 50, range(50)
    )
    assert max(max(text.tokens) for text in found) < 10


def test_quantised_caches_and_grouped_queries_have_their_size_and_stay_close():
    model = helpers.tiny_model(n_heads=4, n_kv_heads=2)
    params = helpers.params_of(model)
    exact, small = decode.Decoder(model, 64), decode.Decoder(model, 64, 'int8')
    layer = small.empty_cache(3, 16)[0]
    assert layer.value_BxGxMxK.shape == (3, 2, 16, model.config.d_head)
    assert (layer.key_BxGxKxM.dtype, layer.key_scale_BxGxM.shape) == (jnp.int8, (3, 2, 16))
    options = asked(max_new_tokens=1, echo=True, logprobs=0)
    one, other = (
        batch.generate(d, params, PROMPTS[1:2], [options])[0].prompt_logprobs
        for d in (exact, small)
    )
    assert 0 < np.abs(np.subtract(one, other)).max() < 0.05


def test_a_new_length_inside_a_bucket_compiles_nothing(tiny):
    decoder, params = tiny
    options = [asked(max_new_tokens=3), asked(max_new_tokens=5, do_sample=True, top_p=0.3)]
    params = quantize.for_decoding(params, heads.describe(decoder.model))
    batch.generate(decoder, params, [[1, 2]], options[:1])
    before = decode.prefill._cache_size(), decode.steps._cache_size()
    for length in range(1, 9):
        batch.generate(decoder, params, [[1] * length], options[length % 2 :][:1])
    assert (decode.prefill._cache_size(), decode.steps._cache_size()) == before
    assert [decode.width(n) for n in (1, 32, 33, 100, 129, 200, 1000)] == [
        32,
        32,
        64,
        128,
        192,
        256,
        1024,
    ]


@pytest.mark.parametrize('sizes', [{'data': 4, 'tensor': 2}, {'fsdp': 2, 'tensor': 4}])
def test_any_mesh_gives_the_same_texts(sizes, tiny):
    from gptjax.runtime import mesh as mesh_lib

    model = helpers.tiny_model(n_heads=4)
    decoder, params = decode.Decoder(model, 64), helpers.params_of(model)
    alone = batch.generate(decoder, params, PROMPTS, [asked(max_new_tokens=6)] * 3)
    sizes = {'data': 1, 'fsdp': 1, 'tensor': 1, 'context': 1} | sizes
    mesh = mesh_lib.Mesh(mesh_lib.Config(**sizes, slices=1, across='data'))
    shardings = mesh.shardings(jax.eval_shape(model.init_params, jax.random.key(0)))
    with mesh.scope():
        spread = quantize.for_decoding(jax.device_put(params, shardings), heads.describe(model))
        found = batch.generate(decoder, spread, PROMPTS, [asked(max_new_tokens=6)] * 3)
    assert tokens_of(found) == tokens_of(alone)
