# SPDX-License-Identifier: Apache-2.0
"""Weights that are damaged, wrong or hostile: one clear line, never a traceback or a crash."""

import json
import pickle
import zipfile

import gguf as gguf_lib
import jax
import numpy as np
import pytest

from gptjax.configs import errors, sizes
from gptjax.models import heads, pretrained, sources
from gptjax.runtime import mesh as mesh_lib
from tests import helpers


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A small GPT-2 in Hugging Face's layout."""
    return helpers.published(tmp_path_factory.mktemp('gpt2') / 'out')


def copy(folder, target, **changes):
    """A copy of a folder, with config.json changed."""
    config = json.loads((folder / 'config.json').read_text()) | changes
    (target / 'config.json').write_text(json.dumps(config))
    (target / 'model.safetensors').write_bytes((folder / 'model.safetensors').read_bytes())
    return target


@pytest.mark.parametrize(
    'change',
    [
        {'n_layer': '2'},
        {'n_layer': 2.0},
        {'n_layer': None},
        {'n_embd': '64'},
        {'n_head': 0},
        {'attn_pdrop': None},
        {'model_type': ['gpt2']},
        {'activation_function': ['gelu']},
        {'tie_word_embeddings': 'false'},
        {'vocab_size': True},
    ],
)
def test_a_config_of_wrong_types(folder, tmp_path, change):
    with pytest.raises(errors.InputError):
        pretrained.load(copy(folder, tmp_path, **change))


@pytest.mark.parametrize('text', ['', '5', 'null', '{', '["model_type"]'])
def test_a_config_that_is_none(folder, tmp_path, text):
    copy(folder, tmp_path)
    (tmp_path / 'config.json').write_text(text)
    with pytest.raises(errors.InputError, match=r'config\.json'):
        pretrained.load(tmp_path)


def test_a_byte_order_mark_is_read_over(folder, tmp_path):
    copy(folder, tmp_path)
    text = (tmp_path / 'config.json').read_text()
    (tmp_path / 'config.json').write_text(text, encoding='utf-8-sig')
    assert pretrained.load(tmp_path).model.config.n_layers == 2


@pytest.mark.parametrize('text', ['', '{}', '[]', '{"weight_map": {"a": "missing.safetensors"}}'])
def test_an_index_that_leads_nowhere(folder, tmp_path, text):
    copy(folder, tmp_path)
    (tmp_path / 'model.safetensors').unlink()
    (tmp_path / 'model.safetensors.index.json').write_text(text)
    with pytest.raises(errors.InputError, match='fetch it'):
        pretrained.load(tmp_path)


@pytest.mark.parametrize('keep', [0, 5, 100, 3000])
def test_a_file_cut_short(folder, tmp_path, keep):
    copy(folder, tmp_path)
    path = tmp_path / 'model.safetensors'
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(errors.InputError, match='fetch it again'):
        pretrained.load(tmp_path)
    path.unlink()
    with pytest.raises(errors.InputError, match='holds neither'):
        pretrained.load(tmp_path)
    with pytest.raises(errors.InputError, match='does not exist'):
        pretrained.load(tmp_path / 'typo')


def _pickled(size):
    """A state dict of one float tensor of so many elements, as torch writes it."""
    return (
        b'\x80\x02}X\x01\x00\x00\x00xctorch._utils\n_rebuild_tensor_v2\n('
        b'(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu'
        + b'J'
        + size.to_bytes(4, 'little')
        + b'tQK\x00'
        + b'J'
        + size.to_bytes(4, 'little')
        + b'\x85K\x01\x85\x89}tRs.'
    )


def test_a_storage_that_claims_more_than_there_is(folder, tmp_path):
    copy(folder, tmp_path)
    (tmp_path / 'model.safetensors').unlink()
    path = tmp_path / 'pytorch_model.bin'
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('m/data.pkl', _pickled(1 << 20))
        archive.writestr('m/data/0', b'\0' * 64)
    with pytest.raises(errors.InputError, match='reaches beyond its storage'):
        pretrained.load(tmp_path)
    whole = path.read_bytes()  # the directory lies about the size
    path.write_bytes(whole.replace((64).to_bytes(4, 'little'), (1 << 22).to_bytes(4, 'little')))
    with pytest.raises(errors.InputError):
        pretrained.load(tmp_path)
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('m/other', b'')
    with pytest.raises(errors.InputError, match='cannot read'):
        pretrained.load(tmp_path)


def test_a_pickle_cannot_change_what_it_is_given(folder, tmp_path):
    copy(folder, tmp_path)
    (tmp_path / 'model.safetensors').unlink()
    # BUILD on a storage class: sets attributes of whatever find_class returned.
    stored = b'\x80\x02ctorch\nBFloat16Storage\n}X\x01\x00\x00\x00aK\x01sb.'
    with zipfile.ZipFile(tmp_path / 'pytorch_model.bin', 'w') as archive:
        archive.writestr('m/data.pkl', stored)
    with pytest.raises(errors.InputError):
        pretrained.load(tmp_path)
    assert pickle.loads(pickle.dumps(np.dtype(np.float32))) == np.float32


def write_gguf(path, **fields):
    """A tiny Llama; fields are those of llama.*."""
    writer = gguf_lib.GGUFWriter(path, 'llama')
    known = {
        'block_count': 1,
        'context_length': 8,
        'embedding_length': 8,
        'feed_forward_length': 16,
        'attention.head_count': 2,
    } | fields
    for name, value in known.items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f'llama.{name}', value)
    writer.add_float32('llama.attention.layer_norm_rms_epsilon', 1e-5)
    shapes = {
        'token_embd': (12, 8),
        'output_norm': (8,),
        'blk.0.attn_norm': (8,),
        'blk.0.ffn_norm': (8,),
        'blk.0.ffn_gate': (16, 8),
        'blk.0.ffn_up': (16, 8),
        'blk.0.ffn_down': (8, 16),
    }
    shapes |= {f'blk.0.attn_{name}': (8, 8) for name in ('q', 'k', 'v', 'output')}
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(f'{name}.weight', rng.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_fields_that_change_the_computation_are_refused(tmp_path):
    model, params, tokenizer = pretrained.load(write_gguf(tmp_path / 'plain.gguf'))
    assert tokenizer is None
    assert sources.open(tmp_path / 'plain.gguf').provenance == 'plain.gguf, quantised as F32'
    assert np.isfinite(model.apply({'params': params}, np.zeros((1, 4), np.int32))).all()
    for fields, said in (
        ({'rope.scaling.factor': 4.0}, r'rope\.scaling\.factor'),
        ({'rope.scale_linear': 4.0}, r'rope\.scale_linear'),
        ({'rope.dimension_count': 2}, 'a part of each head'),
        ({'expert_count': 4}, r'llama\.expert_count'),
    ):
        with pytest.raises(errors.InputError, match=said):
            pretrained.load(write_gguf(tmp_path / f'{said[:4]}{len(said)}.gguf', **fields))
    whole = (tmp_path / 'plain.gguf').read_bytes()
    for keep in (0, 3, 50, len(whole) // 2):
        (tmp_path / f'cut{keep}.gguf').write_bytes(whole[:keep])
        with pytest.raises(errors.InputError, match='cannot read'):
            pretrained.load(tmp_path / f'cut{keep}.gguf')


def test_replicas_share_what_was_read(folder):
    mesh = mesh_lib.Mesh(
        mesh_lib.Config(data=4, fsdp=2, tensor=1, context=1, slices=1, across='data')
    )
    with mesh.scope():
        found = pretrained.load(folder, shardings=mesh.shardings).params
    jax.tree.map(np.testing.assert_array_equal, found, pretrained.load(folder).params)


def test_a_model_section_says_what_is_unknown_or_missing():
    section = sizes.rnn('gru').to_dict()
    with pytest.raises(errors.UsageError, match="has the unknown field 'n_heads'"):
        heads.configure(section | {'n_heads': 2})
    with pytest.raises(errors.UsageError, match="lacks 'bptt_tokens'"):
        heads.configure({k: v for k, v in section.items() if k != 'bptt_tokens'})
    with pytest.raises(errors.UsageError, match='is not one of: gpt, ngram, rnn'):
        heads.configure(section | {'family': 'attention'})


def test_where_the_context_does_not_shape_a_weight_it_may_differ():
    rotary = heads.configure(sizes.model('smollm2-135m'))
    assert heads.differing(rotary, heads.configure(sizes.model('smollm2-135m', n_ctx=1024))) == []
    learned = heads.configure(sizes.model('tiny'))
    assert heads.differing(learned, heads.configure(sizes.model('tiny', n_ctx=32))) == ['n_ctx']
    same = heads.configure(sizes.model('tiny', n_kv_heads=2))
    assert heads.differing(learned, same) == []
