# SPDX-License-Identifier: Apache-2.0
"""Learning rates by width, with muP (mup=1) and without: with it the best rate stays.

Source: Yang et al. 2022 (Tensor Programs V), figure 1.
Command: python -m gptjax.scale run --config=experiments/scaling/lr_transfer.py:mup=1,path=<text> \
    --workdir=runs/lr_mup, then collect; the same with mup=0 in another --workdir
Expected time: 12 minutes on 2 cores, each
Expected number: the best rate is the same at all widths with mup=1, and falls without
"""

import itertools
from typing import Any

import ml_collections

from experiments.scaling import base
from gptjax.configs import cli
from gptjax.configs import sweep as sweep_lib

VARIANTS = ('', 'mup=1')
_WIDTHS = (32, 64, 128)
_RATES = tuple(1e-3 * 2**k for k in range(6))
_DEPTH, _TOKENS = 2, 1_000_000


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Arguments: path=<folder of text>, mup=0|1."""
    arg = _parsed(arg)
    config = base.get_config(f'path={arg.path}')
    return sweep_lib.apply(config, _run(64, _RATES[0], arg.mup))


def sweep(arg: str | None = None) -> dict[str, sweep_lib.Overrides]:
    """Three widths by six rates."""
    mup = _parsed(arg).mup
    return {
        f'd={width},lr={rate:g}': _run(width, rate, mup)
        for width, rate in itertools.product(_WIDTHS, _RATES)
    }


def _run(width: int, rate: float, mup: int) -> sweep_lib.Overrides:
    found = base.size(width, _DEPTH, tokens=_TOKENS)
    scaled = {'model.mup_base_width': _WIDTHS[0]} if mup else {}
    return found | scaled | {'optim.peak_lr': rate}


def _parsed(arg: str | None) -> Any:
    return cli.parse_arg(arg, path='', mup=0)
