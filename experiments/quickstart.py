# SPDX-License-Identifier: Apache-2.0
"""Ours: a 4-layer GPT-2 on the documentation of Python itself, from nothing to text on a laptop.

model=lstm, model=gru and model=ngram are its baselines: the same tokens in the same order, the same
held-out windows; the RNNs have about as many parameters as the GPT.

Command: make quickstart
Expected time: under 10 minutes on 2 cores
Expected number: see the results table in README.md
"""

import ml_collections

from gptjax.configs import base, cli, errors, sizes

VARIANTS = ('', 'model=lstm', 'model=gru', 'model=ngram')


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Arguments: model=gpt|lstm|gru|ngram."""
    arg = cli.parse_arg(arg, model='gpt')
    models = {
        'gpt': lambda **fields: sizes.model('quick', **fields),
        'lstm': lambda **fields: sizes.rnn('lstm', d_model=320, **fields),
        'gru': lambda **fields: sizes.rnn('gru', d_model=384, **fields),
        'ngram': lambda **fields: sizes.ngram(5, **fields),
    }
    errors.require_choice(arg, 'model', tuple(models))
    config = base.get_config()
    config.corpus.shard_bytes = 2**20
    config.tokenizer.n_vocab = 2048
    config.model = models[arg.model](n_ctx=128, n_vocab=2048)
    config.batch.batch_tokens = 1024
    config.optim.update(peak_lr=3e-3, warmup_tokens=100 * 1024)
    config.train.update(total_tokens=1000 * 1024, eval_every_steps=250)
    config.evaluate.batch_windows = 16
    config.checkpoint.update(every_steps=250, every_secs=60.0)
    config.decode.update(max_new_tokens=80, do_sample=True, temperature=0.8, top_k=50)
    return config.lock()
