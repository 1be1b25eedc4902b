# SPDX-License-Identifier: Apache-2.0
"""What a user did wrong, said in one line: what was got, what is allowed, what to do."""

import math
from collections.abc import Mapping
from typing import Any


class InputError(ValueError):
    """Bad input: a file, a corpus, a checkpoint. Programs print it as one line and exit with 1."""


class UsageError(InputError):
    """Bad flag or config value. Programs print it as one line and exit with 2."""


def both(name: str, there: object, here: object) -> str:
    """That a value differs; of an empty one that it is.

    >>> both('init_from', 'gpt2', '')
    "init_from = gpt2 there, '' here"
    """
    shown = ("''" if value == '' else value for value in (there, here))
    return '{} = {} there, {} here'.format(name, *shown)


def require(condition: bool, message: str) -> None:
    """Raises UsageError with `message` unless `condition` holds."""
    if not condition:
        raise UsageError(message)


def require_numbers(values: Mapping[str, Any], most: int) -> None:
    """Raises UsageError unless numbers, also in tuples, are finite, whole ones up to `most`."""
    for field, value in values.items():
        for x in value if isinstance(value, tuple) else (value,):
            if type(x) is int:
                require(abs(x) <= most, f'{field} must be from {-most} to {most}, got {x}')
            elif type(x) is float:
                require(math.isfinite(x), f'{field} must be finite, got {x}')


def require_positive(config: object, *fields: str) -> None:
    """Raises UsageError unless every named field of `config` is above zero."""
    for field in fields:
        value = getattr(config, field)
        require(value > 0, f'{field} must be above 0, got {value}')


def require_between(config: object, low: float | int, high: float | int, *fields: str) -> None:
    """Raises UsageError unless every named field of `config` lies in [low, high]."""
    for field in fields:
        value = getattr(config, field)
        require(low <= value <= high, f'{field} must be from {low} to {high}, got {value}')


def require_choice(config: object, field: str, choices: tuple[str | bool, ...]) -> None:
    """Raises UsageError unless the named field of `config` is one of `choices`."""
    value = getattr(config, field)
    names = ', '.join(c if c and isinstance(c, str) else repr(c) for c in choices)
    require(value in choices, f'{field} must be one of {names}; got {value!r}')
