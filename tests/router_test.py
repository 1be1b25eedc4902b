# SPDX-License-Identifier: Apache-2.0
"""One place decides how a request is decoded; every door gives the same texts."""

import dataclasses

import pytest

from gptjax.configs import base, errors, fields
from gptjax.runtime import program
from gptjax.sampling import batch, beam, decode, engine, loaded, router, speculative
from tests import helpers

asked = helpers.asked
CONFIG = fields.build(engine.Config, base.get_config().engine, 'engine')


@pytest.fixture(scope='module')
def ready():
    model = helpers.tiny_model(n_ctx=64)
    return loaded.Loaded(decode.Decoder(model, 64), helpers.params_of(model), None, {})


def test_ways(ready):
    draft = speculative.Draft(ready.decoder, ready.params)
    plain, drafted = router.Router(ready), router.Router(ready, draft, 3)
    for options, way in (
        (asked(), 'plain'),
        (asked(num_beams=2), 'beams'),
        (asked(prompt_lookup_num_tokens=2), 'lookup'),
    ):
        assert plain.way(options) == way
        assert plain.by_itself(options) == (way != 'plain')
    assert plain.by_itself(asked(echo=True))
    assert drafted.way(asked()) == 'draft'
    with pytest.raises(errors.UsageError, match='a draft is for decoding without beams'):
        drafted.way(asked(num_beams=2))
    with pytest.raises(errors.UsageError, match='a stream is for text'):
        drafted.check([1], asked(max_new_tokens=3), streamed=True)


def test_all_kinds_side_by_side_come_in_order(ready):
    jobs = [
        ([1, 2, 3], asked(max_new_tokens=5)),
        ([4, 5], asked(max_new_tokens=9, num_beams=3)),
        ([6], asked(max_new_tokens=3, do_sample=True, seed=7, num_return_sequences=3)),
        ([7, 8, 9], asked(max_new_tokens=4, echo=True, logprobs=0)),
        ([1, 2, 1, 2], asked(max_new_tokens=8, prompt_lookup_num_tokens=2)),
        *(([i, i + 1], asked(max_new_tokens=i % 7 + 1)) for i in range(20)),
    ]
    sender = router.Router(ready)
    found = list(sender.each(jobs, dataclasses.replace(CONFIG, slots=2)))
    assert len(found) == len(jobs)
    arguments = (ready.decoder, ready.params)
    for (prompt, options), texts in zip(jobs, found, strict=True):
        n = options.num_return_sequences
        if options.num_beams > 1:
            (wanted,) = beam.search(*arguments, [prompt], [options])
        else:
            wanted = batch.generate(*arguments, [prompt] * n, [options] * n, range(n))
        assert [t.tokens for t in texts] == [t.tokens for t in wanted]
    assert found[3][0].prompt_logprobs


class _Stream:
    def __init__(self):
        self.said = []

    def begin(self):
        self.said.append('begin')

    def text(self, piece, tokens):
        self.said += tokens

    def end(self):
        self.said.append('end')


def test_a_stream_tells_the_same(ready):
    options = [asked(max_new_tokens=3, num_return_sequences=n, do_sample=True) for n in (1, 2)]
    jobs = [([i, 2], one) for i, one in enumerate(options, 1)]
    stream = _Stream()
    found = list(router.Router(ready).streamed(jobs, CONFIG, stream))
    flat = [text.tokens for texts in found for text in texts]
    assert stream.said == [x for tokens in flat for x in ('begin', *tokens, 'end')]


def test_a_stopped_stream_ends_no_text(ready, monkeypatch):
    """SIGTERM in the middle of a text: nothing that says it were whole is printed."""
    stream = _Stream()
    monkeypatch.setattr(program, 'stop_requested', lambda: len(stream.said) > 3)
    config = dataclasses.replace(CONFIG, steps=1)
    jobs = [([1, 2], asked(max_new_tokens=30))]
    with pytest.raises(program.Preempted):
        list(router.Router(ready).streamed(jobs, config, stream))
    assert stream.said[0] == 'begin'
    assert 'end' not in stream.said


def test_draws_are_those_of_the_place_whoever_is_decoded_with_it(ready):
    options = asked(max_new_tokens=6, do_sample=True, top_k=0, seed=3)
    prompts = [[i + 1, 5] for i in range(6)]
    sender = router.Router(ready)
    whole = sender.texts(prompts, options, range(6))
    for some in ((0,), (4, 1), (5, 3, 2)):
        found = sender.texts([prompts[i] for i in some], options, some)
        assert [t[0].tokens for t in found] == [whole[i][0].tokens for i in some]
