# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a command line, in one line, where absl and ml_collections say it in many."""

import difflib
import os
import pathlib
import stat
import sysconfig
from collections.abc import Iterable

import ml_collections
from absl import flags

from gptjax.configs import base, errors, fields, upgrade

_LIBRARY = sysconfig.get_path('stdlib')
_MOST_BYTES = 2**24  # of a config file
_PACKAGE = pathlib.Path(__file__).parents[1]


def explain(
    error: Exception,
    argv: list[str],
    values: flags.FlagValues,
    named: str,
    config: ml_collections.ConfigDict | None,
) -> str:
    """One line for an exception.

    Args:
      argv: the command line.
      values: the flags there are.
      named: what --config names.
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
    said = _of_tree(error) or f'{type(error).__name__}: {_all_lines(error)}'.rstrip(': ')
    where = _where(error)
    return f'{named}: {said}' if config is None and not where else said + where


def in_tree(config: ml_collections.ConfigDict) -> str:
    """What makes a config another tree than ours, the first of it; '' = nothing does."""
    for name in (*base.TOP, *base.SECTIONS):
        if name not in config:
            return f'the config lacks {name}; start from gptjax.configs.base.get_config()'
        if name in base.SECTIONS and not isinstance(config[name], ml_collections.ConfigDict):
            return f'{name} = {config[name]!r} must be a section'
    family = config.model.family if 'family' in config.model else ''
    family = family if family in base.models.FAMILIES else 'gpt'
    for path in _fields(config):
        section, _, leaf = path.rpartition('.')
        if path in base.SECTIONS:
            continue
        field = base.field_of(path, family)
        if field is None:
            return _no_field(section, leaf, config[section] if section else config)
        value = (config[section] if section else config)[leaf]
        if f'{section}.{leaf}' != base.LABELS and section != base.LABELS:
            kinds = _KINDS.get(type(field.default), (type(field.default),))
            if type(value) not in (*kinds, *((float,) if leaf.endswith('_epochs') else ())):
                return f'{path} = {value!r} must be a {kinds[0].__name__}'
    return ''


# A default's type -> those of values in its place, the first of them what it is called.
_KINDS = {float: (float, int), tuple: (tuple, list), bool: (bool, str)}


def _of_tree(error: BaseException) -> str:
    """What a config file did to the tree that it must not, where that is the mistake; else ''."""
    while error.__context__ is not None and not error.__suppress_context__:
        error = error.__context__  # ml_collections makes an AttributeError of a KeyError
    frame = error.__traceback__
    while frame.tb_next is not None:
        frame = frame.tb_next
    found = frame.tb_frame.f_locals
    node, key = found.get('self'), found.get('key')
    if not isinstance(node, ml_collections.ConfigDict) or not isinstance(key, str):
        return ''
    kinds = {'': {**base.TOP, **base.SECTIONS}, **base.SECTIONS}
    section = max(kinds, key=lambda name: len(kinds[name].keys() & set(node)))
    if key not in node:
        return _no_field(section, key, node)
    said = f'{section}.{key}'.lstrip('.')
    return f'{said} = {found.get("value")!r} must be a {type(node[key]).__name__}'


def _no_field(section: str, name: str, node: Iterable[str]) -> str:
    """That a section, '' = the config itself, lacks a field; and what may have been meant."""
    there = [field for field in node if field != name]
    near = difflib.get_close_matches(name, there, n=1) or _meant((name,), base.get_config())
    hint = f'did you mean {" or ".join(near)}?' if near else f'there are: {", ".join(there)}'
    return f'{section or "the config"} has no field {name}; {hint}'


def _flag_like(
    name: str, values: flags.FlagValues, config: ml_collections.ConfigDict | None
) -> str:
    """What may have been meant by a flag: one there is, or a field of the config."""
    found = _meant((name, name.removeprefix('no').removeprefix('config.')), config or {})
    if found:
        return f'did you mean --config.{" or --config.".join(found)}?'
    near = difflib.get_close_matches(name, list(values), n=1)
    return f'did you mean --{near[0]}?' if near else f'there are: --{", --".join(values)}'


def _meant(asked: Iterable[str], config: fields.Values) -> list[str]:
    """Up to three dotted fields that go by one of these names, end in it, or are spelt like it."""
    known = list(_fields(config))
    found = [field for field in known if f'.{field}'.endswith(tuple(f'.{a}' for a in asked))]
    found = found or [field for field in known if field.endswith(tuple(f'_{a}' for a in asked))]
    leaves = {field.rpartition('.')[2]: field for field in reversed(known)}
    for each in asked:
        close = difflib.get_close_matches(each, leaves, n=1, cutoff=0.75)
        found = found or [leaves[leaf] for leaf in close]
    return found[:3]


def of_file(path: str) -> str:
    """What makes a path no config file that can be read; '' = nothing does."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as e:
        missing = isinstance(e, FileNotFoundError | NotADirectoryError)
        return 'it is not there' + _no_file(path) if missing else str(e)
    if stat.S_ISDIR(mode):
        return 'it is a folder' + _no_file(path)
    if not stat.S_ISREG(mode):
        return 'it is no file but a pipe or a device'
    return '' if os.stat(path).st_size <= _MOST_BYTES else 'it is too large to be one'


def _no_file(path: str) -> str:
    """The config files that may have been meant by one that is not there: a sentence's end."""
    meant: dict[str, list[str]] = {}  # as it may be written -> files
    folder = pathlib.Path('experiments')
    for file in sorted(folder.rglob('[!_]*.py')):
        inside = file.relative_to(folder)
        called = (file, inside, pathlib.Path(file.name))
        names = {*called, *(name.with_suffix('') for name in called), file.parent, inside.parent}
        for name in names:
            meant.setdefault(str(name), []).append(str(file))
    near = difflib.get_close_matches(path, meant, n=1, cutoff=0.7)
    return f'; did you mean {" or ".join(meant[near[0]])}?' if near else ''


def overridden(argv: Iterable[str]) -> list[str]:
    """The dotted fields that a command line overrides; --noconfig.x is config.x = False."""
    names = (arg.partition('=')[0].lstrip('-') for arg in argv if arg.startswith('-'))
    names = (name.removeprefix('no') if name.startswith('noconfig.') else name for name in names)
    return [name.removeprefix('config.') for name in names if name.startswith('config.')]


def _fields(config: fields.Values, prefix: str = '') -> Iterable[str]:
    for key, value in config.items():
        yield prefix + key
        if isinstance(value, ml_collections.ConfigDict):
            yield from _fields(value, f'{prefix}{key}.')


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return ' '.join(text.splitlines()[0].split()) if text else type(error).__name__


def _all_lines(error: Exception) -> str:
    text = ' '.join(str(error).split())
    return text if len(text) <= 300 else text[:300] + '...'


def _where(error: Exception) -> str:
    """The config file's own line, when the error was raised in one."""
    frame, found = error.__traceback__, ''
    while frame is not None:
        path = frame.tb_frame.f_code.co_filename
        if (
            'site-packages' not in path
            and 'importlib' not in path
            and not path.startswith((_LIBRARY, '<'))
            and _PACKAGE not in pathlib.Path(path).parents
        ):
            found = f' (at {path}:{frame.tb_lineno})'
        frame = frame.tb_next
    return found
