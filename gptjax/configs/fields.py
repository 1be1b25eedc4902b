# SPDX-License-Identifier: Apache-2.0
"""What a config's fields are: a value, what it means, and whether it makes a run what it is."""

import dataclasses
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import ml_collections

from gptjax.configs import errors

_MOST = 2**60  # of whole numbers; sums and products of two still fit int64, or nearly
ALWAYS = object()  # stands for "the field has been there from the beginning"
T = TypeVar('T')


@dataclasses.dataclass(frozen=True)
class Field:
    """One field.

    Attributes:
      default: its value in the base config.
      meaning: in one line, with its unit; what --help shows.
      makes_run: whether two runs that differ in it are two runs, so that none goes on as the other.
      was: the value in effect before the field existed, for configs that were written then.
    """

    default: Any
    meaning: str
    makes_run: bool
    was: Any = ALWAYS


Section = Mapping[str, Field]
Values = Mapping[str, Any] | ml_collections.ConfigDict  # of a section


def fixed(default: Any, meaning: str, was: Any = ALWAYS) -> Field:
    """A field that makes a run what it is: a run that goes on has the value it began with."""
    return Field(default, meaning, True, was)


def free(default: Any, meaning: str, was: Any = ALWAYS) -> Field:
    """A field that may change whenever a run goes on."""
    return Field(default, meaning, False, was)


def values(section: Section) -> ml_collections.ConfigDict:
    """A section of the config: the defaults."""
    return ml_collections.ConfigDict({name: field.default for name, field in section.items()})


def build(owner: type[T], section: Values, name: str) -> T:
    """The owner's dataclass of a section of the config.

    Args:
      name: of the section, as 'optim'.

    Raises:
      UsageError: a field is unknown, missing, of another type, or out of its range.
    """
    check(section, (field.name for field in dataclasses.fields(owner)), f'the {name} section')
    return make(owner, section, name)


def make(owner: type[T], values: Values, name: str) -> T:
    """The owner's dataclass of values for all its fields; as build().

    Raises:
      UsageError: a field is of another type, or out of its range; the message names the section.
    """
    hints = typing.get_type_hints(owner)
    for field, value in values.items():
        kind, *rest = typing.get_args(hints[field]) or (None,)
        allowed = (float, int) if kind is float else (kind,)
        known = rest == [...] and kind in (int, float, str)
        if known and not all(type(x) in allowed for x in value):
            raise errors.UsageError(f'{name}.{field} = {value!r} must hold {kind.__name__} values')
    try:
        errors.require_numbers(dict(values.items()), _MOST)
        return owner(**values)
    except errors.UsageError as e:
        said = str(e)
        raise errors.UsageError(f'{name}.{said}' if said.split()[0] in hints else said) from e


def check(section: Values, known: Iterable[str], what: str) -> None:
    """Raises UsageError unless `section` has exactly the known fields."""
    known = set(known)
    for name in sorted(known ^ set(section)):
        said = 'lacks' if name in known else 'has the unknown field'
        raise errors.UsageError(f'{what} {said} {name!r}')
