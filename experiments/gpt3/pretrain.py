# SPDX-License-Identifier: Apache-2.0
"""GPT-3 pre-training (Brown et al. 2020, Table 2.1 and appendix B), eight sizes.

Command: python -m gptjax.train --config=experiments/gpt3/pretrain.py:size=125m --workdir=runs/gpt3
Expected time: not measured
Expected number: LAMBADA zero-shot accuracy 42.7, 54.3, 60.4, 63.6, 67.1, 70.3, 72.5, 76.2 by size
(paper, on its own corpus, which is not public)

From the paper: rate, warm-up, decay, betas, clipping, 300B tokens, context 2048 always full, batch
ramped linearly from 32k tokens. Ours: batches of whole windows near the printed ones, how long the
ramp lasts within the printed 4 to 12 billion, which layers are banded and how wide (sizes.py).
bfloat16 computes, on float32 weights; what the backward pass keeps of a layer is its input (remat:
blocks), from 760M on less (full). At 4 windows a device a step of 125M takes 2.4 GiB of a TPU v5e
with blocks, 2.3 with full, 6.8 with none (compiled for 16, each with all the weights).
The ramp's batches are multiples of its first, 16 windows: on a mesh whose data x fsdp is larger,
raise --config.batch.ramp_from_tokens to as many windows of 2,048 tokens.
"""

import ml_collections

from gptjax.configs import base, cli, errors, sizes

VARIANTS = tuple(f'size={size}' for size in sizes.GPT3)
# Printed millions of tokens -> windows of 2048; 1,536 of them, 3.15M, divide over 512 devices.
_WINDOWS = {0.5: 256, 1.0: 512, 2.0: 1024, 3.2: 1536}
_RAMP_BILLIONS = dict(zip(sizes.GPT3, (4, 4, 4, 6, 6, 8, 10, 12), strict=True))


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Argument: size=125m|350m|760m|1.3b|2.7b|6.7b|13b|175b."""
    arg = cli.parse_arg(arg, size='125m')
    errors.require_choice(arg, 'size', tuple(sizes.GPT3))
    config = base.get_config()
    config.tokenizer.n_vocab = 50257
    remat = 'blocks' if arg.size in ('125m', '350m') else 'full'
    config.model = sizes.model(f'gpt3-{arg.size}', compute_dtype='bfloat16', remat=remat)
    recipe = sizes.GPT3_RECIPE[arg.size]
    config.batch.update(
        batch_tokens=_WINDOWS[recipe.batch_mtokens] * 2048,
        ramp_from_tokens=16 * 2048,
        ramp_over_tokens=_RAMP_BILLIONS[arg.size] * 10**9,
    )
    config.optim.update(
        peak_lr=recipe.peak_lr,
        warmup_tokens=375_000_000,
        decay_tokens=260_000_000_000,
        final_lr_fraction=0.1,
        b1=0.9,
        b2=0.95,
        eps=1e-8,
        weight_decay=0.1,
        clip_norm=1.0,
    )
    config.train.update(total_tokens=300_000_000_000, eval_every_steps=2000)
    config.evaluate.batch_windows = 64
    return config.lock()
