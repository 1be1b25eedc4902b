# SPDX-License-Identifier: Apache-2.0
"""Sweeps as lists of overrides: dicts from dotted field to value, combined like sets."""

import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import ml_collections

from gptjax.configs import errors

Overrides = dict[str, Any]


def product(*sweeps: Iterable[Overrides]) -> Iterator[Overrides]:
    """Every combination of one point from each sweep; later sweeps win over earlier ones.

    >>> list(product([{'seed': 0}, {'seed': 1}], [{'optim.peak_lr': 1e-3}]))
    [{'seed': 0, 'optim.peak_lr': 0.001}, {'seed': 1, 'optim.peak_lr': 0.001}]
    """
    for points in itertools.product(*sweeps):
        yield {key: value for point in points for key, value in point.items()}


def zipped(*sweeps: Iterable[Overrides]) -> Iterator[Overrides]:
    """Point i of every sweep, merged. Raises ValueError when the sweeps differ in length."""
    for points in zip(*sweeps, strict=True):
        yield {key: value for point in points for key, value in point.items()}


def chain(*sweeps: Iterable[Overrides]) -> Iterator[Overrides]:
    """One sweep after another."""
    return itertools.chain(*sweeps)


def values(field: str, options: Iterable[Any]) -> Iterator[Overrides]:
    """One field over several values.

    >>> list(values('seed', range(2)))
    [{'seed': 0}, {'seed': 1}]
    """
    for option in options:
        yield {field: option}


def apply(config: ml_collections.ConfigDict, point: Overrides) -> ml_collections.ConfigDict:
    """A locked copy of `config` with the overrides of one point.

    Raises:
      UsageError: there is no such field.
    """
    changed = config.copy_and_resolve_references()
    for field, value in point.items():
        *sections, leaf = field.split('.')
        node = functools.reduce(_section, sections, changed)
        errors.require(leaf in node, f'a sweep names the field {field!r}, which does not exist')
        node[leaf] = value
    return changed.lock()


def name(point: Overrides) -> str:
    """A stable run name: the last words of the fields, sorted, with their values.

    >>> name({'optim.peak_lr': 1e-3, 'seed': 1})
    'peak_lr=0.001,seed=1'
    """
    parts = sorted((key.rsplit('.', 1)[-1], value) for key, value in point.items())
    return ','.join(f'{key}={value}' for key, value in parts)


def _section(node: Any, name: str) -> Any:
    return node[name] if name in node else {}  # noqa: SIM401 - .get forgives typing errors
