# SPDX-License-Identifier: Apache-2.0
"""The run-time type checker that jaxtyping applies to the package in tests."""

from collections.abc import Callable

import beartype

_check = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))  # an int is a float


def check(function: Callable) -> Callable:
    """beartype, but for Config dataclasses: these answer for their own fields, in one line."""
    if function.__qualname__ == 'Config.__init__':
        return function
    return _check(function)
