# SPDX-License-Identifier: Apache-2.0
"""N x D: every size on every number of tokens, for the joint laws of Kaplan and of Hoffmann.

Source: Kaplan et al. 2020, section 4 and figure 4; Hoffmann et al. 2022, section 3.3, approach 3.
Command: python -m gptjax.scale run --config=experiments/scaling/grid.py:path=<folder of text> \
    --workdir=runs/grid, then collect, fit --approach=3, fit --approach=kaplan and plot
Expected time: 30 minutes on 2 cores
Expected number: none in a paper at this size; the two laws fit about equally well
"""

import itertools

import ml_collections

from experiments.scaling import base
from gptjax.configs import cli
from gptjax.configs import sweep as sweep_lib

VARIANTS = ('',)
_SIZES = ((16, 2), (32, 2), (48, 2), (64, 3), (80, 4))
_TOKENS = tuple(500_000 * 2**k for k in range(5))


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Arguments: path=<folder of text>."""
    return base.get_config(f'path={cli.parse_arg(arg, path="").path}')


def sweep(arg: str | None = None) -> dict[str, sweep_lib.Overrides]:
    """Five sizes by five lengths, of any argument."""
    del arg
    return {
        f'd={width},D={tokens}': base.size(width, depth, tokens=tokens)
        for (width, depth), tokens in itertools.product(_SIZES, _TOKENS)
    }
