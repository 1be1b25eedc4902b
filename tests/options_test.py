# SPDX-License-Identifier: Apache-2.0
"""What a request may ask for: mistakes in one line, in the words of who made them."""

import warnings

import numpy as np
import pytest

from gptjax.configs import errors
from gptjax.sampling import decode
from tests import helpers

asked = helpers.asked

MISTAKES = [  # (options, what is said)
    ({'max_new_tokens': '5'}, "^max_new_tokens is a whole number, got '5'$"),
    ({'max_tokens': '5'}, "^max_tokens is a whole number, got '5'$"),
    ({'max_new_tokens': 2.5}, 'max_new_tokens is a whole number, got 2.5'),
    ({'top_k': True}, 'top_k is a whole number, got True'),
    ({'eos_token_id': 10**30}, 'eos_token_id is a token id or a list of them, got 1000'),
    ({'suppress_tokens': [2**31]}, 'suppress_tokens is a token id or a list of them, got'),
    ({'temperature': '0.5'}, "temperature is a number, got '0.5'"),
    ({'temperature': [1]}, r'temperature is a number, got \[1\]'),
    ({'renormalize_logits': 1}, 'renormalize_logits is True or False, got 1'),
    ({'bad_words_ids': 'no'}, "bad_words_ids is a list of lists of token ids, got 'no'"),
    ({'bad_words_ids': [[]]}, 'bad_words_ids is of token ids from 0 on, at least one'),
    ({'sequence_bias': 3}, 'sequence_bias is a dict'),
    ({'sequence_bias': {(): 1.0}}, 'sequence_bias is of token ids from 0 on, at least one'),
    ({'logit_bias': {'x': 1}}, 'logit_bias is a dict'),
    ({'stop': 5}, 'stop is a string or a list of them, got 5'),
    ({'eos_token_id': 'x'}, "eos_token_id is a token id or a list of them, got 'x'"),
    ({'top_p': 0.0}, r'top_p must be in \(0, 1\], got 0.0; .*do_sample=False'),
    ({'epsilon_cutoff': 1.0}, r'epsilon_cutoff must be in \[0, 1\), got 1.0'),
    ({'top_h': 1.5}, 'top_h must be from 0.0 to 1.0'),
    ({'suppress_tokens': [4, -2]}, r'suppress_tokens is of token ids from 0 on.*got \[4, -2\]'),
    ({'forced_bos_token_id': -2}, 'forced_bos_token_id is of token ids from 0 on'),
    ({'forced_eos_token_id': 1.5}, 'forced_eos_token_id is a token id or a list of them, got 1.5'),
    ({'forced_eos_token_id': [3, 4], 'suppress_tokens': [4, 3]}, r'holds all of \[3, 4\]'),
    ({'forced_bos_token_id': 3, 'suppress_tokens': 3}, r'holds all of \[3\]'),
    ({'exponential_decay_length_penalty': 5}, r'is a pair \(start, factor\), got 5'),
    ({'exponential_decay_length_penalty': (5,)}, r'factor above 0\), got \(5.0,\)'),
    ({'exponential_decay_length_penalty': (0.5, 2)}, 'whole number of tokens'),
    ({'exponential_decay_length_penalty': (5, 0)}, 'factor above 0'),
    ({'encoder_repetition_penalty': 0}, 'encoder_repetition_penalty must be above 0'),
    ({'guidance_scale': -1}, 'guidance_scale must be from 0.0'),
    *(
        ({'guidance_scale': 2.0, **other}, 'guidance_scale goes with num_beams = 1')
        for other in (
            {'num_beams': 2},
            {'echo': True},
            {'prompt_lookup_num_tokens': 2},
            {'beyond_context': 'slide'},
        )
    ),
    ({'streamer': object()}, r'streamer is no generation option here: .*--stream.*on_text'),
    ({'penalty_alpha': 0.6}, "penalty_alpha .*transformers' and not built"),
]


@pytest.mark.parametrize(('given', 'said'), MISTAKES)
def test_mistakes_are_one_line(given, said):
    with pytest.raises(errors.UsageError, match=said) as raised:
        asked(**given)
    assert '\n' not in str(raised.value)


def test_ids_outside_the_vocabulary_name_their_option():
    decoder = decode.Decoder(helpers.tiny_model(), 64)
    for name, value in {
        'bad_words_ids': [[1], [2, 64]],
        'suppress_tokens': [64],
        'begin_suppress_tokens': [1, 64],
        'forced_bos_token_id': 64,
        'forced_eos_token_id': 64,
    }.items():
        with pytest.raises(errors.UsageError, match=f'{name} names token 64, not below'):
            decode.check(decoder, [1], asked(max_new_tokens=1, **{name: value}))


def test_what_has_no_effect_is_said_once():
    with pytest.warns(UserWarning, match='^top_k, top_p: no effect without do_sample') as said:
        asked(top_p=0.9, top_k=5)
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        asked(temperature=0.0, top_p=1.0)  # as callers of OpenAI's API say it
        asked(temperature=0.7, do_sample=True)
        asked(temperature=None, top_k=None)


def test_numbers_of_numpy_are_numbers():
    found = asked(max_new_tokens=np.int64(5), guidance_scale=np.float32(1.5), suppress_tokens=7)
    assert (found.max_new_tokens, found.guidance_scale, found.suppress_tokens) == (5, 1.5, (7,))
