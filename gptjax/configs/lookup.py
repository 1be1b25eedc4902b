# SPDX-License-Identifier: Apache-2.0
"""Module name -> module: the only place where a config's string becomes code."""

import importlib
import pkgutil
import types
from typing import Any

from gptjax.configs import errors, spec

# What the modules of a package have, each of them.
WANTED = {
    'gptjax.data.sets': ('documents_of', 'identity'),
    'gptjax.evals.held_out': ('NAMES', 'make'),
    'gptjax.evals.tasks': ('TASKS',),
    'gptjax.models.mlps': ('apply',),
    'gptjax.training.objectives': ('make',),
    'gptjax.training.optimizers': ('make',),
}


def names(package: str) -> list[str]:
    """The modules of `package`, sorted."""
    parent = importlib.import_module(package)
    return sorted(m.name for m in pkgutil.iter_modules(parent.__path__) if not m.ispkg)


def module(package: str, name: str) -> types.ModuleType:
    """The module `name` of `package` ('gptjax.data.sets', 'stdlib').

    Raises:
      UsageError: there is no such module, and the message lists those there are; or it lacks what
        those of its package have.
    """
    known = names(package)
    if name not in known:
        raise errors.UsageError(f'no {name!r} in {package}; there are: {", ".join(known)}')
    found = importlib.import_module(f'{package}.{name}')
    wanted = WANTED.get(package, ())
    lacking = [each for each in wanted if not hasattr(found, each)]
    errors.require(
        not lacking,
        f'{found.__file__} has no {" and no ".join(lacking)}; it needs {" and ".join(wanted)}, as '
        f'{known[0] if name != known[0] else known[-1]}.py beside it',
    )
    return found


def plug_in(package: str, written: str) -> tuple[types.ModuleType, Any]:
    """What a config writes as NAME or NAME:option=value,... -> (module, its options).

    Args:
      written: an option for every field of the module's dataclass `Options`, none where it has no
        such class: no default hides in code.

    Returns:
      the module, and its Options; None where it has none.

    Raises:
      UsageError: there is no such module, or an option is unknown, missing or of another type.
    """
    name, _, text = written.partition(':')
    found = module(package, name)
    owner = getattr(found, 'Options', None)
    if owner is None:
        spec.parse(text, {}, f'{name!r}: option')
        return found, None
    return found, spec.build(owner, text, name)
