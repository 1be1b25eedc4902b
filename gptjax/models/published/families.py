# SPDX-License-Identifier: Apache-2.0
"""The published families as data: gpt2, openai-gpt, gptj; llama stands in llama.py.

Sources: the model and configuration classes of Hugging Face transformers.
"""

from collections.abc import Mapping
from typing import Any

from gptjax.configs import errors
from gptjax.models import gpt, heads
from gptjax.models.published import llama, parts
from gptjax.models.published.layout import Layout, Tensor

_QKV = ('query', 'key', 'value')
# GPT-1 and GPT-2 share OpenAI's layer.
_OPENAI_LAYER = (
    *parts.norm('h.{}.ln_1', 'block_0/norm_attention'),
    *parts.norm('h.{}.ln_2', 'block_0/norm_mlp'),
    Tensor(
        'h.{}.attn.c_attn.weight',
        tuple(f'{parts.ATTENTION}/{part}/kernel' for part in _QKV),
        'D (T H K) -> T D H K',
    ),
    Tensor(
        'h.{}.attn.c_attn.bias',
        tuple(f'{parts.ATTENTION}/{part}/bias' for part in _QKV),
        '(T H K) -> T H K',
    ),
    *parts.linear('h.{}.attn.c_proj', f'{parts.ATTENTION}/out', '(H K) D -> H K D'),
    *parts.linear('h.{}.mlp.c_fc', 'block_0/up', 'D F -> D F'),
    *parts.linear('h.{}.mlp.c_proj', 'block_0/down', 'F D -> F D'),
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
    'n_inner': None,
    'layer_norm_epsilon': 1e-5,
    'initializer_range': 0.02,
    'embd_pdrop': 0.1,
    'attn_pdrop': 0.1,
    'resid_pdrop': 0.1,
    'tie_word_embeddings': True,
}
# Which field says how long an axis is, how many layers there are, whether the head is apart.
_OPENAI_FIELDS = {
    'D': 'n_embd',
    'F': 'n_inner',
    'H': 'n_head',
    'L': 'n_positions',
    'V': 'vocab_size',
    'layers': 'n_layer',
    'head': 'tie_word_embeddings',
}
# What GPT-1's released code calls gelu is the tanh form.
_GPT1_ACTIVATIONS = {'gelu': 'gelu_tanh', 'relu': 'relu', 'silu': 'silu', 'swish': 'silu'}


GPT2 = Layout(
    model_type='gpt2',
    prefix='transformer.',
    ignored=('.attn.bias', '.attn.masked_bias'),
    neighbours=False,
    tensors=(
        Tensor('wte.weight', ('token_embedding',), 'V D -> V D'),
        Tensor('wpe.weight', ('position_embedding',), 'L D -> L D'),
        *parts.norm('ln_f', 'final_norm'),
        *_OPENAI_LAYER,
        Tensor('lm_head.weight', ('unembedding',), 'V D -> V D'),
    ),
    defaults=_OPENAI_DEFAULTS | {'activation_function': 'gelu_new'},
    only={
        'scale_attn_weights': True,
        'scale_attn_by_inverse_layer_idx': False,
        'add_cross_attention': False,
    },
    fields=_OPENAI_FIELDS,
    section=lambda p: (
        _openai_section(p)
        | {
            'activation': parts.activation(p['activation_function'], parts.ACTIVATIONS),
        }
    ),
    published=lambda c: (
        _openai_published(c)
        | {
            'architectures': ['GPT2LMHeadModel'],
            'activation_function': parts.activation_name(c.activation, parts.ACTIVATIONS),
        }
    ),
)

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
    fields=_OPENAI_FIELDS,
    section=lambda p: (
        _openai_section(p)
        | {
            'norm': 'post',
            'activation': parts.activation(p['afn'], _GPT1_ACTIVATIONS),
        }
    ),
    published=lambda c: (
        _openai_published(c)
        | {
            'architectures': ['OpenAIGPTLMHeadModel'],
            'afn': parts.activation_name(c.activation, _GPT1_ACTIVATIONS),
        }
    ),
)

GPTJ = Layout(
    model_type='gptj',
    prefix='transformer.',
    ignored=('.attn.bias', '.attn.masked_bias'),
    neighbours=True,
    tensors=(
        Tensor('wte.weight', ('token_embedding',), 'V D -> V D'),
        *parts.norm('ln_f', 'final_norm'),
        *parts.norm('h.{}.ln_1', 'block_0/norm_attention'),
        *parts.linear(
            'h.{}.attn.q_proj', f'{parts.ATTENTION}/query', '(H K) D -> D H K', rotated=True
        ),
        *parts.linear(
            'h.{}.attn.k_proj', f'{parts.ATTENTION}/key', '(H K) D -> D H K', rotated=True
        ),
        *parts.linear('h.{}.attn.v_proj', f'{parts.ATTENTION}/value', '(H K) D -> D H K'),
        *parts.linear('h.{}.attn.out_proj', f'{parts.ATTENTION}/out', 'D (H K) -> H K D'),
        *parts.linear('h.{}.mlp.fc_in', 'block_0/up', 'F D -> D F'),
        *parts.linear('h.{}.mlp.fc_out', 'block_0/down', 'D F -> F D'),
        Tensor('lm_head.weight', ('unembedding',), 'V D -> V D'),
        Tensor('lm_head.bias', ('unembedding_bias',), 'V -> V'),
    ),
    defaults=_OPENAI_DEFAULTS
    | {
        'activation_function': 'gelu_new',
        'rotary_dim': 64,
        'tie_word_embeddings': False,
        'embd_pdrop': 0.0,
        'attn_pdrop': 0.0,
        'resid_pdrop': 0.0,
    },
    only={},
    fields=_OPENAI_FIELDS,
    section=lambda p: (
        _openai_section(p)
        | {
            'activation': parts.activation(p['activation_function'], parts.ACTIVATIONS),
            'parallel_residual': True,
            'positions': 'rotary',
            'rotary_dims': p['rotary_dim'] or p['n_embd'] // p['n_head'],
            'attention_bias': False,
            'head_bias': True,
        }
    ),
    published=lambda c: (
        _openai_published(c)
        | {
            'architectures': ['GPTJForCausalLM'],
            'activation_function': parts.activation_name(c.activation, parts.ACTIVATIONS),
            'rotary_dim': c.rotary_dims,
        }
    ),
)

ALL = {layout.model_type: layout for layout in (GPT1, GPT2, GPTJ, llama.LLAMA)}


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
