# SPDX-License-Identifier: Apache-2.0
"""Hostile and absurd files end in one line, soon, and with little more memory than true ones."""

import json
import pathlib
import random

import numpy as np
import pytest
import tokenizers
from safetensors import numpy as safetensors_numpy
from tokenizers import decoders, models, pre_tokenizers

from gptjax import evaluate, forgetting, generate
from gptjax.configs import base, errors
from gptjax.models import pretrained
from gptjax.models.published import tensors
from gptjax.text import chat, described
from gptjax.text import tokenizer as tokenizer_lib
from tests import damaged_test, helpers, hostile

# (seeds of the ordinary run, of the whole series)
FEW, MANY = 60, 1000


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A small GPT-2 in Hugging Face's layout."""
    return helpers.published(tmp_path_factory.mktemp('gpt2') / 'out')


def weights_in(path, folder, name, content):
    """A folder whose weights are this file, beside a true config.json."""
    path.mkdir()
    (path / 'config.json').write_bytes((folder / 'config.json').read_bytes())
    (path / name).write_bytes(content)
    return path


def vocabulary():
    """A tokenizer.json as an object: bytes, and nothing merged."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return json.loads(backend.to_str())


def refused(paths):
    """Reads paths, all of which are to be refused in a line that names them."""
    for path, said in zip(paths, hostile.read(paths), strict=True):
        assert said.startswith(('InputError: ', 'UsageError: ')), (path, said)
        assert str(path) in said, (path, said)
        assert len(said) < 1000, (path, said)


def test_gguf_headers_that_claim_what_cannot_be(tmp_path):
    paths = []
    for name, content in hostile.ggufs().items():
        paths.append(tmp_path / f'{name}.gguf')
        paths[-1].write_bytes(content)
    refused(paths)


def test_safetensors_that_claim_what_cannot_be(folder, tmp_path):
    found = hostile.safetensors_files().items()
    refused([weights_in(tmp_path / n, folder, 'model.safetensors', file) for n, file in found])


def test_pickles_that_do_harm(folder, tmp_path):
    found = hostile.pickles().items()
    refused([weights_in(tmp_path / n, folder, 'pytorch_model.bin', file) for n, file in found])


def test_the_pickles_of_this_file_are_read_where_they_are_right(folder, tmp_path):
    path = weights_in(tmp_path / 'x', folder, 'pytorch_model.bin', hostile.zipped(hostile.tensor()))
    (found,) = tensors.find(path).values()
    np.testing.assert_array_equal(found.read(), np.zeros(4, np.float32))


@pytest.mark.parametrize('name', ['../model.safetensors', '/etc/passwd', '', '.', 'a/b', 3, None])
def test_an_index_names_files_of_its_folder_alone(folder, tmp_path, name):
    index = json.dumps({'weight_map': {'x': name}}).encode()
    path = weights_in(tmp_path / 'x', folder, 'model.safetensors.index.json', index)
    with pytest.raises(errors.InputError, match='not in its folder'):
        pretrained.load(path)


def test_weights_may_be_a_link_as_the_cache_of_the_hub_makes_them(folder, tmp_path):
    (tmp_path / 'config.json').symlink_to(folder / 'config.json')
    (tmp_path / 'model.safetensors').symlink_to(folder / 'model.safetensors')
    assert pretrained.load(tmp_path).model.config.n_layers == 2


@pytest.mark.parametrize('wrong', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('dtype', [np.float16, np.float32, np.float64])
def test_weights_that_are_no_numbers_name_their_tensor(folder, tmp_path, wrong, dtype):
    stored = safetensors_numpy.load_file(folder / 'model.safetensors')
    stored = {name: x.astype(dtype) for name, x in stored.items()}
    stored['transformer.h.1.mlp.c_fc.weight'][3, 5] = wrong
    (tmp_path / 'config.json').write_bytes((folder / 'config.json').read_bytes())
    safetensors_numpy.save_file(stored, tmp_path / 'model.safetensors')
    said = 'NaN' if np.isnan(wrong) else 'infinite numbers'
    with pytest.raises(errors.InputError, match=rf'h\.1\.mlp\.c_fc\.weight: it holds {said}'):
        pretrained.load(tmp_path)


LARGE = (0, -1, 1.5, 10**9, 2**31, 2**63, 10**30, float('inf'), float('nan'), '2', [2], True)


def test_a_config_of_any_size_is_held_against_the_tensors(folder, tmp_path):
    said = json.loads((folder / 'config.json').read_text())
    paths, may_be = [], []
    for field in ('n_layer', 'n_embd', 'n_head', 'n_inner', 'n_positions', 'vocab_size'):
        for value in LARGE:
            path = tmp_path / f'{field} {value}'
            weights = (folder / 'model.safetensors').read_bytes()
            weights_in(path, folder, 'model.safetensors', weights)
            (path / 'config.json').write_text(json.dumps(said | {field: value}))
            (may_be if (field, value) == ('n_inner', 0) else paths).append(path)
    refused(paths)
    for value in (0, -1e-5, float('inf'), float('nan'), '1', 1e-320, 1e300):
        (may_be[0] / 'config.json').write_text(json.dumps(said | {'layer_norm_epsilon': value}))
        with pytest.raises(errors.InputError, match=r'config\.json'):
            pretrained.load(may_be[0])


@pytest.mark.parametrize(
    ('field', 'value'), [('block_count', 10**6), ('context_length', 2**32 - 1)]
)
def test_gguf_fields_are_held_against_the_tensors(tmp_path, field, value):
    refused([damaged_test.write_gguf(tmp_path / 'x.gguf', **{field: value})])


def mutations(folder, target, numbers):
    """Paths of mutated weights, a kind after the other."""
    true = damaged_test.write_gguf(target / 'true.gguf').read_bytes()
    tensors = (folder / 'model.safetensors').read_bytes()
    pickled = hostile.zipped(hostile.tensor())
    for seed in numbers:
        rng = random.Random(seed)
        path = target / f'{seed}.gguf'
        path.write_bytes(hostile.mutated(rng, true, 1600))
        yield path
        said = json.loads((folder / 'config.json').read_text())
        for name, content in (
            ('model.safetensors', hostile.mutated(rng, tensors, 3000)),
            ('pytorch_model.bin', hostile.mutated(rng, pickled, len(pickled))),
            ('model.safetensors', tensors),
        ):
            path = weights_in(target / f'{seed} {name} {rng.random()}', folder, name, content)
            if content is tensors:
                (path / 'config.json').write_text(json.dumps(hostile.altered(rng, said)))
            yield path


def test_mutated_weights_end_in_a_line_or_are_read(folder, tmp_path):
    for said in hostile.read([*mutations(folder, tmp_path, range(FEW))]):
        assert said == 'OK' or said.startswith(('InputError: ', 'UsageError: ')), said


@pytest.mark.slow
@pytest.mark.parametrize('part', range(10))
def test_many_mutated_weights_end_in_a_line_or_are_read(folder, tmp_path, part):
    for said in hostile.read([*mutations(folder, tmp_path, range(FEW + part, MANY, 10))]):
        assert said == 'OK' or said.startswith(('InputError: ', 'UsageError: ')), said


def tokenizer_in(path, said):
    """A folder with this tokenizer.json."""
    path.mkdir()
    (path / 'tokenizer.json').write_text(said if isinstance(said, str) else json.dumps(said))
    return path


def test_vocabularies_that_do_harm(tmp_path):
    true = vocabulary()
    found = {name: true | parts for name, parts in hostile.tokenizer_parts().items()}
    found |= {f'id {i}': json.loads(json.dumps(true)) for i in (2**24, 2**31, 2**32, -1, 0.5)}
    for name in found:
        if name.startswith('id '):
            found[name]['model']['vocab']['zz'] = json.loads(name.removeprefix('id '))
    found['long token'] = true | {'model': true['model'] | {'vocab': {'x' * 10**5: 0}}}
    found['deep'] = '[' * 10**6
    found['noise'] = '\x1b[2J\r\n{'
    refused([tokenizer_in(tmp_path / name, said) for name, said in found.items()])


@pytest.mark.slow
@pytest.mark.parametrize('part', range(4))
def test_mutated_vocabularies_end_in_a_line_or_are_read(tmp_path, part):
    true, paths = vocabulary(), []
    for seed in range(part, 200, 4):
        said = hostile.altered(random.Random(seed), true)
        paths.append(tokenizer_in(tmp_path / str(seed), said))
    for said in hostile.read(paths):
        assert said == 'OK' or said.startswith('InputError: '), said


@pytest.mark.parametrize('value', [1.5, '1', None, -1, True, 2**24, 2**31, 10**30, [1], 0])
@pytest.mark.parametrize('name', ['vocab.json', 'encoder.json'])
def test_ids_of_a_table_are_ids(tmp_path, name, value):
    (tmp_path / name).write_text(json.dumps({'a': 0, 'b': value}))
    (tmp_path / {'vocab.json': 'merges.txt', 'encoder.json': 'vocab.bpe'}[name]).write_text('#\n')
    with pytest.raises(errors.InputError, match=rf"{name} gives 'b' the id"):
        tokenizer_lib.load(tmp_path)


@pytest.mark.parametrize('content', ['[]', '3', '{', '', '[' * 10**5, 'null'])
def test_a_table_that_is_none(tmp_path, content):
    (tmp_path / 'vocab.json').write_text(content)
    (tmp_path / 'merges.txt').write_text('#\n')
    with pytest.raises(errors.InputError, match=r'vocab\.json is no JSON object'):
        tokenizer_lib.load(tmp_path)


def test_what_passed_and_what_is_ours_is_not_tried_again(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    tried = []
    real = tokenizer_lib.trial._try
    monkeypatch.setattr(
        tokenizer_lib.trial, '_try', lambda *which: (tried.append(which[0]), real(*which))
    )
    path = tokenizer_in(tmp_path / 'x', vocabulary())
    loaded = tokenizer_lib.load(path)
    tokenizer_lib.load(path)
    tokenizer_lib.save(loaded, tmp_path / 'ours')
    tokenizer_lib.load(tmp_path / 'ours')
    assert tried == ['json']


@pytest.mark.parametrize(
    ('template', 'said'),
    [
        ("{{ messages[0]['content'] }}", ''),
        ('{{ raise_exception("only tools") }}', ''),  # it may refuse these messages
        ("{{ 'a' * 10**10 }}", 'MemoryError'),
        ("{% set x = 'a' * 10**6 %}" + '{{ x ~ x ~ x }}' * 10**3, 'MemoryError'),
        pytest.param(
            '{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}',
            'it takes more than 10 s',
            marks=pytest.mark.slow,
        ),
    ],
)
def test_chat_templates_end_within_limits(tmp_path, monkeypatch, template, said):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    found = described.Described({'chat_template': template})
    messages = [{'role': 'user', 'content': 'hello'}]
    if not said and 'raise' not in template:
        assert chat.render(found, messages) == 'hello'
        return
    with pytest.raises(errors.InputError, match=said or 'only tools'):
        chat.render(found, messages)


def test_a_workdir_that_cannot_be_written_is_told_before_weights_are_read(folder):
    weights = f'--config.init_from={folder}'
    for module, *flags in (
        (evaluate, weights, "--config.suite.tasks=('arithmetic_2d_plus',)"),
        (evaluate, weights),
        (generate, weights, '--prompt=a'),
        (forgetting, f'--run={folder}'),
    ):
        define = getattr(module, 'define', lambda values: None)
        args = helpers.args(base.__file__, pathlib.Path('/proc/gptjax'), *flags, define=define)
        with pytest.raises(errors.InputError, match='/proc/gptjax cannot be written'):
            module.main(args)
