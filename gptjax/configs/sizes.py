# SPDX-License-Identifier: Apache-2.0
"""Model sizes of the GPT line as data; what the fields mean stands in sections/models.py.

Where a paper contradicts itself, GPT3_PRINTED keeps what Table 2.1 prints and GPT3 holds what runs.
"""

import math
from typing import Any, NamedTuple

import ml_collections

from gptjax.configs import errors, fields
from gptjax.configs.sections import models


class Shape(NamedTuple):
    n_layers: int
    d_model: int
    n_heads: int
    d_head: int


class LlamaShape(NamedTuple):
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_ff: int
    n_ctx: int
    n_vocab: int
    rotary_base: float


class Recipe(NamedTuple):
    """One row of GPT-3's Table 2.1: batch in millions of tokens, and the learning rate."""

    batch_mtokens: float
    peak_lr: float


# GPT-1 paper, section 4.1, "Model specifications".
GPT1 = Shape(12, 768, 12, 64)

# GPT-2 paper, Table 2; heads from the released hparams.json files.
GPT2 = {
    'small': Shape(12, 768, 12, 64),
    'medium': Shape(24, 1024, 16, 64),
    'large': Shape(36, 1280, 20, 64),
    'xl': Shape(48, 1600, 25, 64),
}

# GPT-3 paper, Table 2.1, as printed: 24 x 128 is not 2048, and 40 x 128 is not 5140.
GPT3_PRINTED = {
    '125m': Shape(12, 768, 12, 64),
    '350m': Shape(24, 1024, 16, 64),
    '760m': Shape(24, 1536, 16, 96),
    '1.3b': Shape(24, 2048, 24, 128),
    '2.7b': Shape(32, 2560, 32, 80),
    '6.7b': Shape(32, 4096, 32, 128),
    '13b': Shape(40, 5140, 40, 128),
    '175b': Shape(96, 12288, 96, 128),
}

# What agrees with the parameter counts of the paper's own Table D.1.
GPT3 = GPT3_PRINTED | {'1.3b': Shape(24, 2048, 16, 128), '13b': Shape(40, 5120, 40, 128)}

# GPT-3 paper, Table 2.1.
GPT3_RECIPE = {
    '125m': Recipe(0.5, 6.0e-4),
    '350m': Recipe(0.5, 3.0e-4),
    '760m': Recipe(0.5, 2.5e-4),
    '1.3b': Recipe(1.0, 2.0e-4),
    '2.7b': Recipe(1.0, 1.6e-4),
    '6.7b': Recipe(2.0, 1.2e-4),
    '13b': Recipe(2.0, 1.0e-4),
    '175b': Recipe(3.2, 0.6e-4),
}

# GPT-J (mesh-transformer-jax, README, "Model Details") and KoGPT (its model card): one shape.
GPTJ = Shape(28, 4096, 16, 256)
GPTJ_VOCAB = {'gptj-6b': 50400, 'kogpt-6b': 64512}

# Published config.json files.
LLAMA = {
    'smollm2-135m': LlamaShape(30, 576, 9, 3, 64, 1536, 8192, 49152, 1e5),
    'smollm2-360m': LlamaShape(32, 960, 15, 5, 64, 2560, 8192, 49152, 1e5),
}

# Ours: for tests, laptops and the quickstart.
TINY = {
    'tiny': Shape(2, 64, 2, 32),
    'quick': Shape(4, 192, 4, 48),
    'char': Shape(6, 384, 6, 64),  # nanoGPT's train_shakespeare_char
    'char_cpu': Shape(4, 128, 4, 32),  # nanoGPT's README, its recipe for a CPU
}


def model(size: str, **overrides: Any) -> ml_collections.ConfigDict:
    """The model section of a GPT: 'gpt1', 'gpt2-small', 'gpt3-175b', 'gptj-6b', 'tiny', ...

    Raises:
      UsageError: there is no such size; the message lists those there are.
    """
    table = {'gpt1': GPT1} | TINY
    table |= {f'gpt2-{name}': shape for name, shape in GPT2.items()}
    table |= {f'gpt3-{name}': shape for name, shape in GPT3.items()}
    table |= dict.fromkeys(GPTJ_VOCAB, GPTJ) | LLAMA
    errors.require(size in table, f'no size {size!r}; there are: {", ".join(table)}')
    shape = table[size]
    section = fields.values(models.GPT)
    section.update(
        **shape._asdict(),
        residual_init_std=section.init_std / math.sqrt(2 * shape.n_layers),
    )
    if size in LLAMA:
        section.update(
            norm_kind='rms',
            positions='rotary',
            rotary_dims=shape.d_head,
            activation='silu',
            gated_mlp=True,
            attention_bias=False,
            mlp_bias=False,
            norm_bias=False,
        )
    else:
        section.d_ff = 4 * shape.d_model
    if size in GPTJ_VOCAB:
        section.update(
            n_ctx=2048,
            n_vocab=GPTJ_VOCAB[size],  # GPT-J's 50,257 tokens are padded to 50,400
            parallel_residual=True,
            positions='rotary',
            rotary_dims=64,
            attention_bias=False,
            head_bias=True,
            tied_embedding=False,
        )
    elif size == 'gpt1':
        section.update(
            norm='post',
            n_ctx=512,
            n_vocab=40478,  # the released vocabulary; the paper says 40,000 merges
            position_init_std=0.02,
            residual_init_std=0.02,
            embed_dropout=0.1,
            attention_dropout=0.1,
            residual_dropout=0.1,
        )
    elif size.startswith('gpt3-'):
        # "Alternating dense and locally banded sparse attention" (section 2.1); which layers are
        # banded and how wide is not published: odd ones, 256 wide, are ours.
        section.update(n_ctx=2048, attention=('dense', 'banded'), band_width=256)
    elif size in TINY:
        section.update(n_ctx={'quick': 128, 'char': 256}.get(size, 64), scan_layers=False)
    return _with(section, overrides)


def gpt2_of(d_model: int, n_layers: int, **overrides: Any) -> ml_collections.ConfigDict:
    """The model section of a GPT-2 of any width and depth, for sweeps over sizes.

    Heads are 16 wide, 8 where the width is no multiple of 16, 64 from 768 on, as in GPT-2.
    """
    d_head = 64 if d_model >= 768 else 16 if d_model % 16 == 0 else 8
    errors.require(d_model % d_head == 0, f'd_model = {d_model} must be a multiple of {d_head}')
    shape = Shape(n_layers, d_model, d_model // d_head, d_head)
    scaled = {'d_ff': 4 * d_model, 'residual_init_std': 0.02 / math.sqrt(2 * n_layers)}
    return _with(fields.values(models.GPT), shape._asdict() | scaled | overrides)


def rnn(cell: str, **overrides: Any) -> ml_collections.ConfigDict:
    """The model section of an RNN baseline, cell 'lstm' or 'gru'."""
    return _with(fields.values(models.RNN), {'cell': cell} | overrides)


def ngram(order: int, **overrides: Any) -> ml_collections.ConfigDict:
    """The model section of an n-gram baseline."""
    return _with(fields.values(models.NGRAM), {'order': order} | overrides)


def _with(section: ml_collections.ConfigDict, values: dict) -> ml_collections.ConfigDict:
    """The section with other values, locked."""
    section.lock().update(values)
    return section
