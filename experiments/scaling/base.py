# SPDX-License-Identifier: Apache-2.0
"""What the sweeps of this folder share: a tiny GPT-2 on local text, and how it is sized.

Source: the recipe is ours. Rates: of 0.003, 0.006, 0.012 and 0.024 the second was best at widths 32
and 64 (LOG.md); above 64 it falls with the root of the width.
Command: python -m gptjax.train --config=experiments/scaling/base.py --workdir=runs/one, behind
    prepare_corpus, train_tokenizer and prepare_tokens; the sweeps beside it run those themselves
Expected time: 1 minute on 2 cores
Expected number: none; see isoflop.py
"""

import ml_collections

from gptjax.configs import base, cli, sizes
from gptjax.configs import sweep as sweep_lib
from gptjax.scaling import flops as flops_lib

VARIANTS = ('',)
N_CTX, N_VOCAB, BATCH_TOKENS = 128, 512, 1024
_PEAK_LR, _UP_TO_WIDTH = 6e-3, 64
_WARMUP = 0.1  # of the run


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Arguments: path=<folder of text>; '' = Python's documentation."""
    arg = cli.parse_arg(arg, path='')
    config = base.get_config()
    if arg.path:
        config.corpus.update(set='files', path=arg.path)
    config.tokenizer.n_vocab = N_VOCAB
    config.tokens.valid_fraction = 0.02
    config.batch.batch_tokens = BATCH_TOKENS
    config.train.update(eval_every_steps=0, eval_max_tokens=200_000)
    config.evaluate.batch_windows = 64
    config.checkpoint.update(every_steps=0, every_secs=120.0)
    return sweep_lib.apply(config, size(64, 3, tokens=1_000_000))


def size(
    d_model: int, n_layers: int, tokens: float = 0.0, flops: float = 0.0
) -> sweep_lib.Overrides:
    """A GPT of a width and depth, so many tokens or FLOPs long."""
    model = sizes.gpt2_of(d_model, n_layers, n_ctx=N_CTX, n_vocab=N_VOCAB, scan_layers=False)
    return {
        'model': model,
        **length(tokens or flops / flops_lib.of_gpt(model).flops_per_token),
        'optim.peak_lr': rate(d_model),
    }


def rate(d_model: int) -> float:
    """The learning rate of a width."""
    return _PEAK_LR * min(1.0, (_UP_TO_WIDTH / d_model) ** 0.5)


def length(tokens: float) -> sweep_lib.Overrides:
    """A run of so many tokens, in whole steps, with its warm-up."""
    steps = max(2, round(tokens / BATCH_TOKENS))
    return {
        'train.total_tokens': steps * BATCH_TOKENS,
        'optim.warmup_tokens': max(1, round(_WARMUP * steps)) * BATCH_TOKENS,
    }
