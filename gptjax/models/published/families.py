# SPDX-License-Identifier: Apache-2.0
"""The published families as data: gpt2, openai-gpt, gptj, llama, and llama as in GGUF.

Sources: the model and configuration classes of Hugging Face transformers; llama.cpp's
convert_hf_to_gguf.py for GGUF.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from gptjax.configs import errors
from gptjax.models import gpt, heads
from gptjax.models.published import layout as layout_lib
from gptjax.models.published.layout import Layout, Tensor


def _linear(name: str, path: str, pattern: str, rotated: bool = False) -> tuple[Tensor, Tensor]:
    """Kernel and bias of a linear layer; the bias has our last axes, flattened there."""
    left, right = pattern.split(' -> ')
    new = next(group for group in layout_lib.groups(left) if group.split()[-1] == right.split()[-1])
    flat = f'({new})' if ' ' in new else new
    return (
        Tensor(f'{name}.weight', (f'{path}/kernel',), pattern, rotated),
        Tensor(f'{name}.bias', (f'{path}/bias',), f'{flat} -> {new}', rotated),
    )


def _norm(name: str, path: str) -> tuple[Tensor, Tensor]:
    return (
        Tensor(f'{name}.weight', (f'{path}/scale',), 'D -> D'),
        Tensor(f'{name}.bias', (f'{path}/bias',), 'D -> D'),
    )


_ATTENTION = 'block_0/attention'
_QKV = ('query', 'key', 'value')
# GPT-1 and GPT-2 share OpenAI's layer.
_OPENAI_LAYER = (
    *_norm('h.{}.ln_1', 'block_0/norm_attention'),
    *_norm('h.{}.ln_2', 'block_0/norm_mlp'),
    Tensor(
        'h.{}.attn.c_attn.weight',
        tuple(f'{_ATTENTION}/{part}/kernel' for part in _QKV),
        'D (T H K) -> T D H K',
    ),
    Tensor(
        'h.{}.attn.c_attn.bias',
        tuple(f'{_ATTENTION}/{part}/bias' for part in _QKV),
        '(T H K) -> T H K',
    ),
    *_linear('h.{}.attn.c_proj', f'{_ATTENTION}/out', '(H K) D -> H K D'),
    *_linear('h.{}.mlp.c_fc', 'block_0/up', 'D F -> D F'),
    *_linear('h.{}.mlp.c_proj', 'block_0/down', 'F D -> F D'),
)


def _openai_section(p: Mapping[str, Any]) -> dict[str, Any]:
    """What gpt2, openai-gpt and gptj call by the same names."""
    return {
        'n_layers': p['n_layer'],
        'd_model': p['n_embd'],
        'n_heads': p['n_head'],
        'd_head': p['n_embd'] // p['n_head'],
        'd_ff': p['n_inner'] or 4 * p['n_embd'],
        'n_ctx': p['n_positions'],
        'n_vocab': p['vocab_size'],
        'norm_eps': p['layer_norm_epsilon'],
        'init_std': p['initializer_range'],
        'embed_dropout': float(p['embd_pdrop']),
        'attention_dropout': float(p['attn_pdrop']),
        'residual_dropout': float(p['resid_pdrop']),
        'tied_embedding': p['tie_word_embeddings'],
    }


def _openai_published(c: gpt.Config) -> dict[str, Any]:
    return {
        'n_layer': c.n_layers,
        'n_embd': c.d_model,
        'n_head': c.n_heads,
        'n_inner': None if c.d_ff == 4 * c.d_model else c.d_ff,
        'n_positions': c.n_ctx,
        'vocab_size': c.n_vocab,
        'layer_norm_epsilon': c.norm_eps,
        'initializer_range': c.init_std,
        'embd_pdrop': c.embed_dropout,
        'attn_pdrop': c.attention_dropout,
        'resid_pdrop': c.residual_dropout,
        'tie_word_embeddings': c.tied_embedding,
    }


_OPENAI_DEFAULTS = {
    'n_inner': None, 'layer_norm_epsilon': 1e-5, 'initializer_range': 0.02, 'embd_pdrop': 0.1,
    'attn_pdrop': 0.1, 'resid_pdrop': 0.1, 'tie_word_embeddings': True,
}  # fmt: skip
_ACTIVATIONS = {
    'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh', 'gelu': 'gelu', 'relu': 'relu',
    'silu': 'silu', 'swish': 'silu',
}  # fmt: skip
# What GPT-1's released code calls gelu is the tanh form.
_GPT1_ACTIVATIONS = {'gelu': 'gelu_tanh', 'relu': 'relu', 'silu': 'silu', 'swish': 'silu'}


def _activation(name: str, table: Mapping[str, str]) -> str:
    if name not in table:
        raise errors.InputError(
            f'no activation {name!r} here; there are: {", ".join(sorted(set(table)))}'
        )
    return table[name]


def _activation_name(activation: str, table: Mapping[str, str]) -> str:
    return _activation(activation, {ours: theirs for theirs, ours in reversed(table.items())})


GPT2 = Layout(
    model_type='gpt2',
    prefix='transformer.',
    ignored=('.attn.bias', '.attn.masked_bias'),
    neighbours=False,
    tensors=(
        Tensor('wte.weight', ('token_embedding',), 'V D -> V D'),
        Tensor('wpe.weight', ('position_embedding',), 'L D -> L D'),
        *_norm('ln_f', 'final_norm'),
        *_OPENAI_LAYER,
        Tensor('lm_head.weight', ('unembedding',), 'V D -> V D'),
    ),
    defaults=_OPENAI_DEFAULTS | {'activation_function': 'gelu_new'},
    only={
        'scale_attn_weights': True,
        'scale_attn_by_inverse_layer_idx': False,
        'add_cross_attention': False,
    },
    section=lambda p: _openai_section(p) | {
        'activation': _activation(p['activation_function'], _ACTIVATIONS),
    },
    published=lambda c: _openai_published(c) | {
        'architectures': ['GPT2LMHeadModel'],
        'activation_function': _activation_name(c.activation, _ACTIVATIONS),
    },
)  # fmt: skip

GPT1 = Layout(
    model_type='openai-gpt',
    prefix='transformer.',
    ignored=('.attn.bias', 'position_ids'),
    neighbours=False,
    tensors=(
        Tensor('tokens_embed.weight', ('token_embedding',), 'V D -> V D'),
        Tensor('positions_embed.weight', ('position_embedding',), 'L D -> L D'),
        *_OPENAI_LAYER,
        Tensor('lm_head.weight', ('unembedding',), 'V D -> V D'),
    ),
    defaults=_OPENAI_DEFAULTS | {'afn': 'gelu'},
    only={'n_inner': None},
    section=lambda p: _openai_section(p) | {
        'norm': 'post',
        'activation': _activation(p['afn'], _GPT1_ACTIVATIONS),
    },
    published=lambda c: _openai_published(c) | {
        'architectures': ['OpenAIGPTLMHeadModel'],
        'afn': _activation_name(c.activation, _GPT1_ACTIVATIONS),
    },
)  # fmt: skip

GPTJ = Layout(
    model_type='gptj',
    prefix='transformer.',
    ignored=('.attn.bias', '.attn.masked_bias'),
    neighbours=True,
    tensors=(
        Tensor('wte.weight', ('token_embedding',), 'V D -> V D'),
        *_norm('ln_f', 'final_norm'),
        *_norm('h.{}.ln_1', 'block_0/norm_attention'),
        *_linear('h.{}.attn.q_proj', f'{_ATTENTION}/query', '(H K) D -> D H K', rotated=True),
        *_linear('h.{}.attn.k_proj', f'{_ATTENTION}/key', '(H K) D -> D H K', rotated=True),
        *_linear('h.{}.attn.v_proj', f'{_ATTENTION}/value', '(H K) D -> D H K'),
        *_linear('h.{}.attn.out_proj', f'{_ATTENTION}/out', 'D (H K) -> H K D'),
        *_linear('h.{}.mlp.fc_in', 'block_0/up', 'F D -> D F'),
        *_linear('h.{}.mlp.fc_out', 'block_0/down', 'D F -> F D'),
        Tensor('lm_head.weight', ('unembedding',), 'V D -> V D'),
        Tensor('lm_head.bias', ('unembedding_bias',), 'V -> V'),
    ),
    defaults=_OPENAI_DEFAULTS | {
        'activation_function': 'gelu_new', 'rotary_dim': 64, 'tie_word_embeddings': False,
        'embd_pdrop': 0.0, 'attn_pdrop': 0.0, 'resid_pdrop': 0.0,
    },
    only={},
    section=lambda p: _openai_section(p) | {
        'activation': _activation(p['activation_function'], _ACTIVATIONS),
        'parallel_residual': True,
        'positions': 'rotary',
        'rotary_dims': p['rotary_dim'] or p['n_embd'] // p['n_head'],
        'attention_bias': False,
        'head_bias': True,
    },
    published=lambda c: _openai_published(c) | {
        'architectures': ['GPTJForCausalLM'],
        'activation_function': _activation_name(c.activation, _ACTIVATIONS),
        'rotary_dim': c.rotary_dims,
    },
)  # fmt: skip

_LLAMA_NAMES = {
    'embed': 'embed_tokens', 'norm': 'norm', 'head': 'lm_head', 'layer': 'layers.{}.',
    'norm_attention': 'input_layernorm', 'norm_mlp': 'post_attention_layernorm',
    'query': 'self_attn.q_proj', 'key': 'self_attn.k_proj', 'value': 'self_attn.v_proj',
    'out': 'self_attn.o_proj', 'gate': 'mlp.gate_proj', 'up': 'mlp.up_proj',
    'down': 'mlp.down_proj',
}  # fmt: skip
_GGUF_NAMES = {
    'embed': 'token_embd', 'norm': 'output_norm', 'head': 'output', 'layer': 'blk.{}.',
    'norm_attention': 'attn_norm', 'norm_mlp': 'ffn_norm', 'query': 'attn_q', 'key': 'attn_k',
    'value': 'attn_v', 'out': 'attn_output', 'gate': 'ffn_gate', 'up': 'ffn_up',
    'down': 'ffn_down',
}  # fmt: skip


def _llama_tensors(names: Mapping[str, str]) -> tuple[Tensor, ...]:
    def linear(name: str, path: str, pattern: str, rotated: bool = False) -> tuple[Tensor, Tensor]:
        return _linear(names['layer'] + names[name], f'{path}/{name}', pattern, rotated)

    return (
        Tensor(names['embed'] + '.weight', ('token_embedding',), 'V D -> V D'),
        *_norm(names['norm'], 'final_norm'),
        *_norm(names['layer'] + names['norm_attention'], 'block_0/norm_attention'),
        *_norm(names['layer'] + names['norm_mlp'], 'block_0/norm_mlp'),
        *linear('query', _ATTENTION, '(H K) D -> D H K', rotated=True),
        *linear('key', _ATTENTION, '(G K) D -> D G K', rotated=True),
        *linear('value', _ATTENTION, '(G K) D -> D G K'),
        *linear('out', _ATTENTION, 'D (H K) -> H K D'),
        *linear('gate', 'block_0', 'F D -> D F'),
        *linear('up', 'block_0', 'F D -> D F'),
        *linear('down', 'block_0', 'D F -> F D'),
        Tensor(names['head'] + '.weight', ('unembedding',), 'V D -> V D'),
    )


def _llama_section(p: Mapping[str, Any]) -> dict[str, Any]:
    d_head = p['head_dim'] or p['hidden_size'] // p['num_attention_heads']
    shared = p['num_key_value_heads']
    base, scaling = _rope(p)
    return {
        'n_layers': p['num_hidden_layers'],
        'd_model': p['hidden_size'],
        'n_heads': p['num_attention_heads'],
        'n_kv_heads': 0 if shared in (None, p['num_attention_heads']) else shared,
        'd_head': d_head,
        'd_ff': p['intermediate_size'],
        'n_ctx': p['max_position_embeddings'],
        'n_vocab': p['vocab_size'],
        'norm_kind': 'rms',
        'norm_eps': p['rms_norm_eps'],
        'positions': 'rotary',
        'rotary_dims': d_head,
        'rotary_base': base,
        'rotary_scaling': scaling,
        'activation': _activation(p['hidden_act'], _ACTIVATIONS),
        'gated_mlp': True,
        'attention_bias': p['attention_bias'],
        'mlp_bias': p['mlp_bias'],
        'norm_bias': False,
        'init_std': p['initializer_range'],
        'attention_dropout': float(p['attention_dropout'] or 0.0),
        'tied_embedding': p['tie_word_embeddings'],
    }


_LLAMA3_ROPE = ('factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings')


def _rope(p: Mapping[str, Any]) -> tuple[float, tuple[float, ...]]:
    """(base, scaling), from transformers 5's rope_parameters or the fields before it."""
    found = {'rope_theta': p['rope_theta'], 'rope_type': 'default'}
    found |= (p['rope_scaling'] or {}) | (p['rope_parameters'] or {})
    kind = found.get('type', found['rope_type'])
    if kind == 'default':
        return float(found['rope_theta']), ()
    if kind != 'llama3':
        raise errors.InputError(f'no rotary scaling {kind!r} here; there are: default, llama3')
    return float(found['rope_theta']), tuple(float(found[name]) for name in _LLAMA3_ROPE)


def _llama_published(c: gpt.Config) -> dict[str, Any]:
    scaling = dict(zip(_LLAMA3_ROPE, c.rotary_scaling, strict=False))
    if scaling:
        scaling = {'rope_type': 'llama3', **scaling, _LLAMA3_ROPE[-1]: int(c.rotary_scaling[-1])}
    return {
        'architectures': ['LlamaForCausalLM'],
        'num_hidden_layers': c.n_layers,
        'hidden_size': c.d_model,
        'num_attention_heads': c.n_heads,
        'num_key_value_heads': c.kv_heads,
        'head_dim': c.d_head,
        'intermediate_size': c.d_ff,
        'max_position_embeddings': c.n_ctx,
        'vocab_size': c.n_vocab,
        'rms_norm_eps': c.norm_eps,
        'rope_theta': c.rotary_base,
        'rope_scaling': scaling or None,
        'hidden_act': _activation_name(c.activation, _ACTIVATIONS),
        'attention_bias': c.attention_bias,
        'mlp_bias': c.mlp_bias,
        'initializer_range': c.init_std,
        'attention_dropout': c.attention_dropout,
        'tie_word_embeddings': c.tied_embedding,
    }


LLAMA = Layout(
    model_type='llama',
    prefix='model.',
    ignored=('.rotary_emb.inv_freq',),
    neighbours=False,
    tensors=_llama_tensors(_LLAMA_NAMES),
    defaults={
        'num_key_value_heads': None, 'head_dim': None, 'rms_norm_eps': 1e-6,
        'max_position_embeddings': 2048, 'hidden_act': 'silu', 'attention_bias': False,
        'mlp_bias': False, 'initializer_range': 0.02, 'attention_dropout': 0.0,
        'tie_word_embeddings': False, 'rope_theta': 1e4, 'rope_scaling': None,
        'rope_parameters': None,
    },
    only={'rope_interleaved': False},
    section=_llama_section,
    published=_llama_published,
)  # fmt: skip

# llama.cpp reorders the rows of queries and keys to neighbouring rotary pairs.
LLAMA_GGUF = dataclasses.replace(
    LLAMA, prefix='', ignored=(), neighbours=True, tensors=_llama_tensors(_GGUF_NAMES)
)

ALL = {layout.model_type: layout for layout in (GPT1, GPT2, GPTJ, LLAMA)}


def of(config: gpt.Config) -> Layout:
    """The layout that can hold a model: the one whose config.json gives back its Config.

    Raises:
      InputError: none can; the message names what each lacks.
    """
    lacks = []
    for layout in ALL.values():
        try:
            back = layout.config(layout.published(config))
            fields = heads.differing(config, back)
        except errors.InputError:
            fields = ['activation']
        if not fields:
            return layout
        lacks.append(f'{layout.model_type} ({", ".join(fields)})')
    raise errors.InputError(
        f'no published layout holds this model; they differ in: {"; ".join(lacks)}'
    )
