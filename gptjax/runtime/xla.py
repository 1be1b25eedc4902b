# SPDX-License-Identifier: Apache-2.0
"""Options of XLA's compilers, by platform: set before JAX starts, unless the user has set them.

One stands here only where a compiled step was seen to be better with it (LOG.md has what was tried);
each names where it is documented.
"""

import importlib.util
from collections.abc import MutableMapping
from typing import NamedTuple


class Option(NamedTuple):
    """platform: tpu. source: who documents or uses it."""

    platform: str
    name: str
    value: str
    why: str
    source: str


OPTIONS: tuple[Option, ...] = ()
# platform -> the variable that its compiler reads, and a package that is there where it can be used
_READ_BY = {'tpu': ('LIBTPU_INIT_ARGS', 'libtpu')}


def apply(environ: MutableMapping[str, str]) -> None:
    """Adds the options to the environment; what the user gives there stays as it is."""
    for option in OPTIONS:
        variable, package = _READ_BY[option.platform]
        given = environ.get(variable, '')
        names = {word.lstrip('-').partition('=')[0] for word in given.split()}
        if option.name not in names and importlib.util.find_spec(package):
            environ[variable] = f'{given} --{option.name}={option.value}'.strip()
