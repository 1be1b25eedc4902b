# SPDX-License-Identifier: Apache-2.0
"""What is published beside tensors and vocabulary travels: folder, GGUF, workdir, run, folder."""

import contextlib
import json
import random

import numpy as np
import pytest

from gptjax import convert
from gptjax.configs import base, errors
from gptjax.models import pretrained, sources
from gptjax.models.published import beside
from gptjax.runtime import manifest
from gptjax.text import tokenizer as tokenizer_lib
from tests import helpers
from tests.described_test import TEMPLATES, folder_of

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

GENERATION = {
    'bos_token_id': 1,
    'eos_token_id': [2, 5],
    'do_sample': True,
    'temperature': 0.6,
    'penalty_alpha': 0.3,
    'max_new_tokens': 40,
}


def folder(seed, path):
    """A published folder with everything that people put there."""
    rng = folder_of(seed, path)
    size = tokenizer_lib.load(path).n_vocab
    kinds = {
        'gpt2': {'n_embd': 16, 'n_layer': 1, 'n_head': 2, 'n_positions': 32},
        'llama': {
            'hidden_size': 16,
            'intermediate_size': 24,
            'num_hidden_layers': 1,
            'num_attention_heads': 2,
            'max_position_embeddings': 32,
            'rope_parameters': {'rope_type': 'default', 'rope_theta': 500.0},
        },
    }
    kind = rng.choice([*kinds])
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(kind, vocab_size=size, **kinds[kind])
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 2, 4
    config.task_note = 'ours'
    model = transformers.AutoModelForCausalLM.from_config(config)
    if rng.random() < 0.8:
        model.generation_config = transformers.GenerationConfig(**GENERATION)
    model.save_pretrained(path)
    if rng.random() < 0.7:
        (path / 'chat_template.jinja').write_text(rng.choice([*TEMPLATES.values()]))
    if rng.random() < 0.5:
        (path / 'additional_chat_templates').mkdir()
        (path / 'additional_chat_templates' / 'tool.jinja').write_text('{{ messages }}')
    (path / 'LICENSE').write_text('as you like\n')
    (path / 'README.md').write_bytes('# 모델\r\n'.encode())
    (path / '.gitattributes').write_text('*.bin\n')
    return path


def converted(source, target, *flags):
    args = (f'--config.init_from={source}', *flags)
    convert.main(helpers.args(base.__file__, target, *args, define=convert.define))
    return target


def agree(path):
    """Nothing that a folder says contradicts another thing that it says."""
    config = json.loads((path / 'config.json').read_text())
    generation = json.loads((path / 'generation_config.json').read_text())
    for role in ('bos_token_id', 'eos_token_id', 'pad_token_id'):
        said = [x[role] for x in (config, generation) if x.get(role) is not None]
        firsts = {x[0] if isinstance(x, list) else x for x in said}
        assert len(firsts) <= 1, (role, said)
    assert ('dtype' in config) + ('torch_dtype' in config) == 1
    assert ('rope_parameters' in config) + ('rope_theta' in config) <= 1


@pytest.mark.parametrize('seed', range(8))
def test_there_and_back(seed, tmp_path):
    source = folder(seed, tmp_path)
    work = converted(source, tmp_path / 'work')
    again = converted(work, tmp_path / 'again')
    back = converted(again, tmp_path / 'back', '--to=huggingface', '--dtype=bfloat16')
    assert not (work / 'published' / '.gitattributes').exists()
    kept = beside.read(source)
    assert {'LICENSE', 'README.md', 'tokenizer_config.json'} <= kept.keys()
    for name, content in kept.items():
        if name != 'config.json':
            assert (back / name).read_bytes() == content, name
    agree(back)
    config = json.loads((back / 'config.json').read_text())
    assert (config['task_note'], config['torch_dtype']) == ('ours', 'bfloat16')
    theirs = [transformers.AutoTokenizer.from_pretrained(path) for path in (source, back)]
    for text in ('the cat<s> </s>', '<|im_end|> 한국어 <new>'):
        assert theirs[0](text)['input_ids'] == theirs[1](text)['input_ids']
    assert theirs[0].chat_template == theirs[1].chat_template
    models = [transformers.AutoModelForCausalLM.from_pretrained(path) for path in (source, back)]
    first, last = (model.generation_config.to_dict() for model in models)
    assert first == last
    ours = [pretrained.load(path).tokenizer for path in (source, work, again, back)]
    for found in ours[1:]:
        assert found.end_of_text == ours[0].end_of_text
        assert found.beginning == ours[0].beginning
        assert found.prefix == ours[0].prefix
        assert found.described.chat_template == ours[0].described.chat_template


def test_what_a_gguf_file_says_travels(tmp_path):
    file = gguf_file(tmp_path / 'a.gguf')
    work = converted(file, tmp_path / 'work')
    back = converted(work, tmp_path / 'back', '--to=huggingface')
    for path in (file, work, back):
        (_, _, tokenizer), source = pretrained.load(path), sources.open(path)
        said = beside.fields(source.beside, beside.GENERATION)
        assert said == {'bos_token_id': 0, 'eos_token_id': [1, 2, 3], 'pad_token_id': 4}
        assert (tokenizer.prefix, tokenizer.end_of_text) == ([0], 1)
        assert tokenizer.described.chat_template == {'default': 'plain', 'tool': 'tooled'}
    agree(back)
    metadata = json.loads((back / 'gguf_metadata.json').read_text())
    assert metadata['general.license'] == 'mit'
    theirs = transformers.AutoTokenizer.from_pretrained(back)
    assert theirs('hell')['input_ids'] == [0, *tokenizer.encode('hell')]
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 4)
    assert theirs.chat_template == {'default': 'plain', 'tool': 'tooled'}


@pytest.mark.parametrize(
    ('pre', 'add', 'prefix'),
    [
        ('gpt-2', None, []),
        ('gpt-2', True, [0]),
        ('llama-bpe', None, [0]),
        ('llama-bpe', False, []),
        ('smollm', False, []),
    ],
)
def test_a_gguf_file_says_what_goes_before_a_text(tmp_path, pre, add, prefix):
    """Where it does not, llama.cpp's default for the pre-tokenizer."""
    file = gguf_file(tmp_path / 'a.gguf', pre, add, ends=False)
    assert pretrained.load(file).tokenizer.prefix == prefix
    said = beside.fields(sources.open(file).beside, beside.GENERATION)
    assert said['eos_token_id'] == 1


def gguf_file(path, pre='gpt-2', add=True, ends=True):
    """A tiny Llama with a vocabulary of bytes; 0 begins a text, 1 ends it, 2 and 3 end a turn."""
    gguf = pytest.importorskip('gguf')
    from tokenizers import pre_tokenizers

    rng = np.random.default_rng(0)
    names = ['<|begin|>', '<|end|>', '<|eot|>', '<|eom|>', '<|pad|>']
    tokens = [*names, *sorted(pre_tokenizers.ByteLevel.alphabet()), 'he', 'll', 'hell']
    writer = gguf.GGUFWriter(path, 'llama')
    writer.add_license('mit')
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_block_count(1)
    writer.add_feed_forward_length(24)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model('gpt2')
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(names) + [1] * (len(tokens) - len(names)))
    writer.add_token_merges(['h e', 'l l', 'he ll'])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    if ends:
        writer.add_eot_token_id(2)
        writer.add_uint32('tokenizer.ggml.eom_token_id', 3)
        writer.add_pad_token_id(4)
        templates = [{'name': 'default', 'template': 'plain'}]
        writer.add_chat_template([*templates, {'name': 'tool', 'template': 'tooled'}])
    if add is not None:
        writer.add_add_bos_token(add)

    def put(name, *shape):
        writer.add_tensor(name, (rng.standard_normal(shape) * 0.3).astype(np.float32))

    put('token_embd.weight', len(tokens), 16)
    put('output.weight', len(tokens), 16)
    put('output_norm.weight', 16)
    shapes = {'attn_norm': (16,), 'ffn_norm': (16,), 'attn_q': (16, 16), 'attn_k': (8, 16)}
    shapes |= {'attn_v': (8, 16), 'attn_output': (16, 16), 'ffn_gate': (24, 16)}
    shapes |= {'ffn_up': (24, 16), 'ffn_down': (16, 24)}
    for name, shape in shapes.items():
        put(f'blk.0.{name}.weight', *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_an_earlier_workdir_keeps_the_ids_it_knew(tmp_path):
    """Before everything travelled, a checkpoint's meta held bos_token_id and eos_token_id."""
    source = folder(0, tmp_path)
    work = converted(source, tmp_path / 'work')
    for path in sorted((work / 'published').rglob('*'), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (meta,) = work.glob('checkpoints/*/meta.json')
    said = json.loads(meta.read_text()) | {'token_ids': {'bos_token_id': 1, 'eos_token_id': 2}}
    meta.write_text(json.dumps(said))
    (meta.parent / 'manifest.json').unlink()
    manifest.write(meta.parent)
    found = beside.fields(sources.open(work).beside, beside.GENERATION)
    assert found == {'bos_token_id': 1, 'eos_token_id': 2}


def test_large_files_and_folders_stay_behind_and_are_said(tmp_path):
    (tmp_path / 'notes.txt').write_bytes(b'x' * (2**20 + 1))
    (tmp_path / 'model.safetensors.index.json').write_text('{}')
    (tmp_path / 'tokenizer.json').write_text('{}')
    (tmp_path / 'original').mkdir()
    assert beside.read(tmp_path) == {}
    assert beside.left_behind(tmp_path) == ['notes.txt', 'original']
    assert beside.read(tmp_path / 'absent') == {}


def test_random_bytes_beside_weights_are_one_line_or_nothing(tmp_path):
    rng = random.Random(0)
    for _ in range(40):
        content = rng.randbytes(rng.randrange(20))
        with contextlib.suppress(errors.InputError):
            assert isinstance(beside.fields({'a.json': content}, 'a.json'), dict)


@pytest.mark.parametrize('form', ['workdir', 'huggingface'])
def test_what_steers_decoding_has_a_sum(tmp_path, form):
    (tmp_path / 'source').mkdir()
    source = folder(3, tmp_path / 'source')
    (source / 'generation_config.json').write_text(json.dumps({'temperature': 0.5}))
    work = converted(
        source, tmp_path / 'work', *(['--to=huggingface'] if form != 'workdir' else [])
    )
    named = work / 'published' if form == 'workdir' else work
    for name in beside.summed(beside.read(named)):
        content = (named / name).read_bytes()
        for place in random.Random(0).choices(range(len(content)), k=3):
            (named / name).write_bytes(content[:place] + b'9' + content[place + 1 :])
            if content[place : place + 1] != b'9':
                with pytest.raises(
                    errors.InputError, match=f'{name} (does not have the bytes|is no JSON)'
                ):
                    sources.open(work).beside  # noqa: B018
        (named / name).write_bytes(content)
    assert sources.open(work).beside
