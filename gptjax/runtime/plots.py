# SPDX-License-Identifier: Apache-2.0
"""The few pictures that programs draw."""

import pathlib

from gptjax.runtime import metrics

# Colour-blind safe (Okabe and Ito 2008).
_BLUE, _ORANGE = '#0072B2', '#D55E00'


def loss_curve(workdir: pathlib.Path, eval_name: str, path: pathlib.Path) -> None:
    """Training loss and held-out bits per byte against tokens, as a PNG.

    Args:
      eval_name: the metric of the held-out curve, as eval/tokens/bits_per_byte.
    """
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    rows = metrics.read(workdir)
    train = [(row['tokens'], row['train/loss']) for row in rows if 'train/loss' in row]
    held_out = [(row['tokens'], row[eval_name]) for row in rows if eval_name in row]
    figure, axis = plt.subplots(figsize=(7, 4), layout='constrained')
    axis.plot(*zip(*train, strict=True), color=_BLUE, linewidth=1)
    axis.set_xlabel('training tokens')
    axis.set_ylabel('training loss, nats per token', color=_BLUE)
    axis.grid(alpha=0.3)
    axis.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter())
    if held_out:
        other = axis.twinx()
        other.plot(*zip(*held_out, strict=True), color=_ORANGE, marker='o', markersize=3)
        other.set_ylabel('held-out bits per byte', color=_ORANGE)
    figure.savefig(path, dpi=130)
    plt.close(figure)
