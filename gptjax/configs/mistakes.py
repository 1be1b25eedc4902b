# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a command line, in one line, where absl and ml_collections say it in many."""

import difflib
import pathlib
from collections.abc import Iterable

import ml_collections
from absl import flags

from gptjax.configs import errors, upgrade


def explain(
    error: Exception,
    argv: list[str],
    values: flags.FlagValues,
    config: ml_collections.ConfigDict | None,
) -> str:
    """One line for an exception.

    Args:
      argv: the command line.
      values: the flags there are.
      config: what was loaded, as far as it was.
    """
    cause: BaseException | None = error
    told = ''
    while cause is not None:  # absl and ml_collections wrap what a config file raises
        told = str(cause) if isinstance(cause, errors.InputError) else told
        cause = cause.__cause__ or cause.__context__
    if told:
        return told
    if isinstance(error, flags.UnrecognizedFlagError):
        return f'unknown flag --{error.flagname}; {_flag_like(error.flagname, values, config)}'
    if isinstance(error, AttributeError | KeyError | TypeError) and config is not None:
        known = list(_fields(config))
        for field in overridden(argv):
            if field in upgrade.RENAMED:
                return f'--config.{field} is now --config.{upgrade.RENAMED[field][0]}.<label>'
            if field not in known:
                near = difflib.get_close_matches(field, known, n=1)
                hint = f'; did you mean --config.{near[0]}?' if near else ''
                return f'unknown field --config.{field}{hint}'
    if isinstance(error, flags.Error):
        return _first_line(error)
    return f'{type(error).__name__}: {_first_line(error)}{_where(error)}'


def _flag_like(
    name: str, values: flags.FlagValues, config: ml_collections.ConfigDict | None
) -> str:
    """What may have been meant by a flag: one there is, or a field of the config."""
    known = [] if config is None else list(_fields(config))
    asked = (name, name.removeprefix('no').removeprefix('config.'))
    found = [field for field in known if f'.{field}'.endswith(tuple(f'.{a}' for a in asked))]
    found = found or [field for field in known if field.endswith(f'_{name}')]
    leaves = {field.rpartition('.')[2]: field for field in reversed(known)}
    for each in asked:
        close = difflib.get_close_matches(each, leaves, n=1, cutoff=0.75)
        found = found or [leaves[leaf] for leaf in close]
    if found:
        return f'did you mean --config.{" or --config.".join(found[:3])}?'
    near = difflib.get_close_matches(name, list(values), n=1)
    return f'did you mean --{near[0]}?' if near else f'there are: --{", --".join(values)}'


def no_file(path: str) -> str:
    """The config file that may have been meant where one is not there, as the end of a sentence."""
    there = {str(file): file for file in pathlib.Path('experiments').rglob('*.py')}
    stems = {str(file.with_suffix('')): name for name, file in there.items()}
    stems |= {file.stem: name for name, file in there.items()} | {name: name for name in there}
    near = difflib.get_close_matches(path, stems, n=1, cutoff=0.7)
    return f'; did you mean {stems[near[0]]}?' if near else ''


def overridden(argv: Iterable[str]) -> list[str]:
    """The dotted fields that a command line overrides; --noconfig.x is config.x = False."""
    names = (arg.partition('=')[0].lstrip('-') for arg in argv if arg.startswith('-'))
    names = (name.removeprefix('no') if name.startswith('noconfig.') else name for name in names)
    return [name.removeprefix('config.') for name in names if name.startswith('config.')]


def _fields(config: ml_collections.ConfigDict, prefix: str = '') -> Iterable[str]:
    for key, value in config.items():
        yield prefix + key
        if isinstance(value, ml_collections.ConfigDict):
            yield from _fields(value, f'{prefix}{key}.')


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return ' '.join(text.splitlines()[0].split()) if text else type(error).__name__


def _where(error: Exception) -> str:
    """The config file's own line, when the error was raised in one."""
    frame, found = error.__traceback__, ''
    while frame is not None:
        path = frame.tb_frame.f_code.co_filename
        if (
            'site-packages' not in path
            and 'importlib' not in path
            and '/configs/cli.py' not in path
        ):
            found = f' (at {path}:{frame.tb_lineno})'
        frame = frame.tb_next
    return found
