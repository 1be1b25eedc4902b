# SPDX-License-Identifier: Apache-2.0
"""GPT-1 pre-training (Radford et al. 2018, section 4.1).

Command: python -m gptjax.train --config=experiments/gpt1/pretrain.py --workdir=runs/gpt1
Expected time: not measured
Expected number: 18.4 token perplexity on BooksCorpus (the paper's; its corpus is not public)

Durations are in updates and epochs in the paper; here they are tokens of 64 x 512 updates.
Not printed for pre-training and taken from the released fine-tuning code: Adam's betas and epsilon,
gradient norm 1.
"""

import ml_collections

from gptjax.configs import base, cli, sizes

VARIANTS = ('',)
_BATCH, _N_CTX = 64, 512


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Takes no argument."""
    cli.parse_arg(arg)
    config = base.get_config()
    config.tokenizer.n_vocab = 40478
    config.model = sizes.model('gpt1')
    config.batch.batch_tokens = _BATCH * _N_CTX
    config.optim.update(
        peak_lr=2.5e-4,
        warmup_tokens=2000 * _BATCH * _N_CTX,
        final_lr_fraction=0.0,
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        weight_decay=0.01,
        clip_norm=1.0,
    )
    config.train.update(total_tokens=0, total_epochs=100.0, eval_every_steps=2000)
    config.evaluate.batch_windows = 64
    return config.lock()
