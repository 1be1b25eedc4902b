# SPDX-License-Identifier: Apache-2.0
"""Module name -> module: the only place where a config's string becomes code."""

import importlib
import pkgutil
import types

from gptjax.configs import errors


def module(package: str, name: str) -> types.ModuleType:
    """The module `name` of `package` ('gptjax.data.sets', 'stdlib').

    Raises:
      UsageError: there is no such module; the message lists those there are.
    """
    parent = importlib.import_module(package)
    names = sorted(m.name for m in pkgutil.iter_modules(parent.__path__) if not m.ispkg)
    if name not in names:
        raise errors.UsageError(f'no {name!r} in {package}; there are: {", ".join(names)}')
    return importlib.import_module(f'{package}.{name}')
