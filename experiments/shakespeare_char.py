# SPDX-License-Identifier: Apache-2.0
"""nanoGPT's tiny Shakespeare, a byte at a time: the recipe of its README for a CPU.

Source: karpathy/nanoGPT, README ("baby GPT on a CPU") and config/train_shakespeare_char.py
Command, for each program in turn (prepare_corpus, train_tokenizer, prepare_tokens, train,
generate):
  python -m gptjax.train --config=experiments/shakespeare_char.py:path=input.txt --workdir=runs/char
Without path= the text comes from TFDS (tiny_shakespeare; pip install 'gptjax[data]').
size=gpu is the larger recipe (6 layers, dropout, 5,000 steps).
Expected time: 2 minutes on 2 cores (size=cpu)
Expected number: at most 1.90 nats a character held out (nanoGPT: 1.88); size=gpu 1.47 on a GPU
"""

from collections.abc import Iterator

import ml_collections

from gptjax.configs import base, cli, errors, sizes
from gptjax.configs import sweep as sweep_lib

VARIANTS = ('', 'size=gpu')
# windows a batch, context, steps, dropout
_RECIPES = {'cpu': (12, 64, 2000, 0.0), 'gpu': (64, 256, 5000, 0.2)}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Arguments: path=<input.txt>, size=cpu|gpu."""
    arg = cli.parse_arg(arg, path='', size='cpu')
    errors.require_choice(arg, 'size', tuple(_RECIPES))
    windows, n_ctx, steps, dropout = _RECIPES[arg.size]
    config = base.get_config()
    config.corpus.update(set='tfds', path='tiny_shakespeare')
    if arg.path:
        config.corpus.update(set='files', path=arg.path)
    config.tokens.valid_fraction = 0.1  # of input.txt its last tenth, as nanoGPT; TFDS splits alike
    config.tokenizer.update(kind='bytes', n_vocab=257)
    config.model = sizes.model(
        'char_cpu' if arg.size == 'cpu' else 'char',
        n_ctx=n_ctx,
        n_vocab=257,
        attention_bias=False,
        mlp_bias=False,
        norm_bias=False,
        position_init_std=0.02,
        embed_dropout=dropout,
        attention_dropout=dropout,
        residual_dropout=dropout,
    )
    config.batch.batch_tokens = windows * n_ctx
    config.optim.update(peak_lr=1e-3, b2=0.99, warmup_tokens=100 * windows * n_ctx)
    config.train.update(total_tokens=steps * windows * n_ctx, eval_every_steps=250)
    config.evaluate.batch_windows = 64
    config.decode.update(max_new_tokens=n_ctx // 2, do_sample=True, temperature=0.8, top_k=0)
    return config.lock()


def sweep(arg: str | None = None) -> Iterator[sweep_lib.Overrides]:
    """Three learning rates by two seeds, of any argument."""
    del arg
    return sweep_lib.product(
        sweep_lib.values('optim.peak_lr', (5e-4, 1e-3, 2e-3)), sweep_lib.values('seed', range(2))
    )
