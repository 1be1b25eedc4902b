# SPDX-License-Identifier: Apache-2.0
"""What the tables of published families are written with."""

from collections.abc import Mapping

from gptjax.configs import errors
from gptjax.models.published import layout
from gptjax.models.published.layout import Tensor

ATTENTION = 'block_0/attention'
ACTIVATIONS = {
    'gelu_new': 'gelu_tanh',
    'gelu_pytorch_tanh': 'gelu_tanh',
    'gelu': 'gelu',
    'relu': 'relu',
    'silu': 'silu',
    'swish': 'silu',
}


def linear(name: str, path: str, pattern: str, rotated: bool = False) -> tuple[Tensor, Tensor]:
    """Kernel and bias of a linear layer; the bias has our last axes, flattened there."""
    left, right = pattern.split(' -> ')
    new = next(group for group in layout.groups(left) if group.split()[-1] == right.split()[-1])
    flat = f'({new})' if ' ' in new else new
    return (
        Tensor(f'{name}.weight', (f'{path}/kernel',), pattern, rotated),
        Tensor(f'{name}.bias', (f'{path}/bias',), f'{flat} -> {new}', rotated),
    )


def norm(name: str, path: str) -> tuple[Tensor, Tensor]:
    """Gain and bias of a norm."""
    return (
        Tensor(f'{name}.weight', (f'{path}/scale',), 'D -> D'),
        Tensor(f'{name}.bias', (f'{path}/bias',), 'D -> D'),
    )


def activation(name: str, table: Mapping[str, str]) -> str:
    """Our name of a published activation. Raises InputError where we have none."""
    if name not in table:
        raise errors.InputError(
            f'no activation {name!r} here; there are: {", ".join(sorted(set(table)))}'
        )
    return table[name]


def activation_name(ours: str, table: Mapping[str, str]) -> str:
    """How a family calls one of our activations. Raises InputError where it knows none."""
    return activation(ours, {name: theirs for theirs, name in reversed(table.items())})
