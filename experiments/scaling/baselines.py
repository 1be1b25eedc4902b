# SPDX-License-Identifier: Apache-2.0
"""LSTMs and 5-gram models on the axes of the GPTs: the same tokens, held-out windows, budgets.

The best size of an LSTM at each budget is sought as that of a GPT is (isoflop.py); an n-gram model
counts the windows that the others read first. Give the corpus of the GPTs' sweep as theirs.
Source: Kaplan et al. 2020, figure 7, for LSTMs; ours for n-grams.
Command: python -m gptjax.scale run --workdir=runs/baselines \
    --config=experiments/scaling/baselines.py:beside=runs/isoflop
    then collect --runs=runs/baselines and plot, both with --workdir=runs/isoflop
Expected time: 15 minutes on 2 cores
Expected number: see the results table in README.md
"""

import pathlib

import ml_collections

from experiments.scaling import base
from gptjax.configs import cli, sizes
from gptjax.configs import sweep as sweep_lib

VARIANTS = ('',)
_LSTMS = ((24, 4.5e11), (48, 4.5e11), (48, 1.35e12), (72, 1.35e12), (72, 4.05e12), (112, 4.05e12))
_COUNTED = tuple(2**k * 2**17 for k in range(0, 8))
_ORDER, _RATE = 5, 6e-3


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Arguments: beside=<another sweep, whose tokens are read>; path=<folder of text>."""
    arg = cli.parse_arg(arg, path='', beside='')
    config = base.get_config(f'path={arg.path}').unlock()
    if arg.beside:
        whole = arg.beside if '://' in arg.beside else str(pathlib.Path(arg.beside).absolute())
        config.data.sets = (f'{whole}/tokens',)
        config.data.eval_sets.tokens = f'{whole}/tokens'
        config.tokenizer.dir = f'{whole}/tokenizer'
    return config.lock()


def sweep(arg: str | None = None) -> dict[str, sweep_lib.Overrides]:
    """LSTMs by width and budget, 5-gram models by tokens, of any argument."""
    del arg
    shape = {'n_ctx': base.N_CTX, 'n_vocab': base.N_VOCAB}
    found = {}
    for width, flops in _LSTMS:
        model = sizes.rnn('lstm', d_model=width, **shape)
        # Two layers of 4 gates over input and state, and the tied table, each 6 FLOPs a token.
        a_token = 6.0 * (2 * (8 * width * width + 4 * width) + base.N_VOCAB * width)
        found[f'lstm,c={flops:g},d={width}'] = {
            'model': model,
            'optim.peak_lr': _RATE,
            **base.length(flops / a_token),
        }
    for tokens in _COUNTED:
        found[f'ngram,D={tokens}'] = {
            'model': sizes.ngram(_ORDER, **shape),
            'ngram.total_tokens': tokens,
        }
    return found
