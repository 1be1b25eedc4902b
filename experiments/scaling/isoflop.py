# SPDX-License-Identifier: Apache-2.0
"""IsoFLOP profiles of tiny GPTs: at each budget five sizes, each as long as the budget allows.

Source: Hoffmann et al. 2022 (Chinchilla), section 3.2, approach 2, on a smaller scale.
Command: python -m gptjax.scale run --config=experiments/scaling/isoflop.py:path=<folder of text> \
    --workdir=runs/isoflop, then collect, fit and plot with the same --workdir; docs/scaling.md
Without path= the text is Python's own documentation, which the longer points read several times.
d_model=,n_layers=,flops= give one run of any size and budget, as one that was predicted.
Expected time: 45 minutes on 2 cores
Expected number: see the results table in README.md
"""

import ml_collections

from experiments.scaling import base
from gptjax.configs import cli
from gptjax.configs import sweep as sweep_lib

VARIANTS = ('', 'd_model=48,n_layers=2,flops=1e12')
_BUDGETS = (4.5e11, 1.35e12, 4.05e12, 1.215e13)
# Each budget's five sizes are those of the ladder from its own place on.
_LADDER = ((16, 2), (24, 2), (32, 2), (48, 2), (64, 3), (80, 4), (112, 4), (144, 5))
_SIZES = 5


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Arguments: path=<folder of text>, d_model=, n_layers=, flops=."""
    arg = cli.parse_arg(arg, path='', d_model=64, n_layers=3, flops=1e12)
    config = base.get_config(f'path={arg.path}' if arg.path else None)
    return sweep_lib.apply(config, base.size(arg.d_model, arg.n_layers, flops=arg.flops))


def sweep(arg: str | None = None) -> dict[str, sweep_lib.Overrides]:
    """The profiles by name, of any argument."""
    del arg
    return {
        f'c={budget:g},d={width}': base.size(width, depth, flops=budget)
        for place, budget in enumerate(_BUDGETS)
        for width, depth in _LADDER[place : place + _SIZES]
    }
