# SPDX-License-Identifier: Apache-2.0
"""Published weights in and out, against transformers in torch: every family, both ways."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.configs import errors, sizes
from gptjax.models import gpt, heads, pretrained
from gptjax.models.published import families, stream, tensors
from gptjax.text import tokenizer as tokenizer_lib
from gptjax.text import vocabulary
from gptjax.training import losses
from tests import helpers

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

OPENAI = {'n_embd': 48, 'n_layer': 3, 'n_head': 4, 'n_positions': 24, 'vocab_size': 77}
LLAMA = {
    'hidden_size': 48,
    'num_hidden_layers': 3,
    'num_attention_heads': 4,
    'vocab_size': 77,
    'intermediate_size': 80,
    'max_position_embeddings': 24,
    'num_key_value_heads': 2,
}
LLAMA3 = {
    'rope_type': 'llama3',
    'rope_theta': 1e4,
    'factor': 8.0,
    'low_freq_factor': 1.0,
    'high_freq_factor': 4.0,
    'original_max_position_embeddings': 16,
}
# name -> (model_type, config fields)
CASES = {
    'gpt2': ('gpt2', OPENAI),
    'gpt2-narrow': ('gpt2', OPENAI | {'n_inner': 40, 'activation_function': 'relu', 'n_layer': 1}),
    'gpt2-untied': ('gpt2', OPENAI | {'tie_word_embeddings': False, 'layer_norm_epsilon': 1e-3}),
    'openai-gpt': ('openai-gpt', OPENAI),
    'gptj': ('gptj', OPENAI | {'rotary_dim': 4}),
    'gptj-whole': ('gptj', OPENAI | {'rotary_dim': 12, 'activation_function': 'gelu'}),
    'llama': ('llama', LLAMA),
    'llama-tied': ('llama', LLAMA | {'tie_word_embeddings': True, 'num_key_value_heads': 1}),
    'llama-biased': (
        'llama',
        LLAMA | {'attention_bias': True, 'mlp_bias': True, 'head_dim': 16},
    ),
    'llama-scaled': ('llama', LLAMA | {'rope_parameters': LLAMA3}),
}
PAD = 3


def peer_of(name: str, seed: int = 0):
    """A transformers model with every parameter random, biases and gains too."""
    kind, fields = CASES[name]
    config = transformers.AutoConfig.for_model(kind, **fields)
    torch.manual_seed(seed)
    peer = transformers.AutoModelForCausalLM.from_config(config, attn_implementation='eager')
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return peer.eval()


def tokens_of(rows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 77, (rows, length)).astype(np.int32)


def their_logits(peer, tokens, positions=None):
    inputs = {'input_ids': torch.tensor(tokens, dtype=torch.long)}
    if positions is not None:
        inputs['attention_mask'] = torch.tensor(positions >= 0, dtype=torch.long)
        inputs['position_ids'] = torch.tensor(np.maximum(positions, 0), dtype=torch.long)
    with torch.no_grad():
        return peer(**inputs).logits.numpy()


@pytest.fixture(scope='module')
def published(tmp_path_factory):
    """name -> (transformers model, its folder, ours loaded from it), each made once."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            peer = peer_of(name)
            peer.save_pretrained(folder)
            made[name] = (peer, folder, pretrained.load(folder))
        return made[name]

    return get


@pytest.mark.parametrize('name', CASES)
def test_logits_are_those_of_transformers(published, name):
    peer, _, (model, params, tokenizer) = published(name)
    assert tokenizer is None
    apply = helpers.applied(model)
    for rows, length in ((1, 1), (2, 7), (3, 24)):
        tokens = tokens_of(rows, length)
        np.testing.assert_allclose(
            apply(params, tokens), their_logits(peer, tokens), atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize('name', CASES)
@pytest.mark.parametrize('side', ['left', 'right'])
def test_padded_batches_agree(published, name, side):
    peer, _, (model, params, _) = published(name)
    tokens, positions = tokens_of(3, 12), np.full((3, 12), -1, np.int32)
    for row, length in enumerate((12, 9, 4)):
        place = slice(12 - length, 12) if side == 'left' else slice(0, length)
        positions[row, place] = np.arange(length)
    tokens[positions < 0] = PAD
    ours = np.asarray(helpers.applied(model)(params, tokens, positions))
    theirs = their_logits(peer, tokens, positions)
    np.testing.assert_allclose(ours[positions >= 0], theirs[positions >= 0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('name', CASES)
def test_saved_folders_are_identical(published, name, tmp_path):
    peer, _, (model, params, tokenizer) = published(name)
    folder = tmp_path / 'out'
    pretrained.save(folder, model, params, tokenizer, shard_bytes=40_000)
    assert (folder / 'model.safetensors.index.json').exists()
    back, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, attn_implementation='eager'
    )
    assert not any(report.values())
    theirs, again = peer.state_dict(), back.state_dict()
    assert theirs.keys() == again.keys()
    for key, value in theirs.items():
        assert torch.equal(value, again[key]), key
    same, same_params, _ = pretrained.load(folder)
    assert gpt_fields(same.config) == gpt_fields(model.config)
    jax.tree.map(np.testing.assert_array_equal, params, same_params)
    tokens = tokens_of(2, 9)
    np.testing.assert_array_equal(their_logits(peer, tokens), their_logits(back.eval(), tokens))


def gpt_fields(config: gpt.Config) -> dict:
    return {k: v for k, v in dataclasses.asdict(config).items() if 'init_std' not in k}


@pytest.mark.parametrize('name', ['gpt2', 'gptj', 'llama'])
def test_gradients_are_those_of_transformers(published, name):
    peer, _, (model, params, _) = published(name)
    tokens = tokens_of(2, 13)

    def loss(params):
        logits = model.apply({'params': params}, jnp.asarray(tokens[:, :-1]))
        nats, sums = losses.lm(logits, jnp.asarray(tokens[:, 1:]), jnp.ones((2, 12)))
        return nats / sums['weight']

    ours_loss, ours = jax.jit(jax.value_and_grad(loss))(params)
    peer.zero_grad()
    labels = torch.tensor(tokens, dtype=torch.long)
    theirs_loss = peer(input_ids=labels, labels=labels).loss
    theirs_loss.backward()
    assert float(ours_loss) == pytest.approx(theirs_loss.item(), abs=1e-5)
    theirs = {n: p.grad.numpy() for n, p in peer.named_parameters()}
    family = families.of(model.config)
    flat = stream.flatten(ours)
    seen = 0
    for place in family.places(set(flat), model.config.n_layers):
        leaves = [np.asarray(flat[path]) for path in place.tensor.paths]
        arrays = [x if place.layer < 0 else x[place.layer] for x in leaves]
        found = family.theirs(place.tensor, arrays, model.config)
        prefix = '' if place.name.startswith('lm_head') else family.prefix
        np.testing.assert_allclose(found, theirs[prefix + place.name], atol=1e-4)
        assert np.abs(found).max() > 0 or 'attn' in place.name
        seen += 1
    assert seen == len(theirs)


@pytest.mark.parametrize('kind', ['float16', 'bfloat16'])
def test_half_precision_loads_as_it_is(published, tmp_path, kind):
    peer, _, _ = published('gpt2')
    peer_of('gpt2').to(getattr(torch, kind)).save_pretrained(tmp_path)
    model, params, _ = pretrained.load(tmp_path)
    assert {str(x.dtype) for x in jax.tree.leaves(params)} == {kind}
    wanted = np.asarray(peer.transformer.wte.weight.detach().to(getattr(torch, kind)).float())
    table = params['network']['token_embedding']
    np.testing.assert_array_equal(np.asarray(table, np.float32), wanted)
    logits = model.apply({'params': params}, tokens_of(2, 5))
    assert np.abs(logits - their_logits(peer, tokens_of(2, 5))).max() < 0.3
    wide = pretrained.load(tmp_path, dtype='float32')
    assert {str(x.dtype) for x in jax.tree.leaves(wide.params)} == {'float32'}
    pretrained.save(tmp_path / 'out', model, params, None)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out', dtype='auto')
    assert back.dtype == getattr(torch, kind)


@pytest.mark.parametrize('zipped', [True, False])
def test_torch_pickles_are_read_without_torch(published, tmp_path, zipped):
    peer, folder, (_, params, _) = published('gptj')
    (tmp_path / 'config.json').write_bytes((folder / 'config.json').read_bytes())
    state = peer.state_dict() | {'transformer.h.0.attn.bias': torch.ones(1, 1, 24, 24).tril()}
    state['transformer.wte.weight'] = peer.transformer.wte.weight.t().contiguous().t()  # strided
    path = tmp_path / 'pytorch_model.bin'
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    jax.tree.map(np.testing.assert_array_equal, pretrained.load(tmp_path).params, params)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(errors.InputError, match='fetch it again'):
        pretrained.load(tmp_path)


@pytest.mark.parametrize('zipped', [True, False])
def test_a_pickle_that_would_run_code_is_refused(published, tmp_path, zipped):
    class Evil:
        def __reduce__(self):
            return (print, ('run',))

    _, folder, _ = published('gptj')
    (tmp_path / 'config.json').write_bytes((folder / 'config.json').read_bytes())
    torch.save({'x': Evil()}, tmp_path / 'pytorch_model.bin', _use_new_zipfile_serialization=zipped)
    with pytest.raises(errors.InputError, match=r'wants (__builtin__|builtins)\.print'):
        pretrained.load(tmp_path)


def changed(folder, tmp_path, change):
    """A copy of a folder whose tensors went through `change`."""
    from safetensors import numpy as sn

    stored = {name: x.read() for name, x in tensors.find(folder).items()}
    change(stored)
    (tmp_path / 'config.json').write_bytes((folder / 'config.json').read_bytes())
    sn.save_file(stored, tmp_path / 'model.safetensors')
    return tmp_path


@pytest.mark.parametrize(
    ('change', 'said'),
    [
        (lambda s: s.update(extra=np.zeros(3)), 'unexpected tensor extra$'),
        (lambda s: s.pop('transformer.h.1.ln_1.bias'), r'lacks the tensor h\.1\.ln_1\.bias; fetch'),
        (
            lambda s: s.update({'transformer.h.3.ln_1.bias': s['transformer.h.1.ln_1.bias']}),
            r'unexpected tensor h\.3\.ln_1\.bias, though its config says n_layer = 3',
        ),
        (
            lambda s: [s.pop(name) for name in list(s) if '.h.2.' in name],
            r'lacks the tensor h\.2\..*, though its config says n_layer = 3; fetch',
        ),
        (
            lambda s: s.update({'transformer.wpe.weight': np.zeros((5, 48), np.float32)}),
            r'wpe\.weight: its shape is \(5, 48\) .* says \(24, 48\) \(by n_positions\)',
        ),
        (
            lambda s: s.update({'lm_head.weight': np.zeros((77, 48), np.float32)}),
            'lm_head.weight differs from the embedding',
        ),
    ],
)
def test_what_does_not_fit_is_named(published, tmp_path, change, said):
    _, folder, _ = published('gpt2')
    with pytest.raises(errors.InputError, match=said):
        pretrained.load(changed(folder, tmp_path, change))


@pytest.mark.parametrize('bare', [False, True])
def test_tied_weights_may_stand_under_the_head_alone(published, tmp_path, bare):
    _, folder, (_, params, _) = published('gpt2')

    def save_model(stored):
        stored['lm_head.weight'] = stored.pop('transformer.wte.weight')
        for name in [n for n in stored if bare and n.startswith('transformer.')]:
            stored[name.removeprefix('transformer.')] = stored.pop(name)

    found = pretrained.load(changed(folder, tmp_path, save_model)).params
    jax.tree.map(np.testing.assert_array_equal, found, params)


def test_a_config_that_contradicts_its_tensors_is_told_by_its_field(published, tmp_path):
    _, folder, _ = published('llama')
    said = json.loads((folder / 'config.json').read_text())
    for field, value, message in (
        ('tie_word_embeddings', not said['tie_word_embeddings'], 'lm_head.weight'),
        ('attention_bias', not said['attention_bias'], r'self_attn\..*bias'),
        ('mlp_bias', not said['mlp_bias'], r'mlp\..*bias'),
        ('num_hidden_layers', said['num_hidden_layers'] + 1, r'layers\..*'),
        ('num_hidden_layers', said['num_hidden_layers'] - 1, r'layers\..*'),
        ('intermediate_size', said['intermediate_size'] + 1, r'mlp\..*'),
        ('vocab_size', said['vocab_size'] + 1, 'embed_tokens'),
        ('hidden_size', said['hidden_size'] + 4, 'its shape is'),
    ):
        path = changed(folder, tmp_path, lambda stored: None)
        (path / 'config.json').write_text(json.dumps(said | {field: value}))
        with pytest.raises(errors.InputError, match=f'{message}.*{field}'):
            pretrained.load(path)


def test_bare_networks_and_buffers_are_known(published, tmp_path):
    _, folder, (_, params, _) = published('gpt2')

    def strip(stored):
        for name in list(stored):
            stored[name.removeprefix('transformer.')] = stored.pop(name)
        stored['h.0.attn.bias'] = np.ones((1, 1, 24, 24), np.float32)
        stored['lm_head.weight'] = stored['wte.weight'].copy()

    found = pretrained.load(changed(folder, tmp_path, strip)).params
    jax.tree.map(np.testing.assert_array_equal, found, params)


def test_configs_that_ours_cannot_compute_are_refused(tmp_path):
    config = CASES['gpt2'][1] | {'model_type': 'gpt2', 'scale_attn_by_inverse_layer_idx': True}
    (tmp_path / 'config.json').write_text(json.dumps(config))
    with pytest.raises(errors.InputError, match='scale_attn_by_inverse_layer_idx = True'):
        pretrained.load(tmp_path)
    (tmp_path / 'config.json').write_text('{"model_type": "bert"}')
    with pytest.raises(errors.InputError, match="holds a 'bert'"):
        pretrained.load(tmp_path)
    (tmp_path / 'config.json').write_text('{"model_type": "gpt2"}')
    with pytest.raises(errors.InputError, match="has no field 'n_layer'"):
        pretrained.load(tmp_path)


def test_models_without_a_published_layout_are_refused(tmp_path):
    model = helpers.tiny_model(attention=('dense', 'banded'), band_width=4)
    with pytest.raises(errors.InputError, match=r'gpt2 \(attention, band_width\)'):
        pretrained.save(tmp_path / 'x', model, helpers.params_of(model), None)
    rnn = heads.build(sizes.rnn('gru', n_vocab=64, n_ctx=16, d_model=8))
    with pytest.raises(errors.InputError, match="family 'rnn'"):
        pretrained.save(tmp_path / 'x', rnn, helpers.params_of(rnn), None)
    assert not (tmp_path / 'x').exists()
    (tmp_path / 'x').mkdir()
    (tmp_path / 'x' / 'mine').touch()
    model = helpers.tiny_model()
    with pytest.raises(errors.InputError, match='is not empty'):
        pretrained.save(tmp_path / 'x', model, helpers.params_of(model), None)


def test_weights_land_in_their_shardings(published):
    from gptjax.runtime import mesh as mesh_lib

    _, folder, (model, params, _) = published('llama')
    mesh = mesh_lib.Mesh(
        mesh_lib.Config(data=1, fsdp=4, tensor=1, context=2, slices=1, across='data')
    )
    with mesh.scope():
        found = pretrained.load(folder, shardings=mesh.shardings).params
    kernel = found['network']['block_0']['up']['kernel']
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(3, 12, 80)}
    jax.tree.map(np.testing.assert_array_equal, found, params)


def test_a_mesh_over_which_weights_do_not_divide_is_one_line(published):
    """Here 77 ids over 8 devices."""
    from gptjax.runtime import mesh as mesh_lib

    _, folder, _ = published('llama')
    mesh = mesh_lib.Mesh(
        mesh_lib.Config(data=1, fsdp=1, tensor=8, context=1, slices=1, across='data')
    )
    with mesh.scope(), pytest.raises(errors.UsageError, match='over mesh axis tensor = 8; change'):
        pretrained.load(folder, shardings=mesh.shardings)


def test_tokenizers_travel(published, tmp_path):
    _, _, (model, params, _) = published('gpt2')
    texts = ['the cat sat on the mat', 'a second line, 123'] * 50
    config = vocabulary.Config('bpe', '', '', 300, 10**6)
    for tokenizer in (vocabulary.train(config, iter(texts)), tokenizer_lib.Bytes()):
        folder = tmp_path / type(tokenizer).__name__
        pretrained.save(folder, model, params, tokenizer)
        back = pretrained.load(folder).tokenizer
        assert tokenizer_lib.fingerprint(back) == tokenizer_lib.fingerprint(tokenizer)
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        for text in ('the mat, 한국어 \x07\n\n  end', "don't 1234"):
            assert theirs.encode(text) == tokenizer.encode(text)
            assert theirs.decode(theirs.encode(text)) == text
        assert theirs.eos_token_id == tokenizer.end_of_text
        generation = json.loads((folder / 'generation_config.json').read_text())
        assert generation['eos_token_id'] == tokenizer.end_of_text
