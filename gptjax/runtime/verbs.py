# SPDX-License-Identifier: Apache-2.0
"""Programs that do several things, each with flags of its own: python -m gptjax.X VERB --flags."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from absl import flags

from gptjax.configs import cli
from gptjax.runtime import program, streams


class Verb(NamedTuple):
    """One thing that a program does.

    Attributes:
      main: does it; the first line of its docstring is its help.
      define: adds its own flags.
      reads: sections and top-level fields of the config that it reads.
      default_config: as of program.run().
      needs_workdir: whether --workdir must be given.
    """

    main: Callable[[cli.Args], None]
    define: Callable[[flags.FlagValues], None] = lambda values: None
    reads: Sequence[str] = ()
    default_config: str = ''
    needs_workdir: bool = True


def run(verbs: Mapping[str, Verb], doc: str) -> None:
    """Runs the verb that the command line names; programs of this kind do not use JAX's devices."""
    name = sys.argv[1] if len(sys.argv) > 1 else ''
    if name not in verbs:
        if name in ('--help', '-h', '-help', 'help'):
            print(f'{doc.strip()}\n\n{_listed(verbs)}\n\nEach tells its flags by --help.')
            sys.exit(0)
        said = f'no {name!r} here' if name and name[0] != '-' else 'say what to do'
        streams.say(f'error: {said}: one of {", ".join(verbs)}, before all flags')
        sys.exit(program.WRONG_USAGE)
    del sys.argv[1]
    verb = verbs[name]
    program.run(
        verb.main,
        verb.main.__doc__ or '',
        verb.reads,
        verb.define,
        verb.default_config,
        uses_jax=False,
        needs_workdir=verb.needs_workdir,
    )


def _listed(verbs: Mapping[str, Verb]) -> str:
    width = max(map(len, verbs)) + 2
    lines = ((name, (verb.main.__doc__ or '').splitlines()[0]) for name, verb in verbs.items())
    return '\n'.join(f'  {name.ljust(width)}{line}' for name, line in lines)
