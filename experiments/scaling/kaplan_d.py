# SPDX-License-Identifier: Apache-2.0
"""L(D): one size, large for its tokens, on ever more of them, each run with a schedule of its own.

Source: Kaplan et al. 2020, section 3.3 (they stop early on small sets; here no token comes twice).
Command: python -m gptjax.scale run --config=experiments/scaling/kaplan_d.py:path=<folder of text> \
    --workdir=runs/kaplan_d, then collect, fit --approach=d and plot with the same --workdir
Expected time: 25 minutes on 2 cores; d_model=32,n_layers=2 takes 3
Expected number: Kaplan's exponent is 0.095, of models a thousand times as large
"""

from typing import Any

import ml_collections

from experiments.scaling import base
from gptjax.configs import cli
from gptjax.configs import sweep as sweep_lib

VARIANTS = ('', 'd_model=32,n_layers=2')
_TOKENS = tuple(250_000 * 2**k for k in range(6))


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Arguments: path=<folder of text>, d_model=, n_layers=."""
    arg = _parsed(arg)
    config = base.get_config(f'path={arg.path}')
    return sweep_lib.apply(config, base.size(arg.d_model, arg.n_layers, tokens=_TOKENS[0]))


def sweep(arg: str | None = None) -> dict[str, sweep_lib.Overrides]:
    """The size on 0.25 to 8 million tokens."""
    arg = _parsed(arg)
    return {f'D={d}': base.size(arg.d_model, arg.n_layers, tokens=d) for d in _TOKENS}


def _parsed(arg: str | None) -> Any:
    return cli.parse_arg(arg, path='', d_model=112, n_layers=4)
