# SPDX-License-Identifier: Apache-2.0
"""What --help of a program says: its docstring, its flags, and every config field that it reads."""

from collections.abc import Iterable

import ml_collections
from absl import flags

from gptjax.configs import base

_WIDTH = 30  # of names, and of names with their values


def text(
    doc: str,
    values: flags.FlagValues,
    config: ml_collections.ConfigDict,
    reads: Iterable[str],
) -> str:
    """The whole help.

    Args:
      doc: the program's docstring.
      values: its flags.
      config: whose values are shown.
      reads: sections and top-level fields of the config that the program reads.
    """
    lines = [doc.strip(), '', 'Flags:']
    lines.append('  --config'.ljust(_WIDTH) + ' FILE or FILE:key=value,...: the experiment.')
    for name in values:
        flag = values[name]
        default = '' if flag.value in (None, [], '') else f' ({flag.value})'
        lines.append(f'  --{name}'.ljust(_WIDTH) + f' {flag.help}{default}')
    fields = list(_fields(config, reads))
    if fields:
        lines += [
            '',
            'Config, with the values of this config file; * makes a run what it is, the '
            'others may change when it goes on:',
        ]
        lines += fields
    return '\n'.join(lines)


def _fields(config: ml_collections.ConfigDict, reads: Iterable[str]) -> Iterable[str]:
    for name in reads:
        if name in base.TOP:
            yield _line(name, config[name])
            continue
        family = config.model.family if name == 'model' else 'gpt'
        for leaf, value in config[name].items():
            yield _line(f'{name}.{leaf}', value, family)


def _line(path: str, value: object, family: str = 'gpt') -> str:
    field = base.field_of(path, family)
    if isinstance(value, ml_collections.ConfigDict):
        value = value.to_dict()
    mark = '*' if field and field.makes_run else ' '
    said = f'{mark} --config.{path}={value!r}'
    return f'{said.ljust(_WIDTH + 12)}  {field.meaning if field else "unknown here"}'
