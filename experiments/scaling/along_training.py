# SPDX-License-Identifier: Apache-2.0
"""Fixed sizes along training: one stem a size at a constant rate, cool-downs that branch off it.

Approach 1 of Chinchilla with one long run a size in place of one for each length: a cool-down goes
on from a step of its stem with the whole state, and ends as a run of that length would have (wsd).
Source: Hoffmann et al. 2022, section 3.1; Hu et al. 2024 (MiniCPM), section 4.2, for wsd.
Command: python -m gptjax.scale run --config=experiments/scaling/along_training.py:path=<folder> \
    --workdir=runs/along, then collect, fit --approach=1 and plot with the same --workdir
Expected time: 10 minutes on 2 cores
Expected number: none in a paper at this size
"""

import ml_collections

from experiments.scaling import base
from gptjax.configs import cli
from gptjax.configs import sweep as sweep_lib

VARIANTS = ('',)
_SIZES = ((16, 2), (24, 2), (32, 2), (48, 2), (64, 3))
_STEPS = tuple(250 * 2**k for k in range(5))  # at which a cool-down ends
_COOLDOWN, _WARMUP = 0.2, 50  # share of a run; steps


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Arguments: path=<folder of text>."""
    config = base.get_config(f'path={cli.parse_arg(arg, path="").path}')
    return sweep_lib.apply(config, _run(64, 3, _STEPS[0]))


def sweep(arg: str | None = None) -> dict[str, sweep_lib.Overrides]:
    """A stem of each size, the longest of its runs, and a branch for each shorter one."""
    del arg
    found = {}
    for width, depth in _SIZES:
        stem = f'd={width}'
        found[stem] = _run(width, depth, _STEPS[-1])
        for steps in _STEPS[:-1]:
            begin = steps - round(_COOLDOWN * steps)
            branch = {'init_from': sweep_lib.Checkpoint(stem, begin)}
            found[f'{stem},steps={steps}'] = _run(width, depth, steps) | branch
    return found


def _run(width: int, depth: int, steps: int) -> sweep_lib.Overrides:
    return base.size(width, depth, tokens=steps * base.BATCH_TOKENS) | {
        'optim.schedule': 'wsd',
        'optim.warmup_tokens': _WARMUP * base.BATCH_TOKENS,
        'optim.cooldown_tokens': round(_COOLDOWN * steps) * base.BATCH_TOKENS,
    }
