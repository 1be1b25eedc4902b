# SPDX-License-Identifier: Apache-2.0
"""Llama as Hugging Face publishes it, and as in GGUF.

Sources: transformers' model and configuration classes; llama.cpp's convert_hf_to_gguf.py.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from gptjax.configs import errors
from gptjax.models import gpt
from gptjax.models.published import parts
from gptjax.models.published.layout import Layout, Tensor

_HUGGING_FACE = {
    'embed': 'embed_tokens',
    'norm': 'norm',
    'head': 'lm_head',
    'layer': 'layers.{}.',
    'norm_attention': 'input_layernorm',
    'norm_mlp': 'post_attention_layernorm',
    'query': 'self_attn.q_proj',
    'key': 'self_attn.k_proj',
    'value': 'self_attn.v_proj',
    'out': 'self_attn.o_proj',
    'gate': 'mlp.gate_proj',
    'up': 'mlp.up_proj',
    'down': 'mlp.down_proj',
}
_GGUF = {
    'embed': 'token_embd',
    'norm': 'output_norm',
    'head': 'output',
    'layer': 'blk.{}.',
    'norm_attention': 'attn_norm',
    'norm_mlp': 'ffn_norm',
    'query': 'attn_q',
    'key': 'attn_k',
    'value': 'attn_v',
    'out': 'attn_output',
    'gate': 'ffn_gate',
    'up': 'ffn_up',
    'down': 'ffn_down',
}


def _tensors(names: Mapping[str, str]) -> tuple[Tensor, ...]:
    def linear(name: str, path: str, pattern: str, rotated: bool = False) -> tuple[Tensor, Tensor]:
        return parts.linear(names['layer'] + names[name], f'{path}/{name}', pattern, rotated)

    return (
        Tensor(names['embed'] + '.weight', ('token_embedding',), 'V D -> V D'),
        *parts.norm(names['norm'], 'final_norm'),
        *parts.norm(names['layer'] + names['norm_attention'], 'block_0/norm_attention'),
        *parts.norm(names['layer'] + names['norm_mlp'], 'block_0/norm_mlp'),
        *linear('query', parts.ATTENTION, '(H K) D -> D H K', rotated=True),
        *linear('key', parts.ATTENTION, '(G K) D -> D G K', rotated=True),
        *linear('value', parts.ATTENTION, '(G K) D -> D G K'),
        *linear('out', parts.ATTENTION, 'D (H K) -> H K D'),
        *linear('gate', 'block_0', 'F D -> D F'),
        *linear('up', 'block_0', 'F D -> D F'),
        *linear('down', 'block_0', 'D F -> F D'),
        Tensor(names['head'] + '.weight', ('unembedding',), 'V D -> V D'),
    )


def _section(p: Mapping[str, Any]) -> dict[str, Any]:
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
        'activation': parts.activation(p['hidden_act'], parts.ACTIVATIONS),
        'gated_mlp': True,
        'attention_bias': p['attention_bias'],
        'mlp_bias': p['mlp_bias'],
        'norm_bias': False,
        'init_std': p['initializer_range'],
        'attention_dropout': float(p['attention_dropout'] or 0.0),
        'tied_embedding': p['tie_word_embeddings'],
    }


_ROPE = ('factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings')


def _rope(p: Mapping[str, Any]) -> tuple[float, tuple[float, ...]]:
    """(base, scaling), from transformers 5's rope_parameters or the fields before it."""
    found = {'rope_theta': p['rope_theta'], 'rope_type': 'default'}
    found |= (p['rope_scaling'] or {}) | (p['rope_parameters'] or {})
    kind = found.get('type', found['rope_type'])
    if kind == 'default':
        return float(found['rope_theta']), ()
    if kind != 'llama3':
        raise errors.InputError(f'no rotary scaling {kind!r} here; there are: default, llama3')
    return float(found['rope_theta']), tuple(float(found[name]) for name in _ROPE)


def _published(c: gpt.Config) -> dict[str, Any]:
    scaling = dict(zip(_ROPE, c.rotary_scaling, strict=False))
    if scaling:
        scaling = {'rope_type': 'llama3', **scaling, _ROPE[-1]: int(c.rotary_scaling[-1])}
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
        'hidden_act': parts.activation_name(c.activation, parts.ACTIVATIONS),
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
    tensors=_tensors(_HUGGING_FACE),
    defaults={
        'num_key_value_heads': None,
        'head_dim': None,
        'rms_norm_eps': 1e-6,
        'max_position_embeddings': 2048,
        'hidden_act': 'silu',
        'attention_bias': False,
        'mlp_bias': False,
        'initializer_range': 0.02,
        'attention_dropout': 0.0,
        'tie_word_embeddings': False,
        'rope_theta': 1e4,
        'rope_scaling': None,
        'rope_parameters': None,
    },
    only={'rope_interleaved': False},
    fields={
        'D': 'hidden_size',
        'F': 'intermediate_size',
        'G': 'num_key_value_heads',
        'H': 'num_attention_heads',
        'K': 'head_dim',
        'V': 'vocab_size',
        'layers': 'num_hidden_layers',
        'head': 'tie_word_embeddings',
        'self_attn': 'attention_bias',
        'mlp': 'mlp_bias',
    },
    section=_section,
    published=_published,
)

# llama.cpp reorders the rows of queries and keys to neighbouring rotary pairs.
LLAMA_GGUF = dataclasses.replace(
    LLAMA, prefix='', ignored=(), neighbours=True, tensors=_tensors(_GGUF)
)
