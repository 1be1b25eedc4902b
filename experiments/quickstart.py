# SPDX-License-Identifier: Apache-2.0
"""Ours: a 4-layer GPT-2 on the documentation of Python itself, from nothing to text on a laptop.

Command: make quickstart
Expected time: under 10 minutes on 2 cores
Expected number: see the results table in README.md
"""

import ml_collections

from gptjax.configs import base, cli, sizes

VARIANTS = ('',)


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The quickstart's config; takes no argument."""
    cli.parse_arg(arg)
    config = base.get_config()
    config.corpus.shard_bytes = 2**20
    config.tokenizer.n_vocab = 2048
    config.model = sizes.model('quick', n_vocab=2048)
    config.batch.batch_tokens = 1024
    config.optim.update(peak_lr=3e-3, warmup_tokens=100 * 1024)
    config.train.update(total_tokens=1500 * 1024, eval_every_steps=250)
    config.evaluate.batch_windows = 16
    config.checkpoint.update(every_steps=250, every_secs=60.0)
    config.decode.update(max_new_tokens=80, temperature=0.8, top_k=50)
    return config.lock()
