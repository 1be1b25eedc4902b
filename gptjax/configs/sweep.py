# SPDX-License-Identifier: Apache-2.0
"""Sweeps as lists of overrides: dicts from dotted field to value, combined like sets.

The sweep(arg) of a config file gives them, or a dict of them by the names of the points.
"""

import dataclasses
import functools
import itertools
import re
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import ml_collections

from gptjax.configs import errors

Overrides = dict[str, Any]
_NAME = re.compile(r'[\w.=,+-]{1,120}')  # of a folder, anywhere


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """As the value of init_from: the state at a step of another point, which is run first."""

    point: str
    step: int


def points(module: types.ModuleType, path: str, arg: str | None) -> dict[str, Overrides]:
    """The points of a config file's sweep by name, in its order.

    Args:
      module: of the config file at `path`.
      arg: its argument, FILE:arg; None = none.

    Raises:
      UsageError: it has no sweep, or two points have one name, or a name is none of a folder, or a
        point begins with another that there is not, or with one that begins with it.
    """
    errors.require(
        callable(getattr(module, 'sweep', None)),
        f'{path} has no sweep(); experiments/scaling/isoflop.py shows one',
    )
    given = module.sweep(arg) if arg is not None else module.sweep()
    if not isinstance(given, Mapping):
        listed = list(given)
        given = {name(point): point for point in listed}
        errors.require(
            len(given) == len(listed),
            f'two points of the sweep in {path} are the same, or differ in a field that their '
            'names do not tell; give a dict of points by name',
        )
    errors.require(bool(given), f'the sweep in {path} has no points')
    for each in given:
        errors.require(
            bool(_NAME.fullmatch(each)) and not each.startswith('.'),
            f'{each!r} is no name of a point: letters, digits, and any of . = , + - _, to 120',
        )
    found = dict(given)
    for each in found:
        _check_origin(each, found)
    return found


def origin(point: Overrides) -> Checkpoint | None:
    """What a point begins with, where it is another point's."""
    value = point.get('init_from')
    return value if isinstance(value, Checkpoint) else None


def _check_origin(start: str, known: Mapping[str, Overrides]) -> None:
    at, passed = start, {start}
    while began := origin(known[at]):
        errors.require(
            began.point in known,
            f'the point {at} begins with {began.point}, which is no point of the sweep',
        )
        errors.require(began.point not in passed, f'the point {start} begins with itself')
        at = began.point
        passed.add(at)


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
      UsageError: there is no such field, or its values are of another type.
    """
    changed = config.copy_and_resolve_references()
    for field, value in point.items():
        *sections, leaf = field.split('.')
        node = functools.reduce(_section, sections, changed)
        errors.require(leaf in node, f'a sweep names the field {field!r}, which does not exist')
        try:
            node[leaf] = value
        except TypeError as e:
            kind = type(node[leaf]).__name__
            said = f'a sweep sets {field} = {value!r}, which must be of type {kind}'
            raise errors.UsageError(said) from e
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
