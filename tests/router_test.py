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
    draft = speculative.Draft(ready.decoder, ready.params, 3)
    plain, drafted = router.Router(ready), router.Router(ready, draft)
    assert not plain.by_itself(asked())
    assert drafted.by_itself(asked())
    for given in (
        {'num_beams': 2},
        {'prompt_lookup_num_tokens': 2},
        {'echo': True},
        {'guidance_scale': 2.0},
    ):
        assert plain.by_itself(asked(**given))
        plain.check([1], asked(max_new_tokens=3, **given), CONFIG, streamed=False)
        with pytest.raises(errors.UsageError, match='a stream is for text'):
            plain.check([1], asked(max_new_tokens=3, **given), CONFIG, streamed=True)


REFUSED = [  # (with a draft, max_tokens of a slot, options, what is said)
    (False, 0, {'max_new_tokens': 99}, 'do not fit n_ctx = 64'),
    (False, 8, {'max_new_tokens': 9}, 'exceed the 8 tokens of a slot'),
    (False, 0, {'stop_strings': ['x'], 'max_new_tokens': 3}, 'stop strings need a tokenizer'),
    (False, 0, {'stop_strings': ['x'], 'max_new_tokens': 3, 'echo': True}, 'need a tokenizer'),
    (False, 0, {'max_new_tokens': 60, 'prompt_lookup_num_tokens': 4}, '4 proposals do not fit'),
    (True, 0, {'max_new_tokens': 61}, '3 proposals do not fit n_ctx = 64'),
    (True, 0, {'max_new_tokens': 3, 'echo': True}, 'echo goes without speculative decoding'),
    (True, 0, {'max_new_tokens': 3, 'guidance_scale': 2.0}, 'guidance_scale goes without spec'),
    (False, 0, {'max_new_tokens': 3, 'suppress_tokens': 64}, 'suppress_tokens names token 64'),
    (True, 0, {'max_new_tokens': 3, 'num_beams': 2}, 'a draft is for decoding without beams'),
]


@pytest.mark.parametrize(('drafted', 'room', 'given', 'said'), REFUSED)
def test_what_would_fail_later_is_refused_before_the_first_text(ready, drafted, room, given, said):
    draft = speculative.Draft(ready.decoder, ready.params, 3) if drafted else None
    sender, config = router.Router(ready, draft), dataclasses.replace(CONFIG, max_tokens=room)
    with pytest.raises(errors.InputError, match=said):
        sender.check([1, 2], asked(**given), config, streamed=False)
    with pytest.raises(errors.InputError, match=said):
        list(sender.each([([1, 2], asked(**given))], config))


def test_many_copies_wait_within_bounds_and_a_signal_loses_no_text(ready, monkeypatch):
    """Texts that are made by themselves wait for their turn; a stop comes between any two."""
    jobs = [
        ([1], asked(max_new_tokens=2, do_sample=True, num_return_sequences=40)),
        ([2], asked(max_new_tokens=2, num_beams=2)),
        ([3], asked(max_new_tokens=2, do_sample=True, num_return_sequences=33)),
        ([4], asked(max_new_tokens=2, echo=True)),
        ([5], asked(max_new_tokens=2)),
    ]
    config, sender = dataclasses.replace(CONFIG, slots=2), router.Router(ready)
    whole = [[text.tokens for text in found] for found in sender.each(jobs, config)]
    assert [len(found) for found in whole] == [40, 1, 33, 1, 1]
    for stop in range(1, len(jobs)):
        texts = sender.each(jobs, config)
        came = [[text.tokens for text in next(texts)] for _ in range(stop)]
        monkeypatch.setattr(program, 'stop_requested', lambda: True)
        with pytest.raises(program.Preempted):
            next(texts)
        monkeypatch.undo()
        assert came == whole[:stop]


def test_all_kinds_side_by_side_come_in_order(ready):
    jobs = [
        ([1, 2, 3], asked(max_new_tokens=5)),
        ([4, 5], asked(max_new_tokens=9, num_beams=3)),
        ([6], asked(max_new_tokens=3, do_sample=True, seed=7, num_return_sequences=3)),
        ([7, 8, 9], asked(max_new_tokens=4, echo=True, logprobs=0)),
        ([1, 2, 1, 2], asked(max_new_tokens=8, prompt_lookup_num_tokens=2)),
        ([4, 5], asked(max_new_tokens=5, guidance_scale=2.0)),
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


def test_draws_are_those_of_the_seed_whoever_is_decoded_with_it(ready):
    jobs = [
        ([i + 1, 5], asked(max_new_tokens=6, do_sample=True, top_k=0, seed=3 + i)) for i in range(6)
    ]
    sender = router.Router(ready)
    whole = sender.texts(jobs)
    for some in ((0,), (4, 1), (5, 3, 2)):
        found = sender.texts([jobs[i] for i in some])
        assert [t[0].tokens for t in found] == [whole[i][0].tokens for i in some]
