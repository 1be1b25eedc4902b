# SPDX-License-Identifier: Apache-2.0
"""Batch size: the same tokens in batches of 256 to 16,384, and what the noise scale says of each.

Source: McCandlish et al. 2018, section 2; Kaplan et al. 2020, section 5.1: 2e8 / L^(1/0.21)
Command: python -m gptjax.scale run --config=experiments/scaling/batch_size.py:path=<folder> \
    --workdir=runs/batch, then collect (noise_scale_tokens), fit --approach=batch and plot
Expected time: 6 minutes on 2 cores
Expected number: losses are alike up to about the noise scale, and rise beyond it
"""

import ml_collections

from experiments.scaling import base
from gptjax.configs import cli
from gptjax.configs import sweep as sweep_lib

VARIANTS = ('',)
_BATCHES = tuple(256 * 2**k for k in range(7))
_TOKENS = 2_097_152
_PIECES = 2  # microbatches, at least, whose gradients are compared


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Arguments: path=<folder of text>."""
    config = base.get_config(f'path={cli.parse_arg(arg, path="").path}')
    return sweep_lib.apply(config, _run(base.BATCH_TOKENS))


def sweep(arg: str | None = None) -> dict[str, sweep_lib.Overrides]:
    """One size, whose rate rises with the root of the batch up to its usual one."""
    del arg
    return {f'B={batch}': _run(batch) for batch in _BATCHES}


def _run(batch: int) -> sweep_lib.Overrides:
    windows = batch // base.N_CTX
    return base.size(48, 2, tokens=_TOKENS) | {
        'batch.batch_tokens': batch,
        'batch.device_windows': max(1, windows // _PIECES),
        'train.noise_scale': True,
        'optim.peak_lr': base.rate(48) * min(1.0, (batch / base.BATCH_TOKENS) ** 0.5),
        'optim.warmup_tokens': round(0.1 * _TOKENS / batch) * batch,
    }
