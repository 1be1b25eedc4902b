# SPDX-License-Identifier: Apache-2.0
"""Module name -> module: the only place where a config's string becomes code."""

import importlib
import pkgutil
import types

from gptjax.configs import errors


def names(package: str) -> list[str]:
    """The modules of `package`, sorted."""
    parent = importlib.import_module(package)
    return sorted(m.name for m in pkgutil.iter_modules(parent.__path__) if not m.ispkg)


def module(package: str, name: str) -> types.ModuleType:
    """The module `name` of `package` ('gptjax.data.sets', 'stdlib').

    Raises:
      UsageError: there is no such module; the message lists those there are.
    """
    known = names(package)
    if name not in known:
        raise errors.UsageError(f'no {name!r} in {package}; there are: {", ".join(known)}')
    return importlib.import_module(f'{package}.{name}')
