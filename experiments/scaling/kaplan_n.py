# SPDX-License-Identifier: Apache-2.0
"""L(N): sizes over two orders of magnitude, all trained on the same tokens, as many as there are.

Source: Kaplan et al. 2020, section 3.2 and figure 6; N without embeddings.
Command: python -m gptjax.scale run --config=experiments/scaling/kaplan_n.py:path=<folder of text> \
    --workdir=runs/kaplan_n, then collect, fit --approach=n and plot with the same --workdir
Expected time: an hour on 2 cores; tokens=1e6 takes a tenth
Expected number: Kaplan's exponent is 0.076, of models a thousand times as large
"""

import ml_collections

from experiments.scaling import base
from gptjax.configs import cli
from gptjax.configs import sweep as sweep_lib

VARIANTS = ('', 'tokens=1e6')
LADDER = ((16, 2), (24, 2), (32, 2), (48, 2), (64, 3), (80, 4), (112, 4), (144, 5))


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Arguments: path=<folder of text>, tokens=."""
    arg = cli.parse_arg(arg, path='', tokens=1e7)
    return base.get_config(f'path={arg.path}')


def sweep(arg: str | None = None) -> dict[str, sweep_lib.Overrides]:
    """Every size of the ladder."""
    tokens = cli.parse_arg(arg, path='', tokens=1e7).tokens
    return {f'd={width}': base.size(width, depth, tokens=tokens) for width, depth in LADDER}
