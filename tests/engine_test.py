# SPDX-License-Identifier: Apache-2.0
"""The engine gives every request the text it would have alone, in a fixed amount of memory."""

import threading

import jax
import numpy as np
import pytest

from gptjax.configs import base, errors
from gptjax.sampling import batch, decode, engine, requests
from gptjax.text import tokenizer as tokenizer_lib
from tests import helpers

asked = helpers.asked


def make(decoder, params, tokenizer=None, max_waiting=1024, **overrides):
    config = base.get_config().engine.to_dict() | {'slots': 3, 'chunk_tokens': 8, 'steps': 4}
    return engine.Engine(
        decoder, params, engine.Config(**(config | overrides)), tokenizer, max_waiting
    )


@pytest.fixture(scope='module')
def tiny():
    model = helpers.tiny_model(n_ctx=64)
    return decode.Decoder(model, 64), helpers.params_of(model)


def ragged(count=9, seed=0):
    random = np.random.default_rng(seed)
    prompts = [random.integers(0, 64, n).tolist() for n in random.integers(1, 40, count)]
    options = [
        asked(
            max_new_tokens=int(random.integers(1, 20)),
            do_sample=bool(i % 2),
            seed=i,
            repetition_penalty=1.0 + i / 10,
            logprobs=i % 3 - 1,
            eos_token_id=[3, 7],
        )
        for i in range(count)
    ]
    return prompts, options


@pytest.mark.parametrize('kind', ['', 'lstm', pytest.param('ngram', marks=pytest.mark.slow)])
def test_every_request_gets_the_text_it_would_have_alone(kind, tiny):
    decoder, params = helpers.baseline_decoder(kind) if kind else tiny
    server = make(decoder, params)
    prompts, options = ragged()
    requests = [server.submit(*pair) for pair in zip(prompts, options, strict=True)]
    server.run()
    for prompt, one, request in zip(prompts, options, requests, strict=True):
        alone = batch.generate(decoder, params, [prompt], [one])[0]
        text = request.result()
        assert (text.tokens, text.reason) == (alone.tokens, alone.reason)
        np.testing.assert_allclose(text.logprobs, alone.logprobs, atol=1e-5)
        assert [list(top) for top in text.top] == [list(top) for top in alone.top]
    assert not server.busy


EACH = [  # options, one request each
    {'forced_bos_token_id': 9, 'forced_eos_token_id': [2, 3]},
    {'suppress_tokens': [1, 2, 3, 4, 5, 6], 'begin_suppress_tokens': 9},
    {'exponential_decay_length_penalty': (1, 1.3), 'eos_token_id': [7, 40]},
    {'encoder_repetition_penalty': 2.0},
    {'encoder_no_repeat_ngram_size': 1},
    {'renormalize_logits': True, 'remove_invalid_values': True},
    *({'do_sample': True, name: 0.1} for name in ('top_h', 'epsilon_cutoff', 'eta_cutoff')),
    {'do_sample': True, 'temperature': 3.0},
    {},
]


def test_options_of_one_slot_are_not_its_neighbours(tiny):
    server = make(*tiny)
    prompts = [[4] if i == 0 else list(range(i, i + 9)) for i in range(len(EACH))]
    each = [asked(max_new_tokens=8 + i % 3, seed=i, **given) for i, given in enumerate(EACH)]
    plain = asked(max_new_tokens=10)
    requests = [server.submit(*pair) for pair in zip(prompts, each, strict=True)]
    server.run()
    differ = 0
    for request in requests:
        text = request.result()
        assert text.tokens == decode_alone(*tiny, request).tokens
        free = batch.generate(*tiny, [request.prompt], [plain])[0].tokens[: len(text.tokens)]
        differ += text.tokens != free
    assert differ > 4  # the options do something


def test_beyond_the_context_a_slot_goes_on_as_a_batch_does(tiny):
    model = helpers.tiny_model()
    decoder, params = decode.Decoder(model, 64), helpers.params_of(model)
    server = make(decoder, params, max_tokens=60)
    options = asked(max_new_tokens=35, beyond_context='slide')
    prompts = [[1, 2, 3], list(range(20)), [9]]
    requests = [server.submit(prompt, options) for prompt in prompts]
    server.run()
    alone = batch.generate(decoder, params, prompts, [options] * 3)
    assert [request.result().tokens for request in requests] == [text.tokens for text in alone]


def test_what_prompts_have_in_common_is_read_once(tiny):
    server = make(*tiny)
    head = list(range(30))
    first = server.submit(head, asked(max_new_tokens=4))
    server.run()
    again = server.submit(head, asked(max_new_tokens=4))
    longer = server.submit([*head, *first.result().tokens, 5, 6], asked(max_new_tokens=4))
    other = server.submit([63, *head], asked(max_new_tokens=4))
    server.run()
    assert (first.reused, again.reused, other.reused) == (0, 29, 0)
    assert longer.reused >= 29
    assert again.result().tokens == first.result().tokens
    for request in (longer, other):
        alone = batch.generate(*tiny, [request.prompt], [request.asked])[0]
        assert request.result().tokens == alone.tokens


def test_clients_take_turns(tiny):
    server = make(*tiny, slots=1)
    order = []
    for client, count in (('greedy', 5), ('modest', 1), ('late', 1)):
        for i in range(count):
            server.submit(
                [1, 2],
                asked(max_new_tokens=1),
                client=client,
                on_text=lambda piece, tokens, name=(client, i): order.append(name),
            )
    server.run()
    assert order[:4] == [('greedy', 0), ('modest', 0), ('late', 0), ('greedy', 1)]
    assert len(order) == 7


def test_long_prompts_do_not_hold_up_the_others(tiny):
    server = make(*tiny, slots=2, chunk_tokens=4, steps=1)
    short = server.submit([1], asked(max_new_tokens=6))
    server.step()
    long = server.submit(list(range(40)), asked(max_new_tokens=1))
    rounds = 0
    while not short.done:
        server.step()
        rounds += 1
    assert not long.done
    assert rounds <= 7
    server.run()
    assert long.done


def test_text_streams_in_pieces_that_make_up_the_whole():
    model = helpers.tiny_model(n_vocab=257, n_ctx=64)
    decoder, params = decode.Decoder(model, 257), helpers.params_of(model)
    tokenizer = tokenizer_lib.Bytes()
    server = make(decoder, params, tokenizer, steps=2)
    pieces, told = [], []

    def on_text(piece, tokens):
        pieces.append(piece)
        told.extend(tokens)

    options = asked(max_new_tokens=30, do_sample=True, seed=2)
    request = server.submit([104, 105], options, on_text=on_text)
    server.run()
    assert told == request.result().tokens
    assert ''.join(pieces) == tokenizer.decode(told)
    assert len(pieces) > 5
    string = tokenizer.decode(told)[6:8]
    pieces.clear()
    stopped = server.submit(
        [104, 105], asked(max_new_tokens=30, do_sample=True, seed=2, stop=string), on_text=on_text
    )
    server.run()
    assert stopped.result().reason == 'stop'
    assert ''.join(pieces) == tokenizer.decode(told)[: len(''.join(pieces))]
    assert string not in ''.join(pieces)


def test_requests_can_be_cancelled_waiting_or_half_way(tiny):
    server = make(*tiny, slots=1, steps=2)
    half = server.submit([1, 2], asked(max_new_tokens=40))
    waiting = server.submit([3], asked(max_new_tokens=40))
    after = server.submit([4], asked(max_new_tokens=2))
    server.step()
    server.step()
    waiting.cancel()
    server.step()
    assert waiting.done  # although the slot is taken
    half.cancel()
    server.run()
    assert half.result().reason == waiting.result().reason == 'cancelled'
    assert 0 < len(half.result().tokens) < 40
    assert waiting.result().tokens == []
    assert len(after.result().tokens) == 2


def test_memory_is_bounded(tiny):
    server = make(*tiny, max_waiting=2, max_tokens=32)
    size = sum(x.nbytes for x in jax.tree.leaves(server._state))
    with pytest.raises(errors.InputError, match='exceed the 32 tokens of a slot'):
        server.submit([1] * 20, asked(max_new_tokens=20))
    with pytest.raises(errors.UsageError, match='without beams, echo, guidance and prompt lookup'):
        server.submit([1], asked(max_new_tokens=2, num_beams=2))
    for _ in range(2):
        server.submit([1], asked(max_new_tokens=2))
    with pytest.raises(requests.QueueFull, match='2 requests are waiting'):
        server.submit([1], asked(max_new_tokens=2))
    server.run()
    prompts, options = ragged(20, seed=1)
    for prompt, one in zip(prompts, options, strict=True):
        server.submit(prompt[:10], asked(max_new_tokens=one.max_new_tokens))
        server.run()
    assert sum(x.nbytes for x in jax.tree.leaves(server._state)) == size


def test_threads_may_submit_while_another_runs(tiny):
    server = make(*tiny)
    results = {}

    def ask(i):
        request = server.submit([i, i + 1], asked(max_new_tokens=5), client=str(i))
        results[i] = request.result()

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        server.step()
    for i in range(8):
        alone = batch.generate(*tiny, [[i, i + 1]], [asked(max_new_tokens=5)])[0]
        assert results[i].tokens == alone.tokens


def test_no_new_program_for_new_lengths_and_options(tiny):
    server = make(*tiny)
    prompts, options = ragged(6, seed=3)
    for prompt, one in zip(prompts, options, strict=True):
        server.submit(prompt, one)
    server.run()
    before = decode.steps._cache_size(), engine._read_slot._cache_size()
    prompts, options = ragged(6, seed=4)
    for prompt, one in zip(prompts, options, strict=True):
        server.submit(prompt, one)
    server.run()
    assert (decode.steps._cache_size(), engine._read_slot._cache_size()) == before


def test_a_long_prompt_is_cancelled_before_it_is_read(tiny):
    server = make(*tiny, slots=1, chunk_tokens=4)
    request = server.submit(list(range(50)), asked(max_new_tokens=5))
    server.step()
    request.cancel()
    server.step()
    assert request.result().reason == 'cancelled'
    assert request.result().tokens == []
    again = server.submit(list(range(50)), asked(max_new_tokens=5))
    server.run()
    assert again.reused >= 4
    alone = decode_alone(*tiny, again)
    assert again.result().tokens == alone.tokens


def decode_alone(decoder, params, request):
    return batch.generate(decoder, params, [request.prompt], [request.asked])[0]


def test_trouble_of_one_request_is_its_own(tiny):
    server = make(*tiny)
    with pytest.raises(errors.UsageError, match='names token 999, not below the vocabulary'):
        server.submit([1], asked(max_new_tokens=3, logit_bias={999: 1.0}))

    def fail(piece, tokens):
        raise ConnectionError('the reader has gone')

    bad = server.submit([1, 2], asked(max_new_tokens=30), on_text=fail)
    good = server.submit([3], asked(max_new_tokens=9))
    server.run()
    with pytest.raises(ConnectionError, match='has gone'):
        bad.result()
    assert len(bad.text.tokens) < 30
    assert good.result().tokens == decode_alone(*tiny, good).tokens


@pytest.mark.parametrize('kind', ['', 'lstm'])
def test_other_weights_read_no_keys_and_values_of_the_old_ones(kind, tiny):
    """As PPO does: after every update the engine goes on with new weights."""
    decoder, params = helpers.baseline_decoder(kind) if kind else tiny
    other = helpers.params_of(decoder.model, seed=5)
    server = make(decoder, params)
    prompt, options = list(range(30)), asked(max_new_tokens=8, logprobs=0)
    server.submit(prompt, options)
    waiting = server.submit(prompt, options)
    with pytest.raises(errors.InputError, match='only when it is done'):
        server.load(other)
    server.run()
    server.load(other)
    request = server.submit(prompt, options)
    server.run()
    alone = batch.generate(decoder, other, [prompt], [options])[0]
    assert request.reused == 0
    assert request.result().tokens == alone.tokens
    np.testing.assert_allclose(request.result().logprobs, alone.logprobs, atol=1e-5)
    assert waiting.result().logprobs != request.result().logprobs
