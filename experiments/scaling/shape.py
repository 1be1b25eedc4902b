# SPDX-License-Identifier: Apache-2.0
"""Shape at a fixed N: depth against width, and heads against their width.

Source: Kaplan et al. 2020, section 3.1 and figure 5: within a wide range the shape hardly matters.
Command: python -m gptjax.scale run --config=experiments/scaling/shape.py:path=<folder of text> \
    --workdir=runs/shape, then collect and plot with the same --workdir
Expected time: 12 minutes on 2 cores
Expected number: losses within a few percent, as in figure 5
"""

import ml_collections

from experiments.scaling import base
from gptjax.configs import cli
from gptjax.configs import sweep as sweep_lib

VARIANTS = ('',)
# About 150,000 parameters without embeddings: width, layers, width of a head.
_SHAPES = (
    (112, 1, 16),
    (80, 2, 16),
    (64, 3, 16),
    (56, 4, 8),
    (40, 8, 8),
    (64, 3, 4),
    (64, 3, 8),
    (64, 3, 32),
    (64, 3, 64),
)
_TOKENS = 2_000_000


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Arguments: path=<folder of text>."""
    return base.get_config(f'path={cli.parse_arg(arg, path="").path}')


def sweep(arg: str | None = None) -> dict[str, sweep_lib.Overrides]:
    """Every shape, of any argument."""
    del arg
    return {
        f'd={width},layers={depth},heads={width // head}': base.size(width, depth, tokens=_TOKENS)
        | {'model.n_heads': width // head, 'model.d_head': head}
        for width, depth, head in _SHAPES
    }
