# SPDX-License-Identifier: Apache-2.0
"""Options written as text: 'key=value,key=value', of config files and of plug-ins."""

import ast
import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from gptjax.configs import errors

T = TypeVar('T')


def parse(text: str, types: Mapping[str, type], what: str) -> dict[str, Any]:
    """Typed values of the keys that the text names.

    >>> parse('steps=3,rate=1', {'steps': int, 'rate': float, 'name': str}, 'argument')
    {'steps': 3, 'rate': 1.0}

    Args:
      types: of the keys there are: str, bool, int, float or tuple.
      what: the text is, for errors.

    Raises:
      UsageError: a part is not key=value, its key is unknown or named twice, or its value has
        another type.
    """
    found: dict[str, Any] = {}
    for part in filter(None, text.split(',')):
        key, equals, value = part.partition('=')
        if not equals or key not in types:
            keys = ', '.join(types) or 'none'
            last = list(found)[-1:] if not equals else []
            hint = ''.join(f'; a comma ends {key}: join values by +, {key}=a+b' for key in last)
            raise errors.UsageError(f'{what} {part!r} is not key=value with a key of: {keys}{hint}')
        errors.require(key not in found, f'{what} names {key!r} twice')
        found[key] = _typed(key, value, types[key], what)
    return found


def build(owner: type[T], text: str, name: str, **given: Any) -> T:
    """The dataclass of options that are written behind a name, one for each of its fields.

    >>> Options = dataclasses.make_dataclass('Options', [('rate', float), ('steps', int)])
    >>> build(Options, 'rate=1', 'decay', steps=3)
    Options(rate=1.0, steps=3)

    Args:
      text: 'option=value,...'.
      name: whose options they are, for errors.
      given: values of fields that the text may leave out.

    Raises:
      UsageError: an option is unknown, missing or of another type.
    """
    hints = typing.get_type_hints(owner)
    types = {field.name: hints[field.name] for field in dataclasses.fields(owner)}
    found = given | parse(text, types, f'{name!r}: option')
    missing = [f'{key}=<{types[key].__name__}>' for key in types if key not in found]
    if missing:
        whole = ','.join([*(f'{key}={value}' for key, value in found.items()), *missing])
        raise errors.UsageError(f'{name!r} wants options: {name}:{whole}')
    return owner(**found)


def _typed(key: str, text: str, kind: type, what: str) -> Any:
    if kind is str:
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise errors.UsageError(f'{what} {key}={text!r} must be a {kind.__name__}')
    return value
