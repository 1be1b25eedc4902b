# SPDX-License-Identifier: Apache-2.0
"""The Python call as tutorials print it, and as the command line has it; defaults beside theirs."""

import json
import shutil

import pytest

from gptjax import generate
from gptjax.configs import base, errors
from gptjax.models import pretrained, sources
from gptjax.sampling import loaded
from gptjax.sampling.pipeline import pipeline
from tests import helpers
from tests.special_test import subwords

transformers = pytest.importorskip('transformers')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp('pipeline') / 'weights'
    tokenizer = subwords()
    model = helpers.tiny_model(n_vocab=tokenizer.n_vocab, n_ctx=64)
    pretrained.save(path, model, helpers.params_of(model), tokenizer)
    return path


@pytest.fixture
def own(folder, tmp_path):
    """content of generation_config.json -> a folder with it."""

    def made(content):
        path = tmp_path / 'own'
        shutil.copytree(folder, path, dirs_exist_ok=True)
        (path / 'generation_config.json').write_text(json.dumps(content))
        (path / 'SHA256SUMS').unlink(missing_ok=True)  # as its message says: changed by hand
        return path

    return made


def test_the_call_that_tutorials_print(folder):
    generator = pipeline(task='text-generation', model=folder)
    found = generator(
        text_inputs='hello user',
        max_length=30,
        num_return_sequences=3,
        pad_token_id=generator.tokenizer.eos_token_id,
    )
    assert [list(one) for one in found] == [['generated_text']] * 3
    assert len({one['generated_text'] for one in found}) == 3
    assert all(one['generated_text'].startswith('hello user') for one in found)
    tokenizer = generator.tokenizer
    ids = tokenizer.encode('hello<|im_end|> user')
    assert tokenizer.decode(ids) == 'hello<|im_end|> user'
    assert tokenizer.batch_decode([ids, ids[:1]], skip_special_tokens=True)[0] == 'hello user'
    assert tokenizer('hello')['input_ids'] == tokenizer.encode('hello')
    assert (tokenizer.eos_token, tokenizer.pad_token) == ('<|endoftext|>', None)
    with pytest.raises(AttributeError, match="no 'vocab_files'"):
        _ = tokenizer.vocab_files


_SAMPLING = ('do_sample', 'temperature', 'top_k', 'top_p')
GIVEN = [
    {},
    {'do_sample': False},
    {'max_new_tokens': 9},
    {'temperature': 0.1},
    {'do_sample': True, 'top_k': 0},
]


@pytest.mark.parametrize(
    'content',
    [
        {},
        {'do_sample': False},
        {'do_sample': True, 'temperature': 0.3},
        {'temperature': 1.5},
        {'top_k': 3, 'top_p': 0.5, 'max_new_tokens': 7},
        {'max_length': 20},
        {'max_length': 20, 'max_new_tokens': 5},
        {'repetition_penalty': 1.5, 'num_beams': 2},
    ],
)
def test_defaults_are_those_of_their_pipeline(own, content):
    path = own(content)
    theirs = transformers.pipeline('text-generation', model=str(path))
    published = loaded.published(sources.open(path))
    for given in GIVEN:
        wanted, _ = theirs.model._prepare_generation_config(
            None, **theirs._prepare_generate_kwargs(given)
        )
        found = loaded.resolve(str(path), published, given)
        assert found.do_sample is wanted.do_sample
        for name in ('repetition_penalty', 'num_beams', 'num_return_sequences'):
            assert getattr(found, name) == getattr(wanted, name), (given, name)
        for name in _SAMPLING if wanted.do_sample else ():
            assert getattr(found, name) == getattr(wanted, name), (given, name)
        length = wanted.max_new_tokens or wanted.max_length - 4
        assert found.limit(4) - 4 == length, given


SETTINGS = [
    ({}, {}),
    ({'repetition_penalty': 1.7, 'do_sample': False}, {}),
    ({'temperature': 2.0, 'top_k': 0, 'eos_token_id': [3, 5]}, {'max_new_tokens': 12}),
    ({'max_length': 15}, {'seed': 4}),
    ({'suppress_tokens': [70, 71]}, {'num_beams': 3, 'do_sample': False, 'max_new_tokens': 8}),
    ({'max_new_tokens': 5}, {'num_return_sequences': 2, 'temperature': 3.0}),
    ({'do_sample': False, 'no_repeat_ngram_size': 2}, {'do_sample': True, 'temperature': 0.7}),
    ({'do_sample': True}, {'do_sample': False}),
]


_QUICK = (0, 4)  # each compiles programs of both ways: the rest is in make test-all


@pytest.mark.parametrize(
    'number',
    [pytest.param(i, marks=() if i in _QUICK else pytest.mark.slow) for i in range(len(SETTINGS))],
)
def test_the_command_line_gives_the_same_texts(own, tmp_path, number):
    content, given = SETTINGS[number]
    path = own({'eos_token_id': [301], **content})
    prompts = ['hello user', 'the assistant', '<|im_end|> said']
    expected = pipeline('text-generation', model=path)(prompts, return_full_text=False, **given)
    flags = [f'--config.decode.{name}={value}' for name, value in given.items()]
    flags += [f'--prompt={prompt}' for prompt in prompts]
    args = helpers.args(
        base.__file__,
        tmp_path / 'run',
        f'--config.init_from={path}',
        *flags,
        define=generate.define,
    )
    generate.main(args)
    lines = (tmp_path / 'run' / 'samples.jsonl').read_text().splitlines()
    wanted = [one['generated_text'] for several in expected for one in several]
    assert [json.loads(line)['text'] for line in lines] == wanted


def test_a_length_that_nobody_asked_for_fits(folder, own):
    generator = pipeline('text-generation', model=folder)
    ids, asked = generator._loaded.job([7] * 50, {})
    assert asked.limit(len(ids)) == 64
    for given in ({'max_new_tokens': 15}, {'max_length': 65}):
        with pytest.raises(errors.InputError, match='do not fit n_ctx = 64'):
            generator([7] * 50, **given)
    with pytest.raises(errors.InputError, match='do not fit n_ctx = 64'):
        generator([7] * 64)
    for content in ({'max_new_tokens': 15}, {'max_length': 90}):
        published = pipeline('text-generation', model=own({'eos_token_id': [], **content}))
        ids, asked = published._loaded.job([7] * 50, {})
        assert asked.limit(len(ids)) == 64
    ids, asked = generator._loaded.job([7] * 50, {'prompt_lookup_num_tokens': 3})
    assert asked.limit(len(ids)) == 61
    drafted = pipeline('text-generation', model=folder, draft=folder)
    (one,) = drafted([7] * 50, return_tensors=True, eos_token_id=-1)
    assert len(one['generated_token_ids']) == 60  # the draft proposes four at a time
    ids, asked = generator._loaded.job([7] * 50, {'beyond_context': 'slide'})
    assert asked.limit(len(ids)) == 50 + 256


@pytest.mark.parametrize(
    ('content', 'said'),
    [
        ({'temperature': 'hot'}, "temperature is a number, got 'hot'"),
        ({'eos_token_id': '2'}, 'eos_token_id is a token id'),
        ({'eos_token_id': [None]}, 'eos_token_id is a token id'),
        ({'eos_token_id': 10**30}, 'eos_token_id is a token id'),
        ({'top_p': 0}, 'top_p must be in'),
        ({'suppress_tokens': 'x'}, 'suppress_tokens is a token id'),
    ],
)
def test_what_is_published_and_cannot_be_names_its_file(own, content, said):
    path = own(content)
    published = loaded.published(sources.open(path))
    for given in ({}, {'top_k': 3}):
        with pytest.raises(errors.InputError, match=f'own, generation_config.json: {said}'):
            loaded.resolve(str(path), published, given)
    (name,) = content
    right = {'temperature': 1.0, 'eos_token_id': 2, 'top_p': 0.5, 'suppress_tokens': [2]}[name]
    loaded.resolve(str(path), published, {name: right})  # what is given goes before it


def test_what_is_not_built_is_said_by_name(own, caplog):
    asked = {'penalty_alpha': 0.6, 'dola_layers': 'low', 'top_k': 4, 'use_cache': True}
    idle = {'transformers_version': '5', 'output_scores': True, 'constraints': None}
    pipeline('text-generation', model=own(asked | idle))
    (record,) = [r for r in caplog.records if 'not built' in r.getMessage()]
    assert record.getMessage().endswith("left out: penalty_alpha = 0.6, dola_layers = 'low'")
