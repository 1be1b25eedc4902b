# SPDX-License-Identifier: Apache-2.0
"""GPT-2 pre-training (Radford et al. 2019, section 2.3), four sizes.

Command: python -m gptjax.train --config=experiments/gpt2/pretrain.py:size=small --workdir=runs/gpt2
Expected time: not measured
Expected number: WikiText-103 word perplexity 37.50, 26.37, 22.05, 17.48 by size (paper, Table 3, on
WebText, which is not public)

From the paper: shape, vocabulary, context 1024, batch 512. Learning rate, schedule, length and
dropout are not published: those here are ours, GPT-3's for the nearest size and no dropout. So are
numbers: bfloat16 computes, on float32 weights; what the backward pass keeps of a layer is its input
(remat: blocks), of large and xl less (full).
"""

import ml_collections

from gptjax.configs import base, cli, errors, sizes

VARIANTS = tuple(f'size={size}' for size in sizes.GPT2)
_OURS = {'small': 6.0e-4, 'medium': 3.0e-4, 'large': 2.5e-4, 'xl': 2.0e-4}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Argument: size=small|medium|large|xl."""
    arg = cli.parse_arg(arg, size='small')
    errors.require_choice(arg, 'size', tuple(sizes.GPT2))
    config = base.get_config()
    config.tokenizer.n_vocab = 50257
    remat = 'full' if arg.size in ('large', 'xl') else 'blocks'
    config.model = sizes.model(f'gpt2-{arg.size}', compute_dtype='bfloat16', remat=remat)
    config.batch.batch_tokens = 512 * 1024
    config.optim.update(
        peak_lr=_OURS[arg.size],
        warmup_tokens=375_000_000,
        final_lr_fraction=0.1,
        b1=0.9,
        b2=0.95,
        weight_decay=0.1,
        clip_norm=1.0,
    )
    config.train.update(total_tokens=300_000_000_000, eval_every_steps=2000)
    config.evaluate.batch_windows = 64
    return config.lock()
