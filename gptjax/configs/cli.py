# SPDX-License-Identifier: Apache-2.0
"""Command lines: absl flags and an ml_collections config, with every mistake told in one line."""

import ast
import contextlib
import dataclasses
import functools
import importlib.util
import pathlib
import re
import types
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import ml_collections
from absl import flags
from ml_collections import config_flags
from ml_collections.config_flags import config_path

from gptjax.configs import base, errors, fields, mistakes, sizes, spec, written
from gptjax.configs.sections import training

_CONFIG = 'config'
# Where a run began, and on what, is nothing to its readers.
_OF_COMMAND = ('init_from', 'init_state', 'mesh')
T = TypeVar('T')
_PROGRAMS = pathlib.Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Args:
    """What a program's main() is given.

    Attributes:
      config: locked.
      workdir: the run's folder.
      flags: the other flags.
      path: of the config file.
      module: the config file as a module: its get_config(arg), and sweep(arg) where it has one.
      arg: that of the config file, behind the colon; None = none.
      overridden: fields that the command line names.
      of_run: whether the config is what a run has written, and not the user's.
    """

    config: ml_collections.ConfigDict
    workdir: str
    flags: flags.FlagValues
    path: str
    module: types.ModuleType
    arg: str | None = None
    overridden: frozenset[str] = frozenset()
    of_run: bool = False

    def given(self, name: str) -> dict[str, Any]:
        """What the user set of a section: on the command line, or in a config file of theirs."""
        usual = base.get_config()[name]
        return {
            field: value
            for field, value in self.config[name].items()
            if f'{name}.{field}' in self.overridden or (value != usual[field] and not self.of_run)
        }

    def section(self, name: str, owner: type[T]) -> T:
        """A section of the config as its owner's dataclass. Raises UsageError where it is wrong."""
        return fields.build(owner, self.config[name], name)


def parse(
    argv: list[str],
    define: Callable[[flags.FlagValues], None] = lambda values: None,
    default_config: str = '',
    reads: Iterable[str] | None = None,
    where: written.Where = written.HERE,
    needs_workdir: bool = True,
) -> Args:
    """Parses `--config=FILE[:arg] [--config.field=value ...] --workdir=DIR [...]`.

    Args:
      argv: the command line, program name first.
      define: adds the program's own flags to the FlagValues it is handed.
      default_config: config file where the command line names none; '' = it must. base.OF_RUN: what
        the run in --workdir has written, else that in --config.init_from, but for init_from and
        mesh; else the base config.
      reads: sections and top-level fields that the program reads; None = every one.
      where: what makes local folders of those that are elsewhere.

    Raises:
      UsageError: a mistyped flag, field or value, or a field that the program does not read; in
        one line, with a suggestion.
    """
    values = flags.FlagValues()
    flags.DEFINE_string('workdir', None, 'Folder that holds the run.', flag_values=values)
    define(values)
    named, argv = _config_of(argv)
    of_run = ''
    if default_config == base.OF_RUN and not named:
        folders = {_name(flag): flag.partition('=')[2] for flag in _joined(argv[1:])}
        of_run = written.find(folders.get('workdir'), folders.get('config.init_from'), where)
    named = named or of_run or (base.__file__ if default_config == base.OF_RUN else default_config)
    errors.require(named[:1] not in ('', '-'), 'give --config=experiments/<name>.py')
    path, config = '', None
    try:
        path, module, config = load(named)
        if of_run:
            config.update({name: base.get_config()[name] for name in _OF_COMMAND})
        _add_labels(config, argv)
        _check_fields(argv)
        argv = _plain(argv, config)
        config_flags.DEFINE_config_dict(_CONFIG, config, flag_values=values, sys_argv=argv)
        rest = values(argv)[1:]
    except SystemExit as e:
        raise errors.UsageError(f'the config file stopped the program: {e}') from e
    except BaseException as e:  # a config file is code: it may raise anything
        raise errors.UsageError(mistakes.explain(e, argv, values, named, config)) from e
    if rest:
        raise errors.UsageError(f'unexpected argument {rest[0]!r}; flags look like --name=value')
    errors.require(bool(values.workdir) or not needs_workdir, 'give --workdir=<folder of the run>')
    if reads is not None:
        _check_read(argv, tuple(reads))
    errors.require(0 <= config.seed < 2**31, f'seed = {config.seed} must be from 0 to 2**31 - 1')
    workdir = pathlib.Path(where.workdir(values.workdir or ''))
    for folder in (workdir, *workdir.parents):
        errors.require(
            not folder.exists() or folder.is_dir(),
            f'--workdir={workdir}: {folder} is a file, not a folder',
        )
    overridden = frozenset(mistakes.overridden(argv[1:]))
    arg = named.partition(':')[2] if ':' in named else None
    config = config.lock()
    return Args(config, str(workdir), values, path, module, arg, overridden, bool(of_run))


def load(named: str) -> tuple[str, types.ModuleType, ml_collections.ConfigDict]:
    """A config file, as FILE or FILE:arg -> (its path, its module, what get_config gives).

    Raises:
      UsageError: there is no such file, or it gives no config. Exception: what the file raises.
    """
    path, colon, arg = named.partition(':')
    wrong = mistakes.of_file(path)
    errors.require(not wrong, f'cannot read the config file {path!r}: {wrong}')
    if path.endswith('.json'):
        return path, *written.load(path, colon)
    found = importlib.util.spec_from_file_location('config_file', path)
    errors.require(
        found is not None,
        f'the config file {path!r} is no .py file; give --config=experiments/<name>.py',
    )
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    errors.require(
        hasattr(module, 'get_config'),
        f'the config file {path!r} has no function get_config; experiments/quickstart.py shows one',
    )
    config = module.get_config(arg) if colon else module.get_config()
    errors.require(
        isinstance(config, ml_collections.ConfigDict),
        f'get_config of {path!r} gives a {type(config).__name__}, no ConfigDict; start from '
        'gptjax.configs.base.get_config(), and return it',
    )
    wrong = mistakes.in_tree(config)
    errors.require(not wrong, f'{path}: {wrong}')
    return path, module, config


def _plain(argv: list[str], config: ml_collections.ConfigDict) -> list[str]:
    """Values as config_flags reads them: 1e6 for a whole number, yes and no for a switch."""
    found, kind = argv[:1], None
    for arg in argv[1:]:
        name, equals, value = arg.partition('=')
        if not arg.startswith('-'):  # the value of the flag before it
            found.append(_spelt(arg, kind))
            continue
        kind = None
        for field in mistakes.overridden([name]):
            with contextlib.suppress(KeyError, AttributeError, TypeError, ValueError):
                kind = config_path.get_type(field, config)
        found.append(f'{name}={_spelt(value, kind)}' if equals else arg)
    return found


def _spelt(value: str, kind: type | None) -> str:
    if kind is int and re.fullmatch(r'[+-]?\d+(\.\d*)?[eE]\+?\d+', value):
        return str(int(float(value))) if float(value).is_integer() else value
    if kind is bool:
        return {'yes': 'true', 'on': 'true', 'no': 'false', 'off': 'false'}.get(value, value)
    return value


def with_config(argv: list[str], default_config: str) -> list[str]:
    """The command line, naming `default_config` where it names no config file."""
    if not default_config or _config_of(argv)[0]:
        return argv
    return [argv[0], f'--{_CONFIG}={default_config}', *argv[1:]]


def variant(argv: list[str], arg: str, workdir: str) -> list[str]:
    """The flags of a command line for another variant of its config file, in another folder.

    >>> variant(['train', '--config=a.py:size=xl', '--workdir', 'w', '--config.seed=1'], 'n=2', 'v')
    ['--config=a.py:size=xl,n=2', '--workdir=v', '--config.seed=1']
    """
    whole = _joined(argv[1:])
    found = {_name(flag): flag.partition('=')[2] for flag in whole}
    separator = ',' if ':' in found[_CONFIG] else ':'
    rest = [flag for flag in whole if _name(flag) not in (_CONFIG, 'workdir')]
    return [f'--{_CONFIG}={found[_CONFIG]}{separator}{arg}', f'--workdir={workdir}', *rest]


def for_program(flags_: Iterable[str], program: str) -> list[str]:
    """Flags without the overrides of what a program does not read."""
    reads = readings()[program]
    return [flag for flag in _joined(flags_) if sections([flag]) <= set(reads)]


def sections(flags_: Iterable[str]) -> set[str]:
    """The sections and top-level fields that flags override."""
    return {field.partition('.')[0] for field in mistakes.overridden(flags_)}


@functools.cache
def readings() -> dict[str, tuple[str, ...]]:
    """Program -> what it reads of the config: its READS, read without importing it."""
    found = {}
    for path in sorted(_PROGRAMS.glob('*.py')):
        for node in ast.parse(path.read_text(encoding='utf-8')).body:
            names = [getattr(t, 'id', '') for t in getattr(node, 'targets', ())]
            if isinstance(node, ast.Assign) and names == ['READS']:
                found[path.stem] = ast.literal_eval(node.value)
    return found


def parse_arg(arg: str | None, **defaults: Any) -> Any:
    """The argument of get_config(arg), 'size=small,steps=100', as a read-only record.

    Each value takes the type of its default; keys without a default are errors.

    >>> parse_arg('size=xl', size='small', steps=10)
    ConfigArg(size='xl', steps=10)
    """
    types_ = {name: type(value) for name, value in defaults.items()}
    found = defaults | spec.parse(arg or '', types_, 'config argument')
    record = dataclasses.make_dataclass('ConfigArg', found.keys(), frozen=True)
    return record(**found)


def tiny(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """A copy of any experiment that runs in seconds: its structure with the tiny shape.

    Pattern, norm, positions, dropout and optimiser stay; widths, context, batch and length shrink.
    """
    small = config.copy_and_resolve_references()
    with small.unlocked():
        shape = sizes.TINY['tiny']
        tiny_model = shape._asdict() | {'d_ff': 4 * shape.d_model, 'n_ctx': 32, 'n_vocab': 512}
        if small.model.family == 'gpt':
            tiny_model['n_layers'] = 2 * len(small.model.attention)
            tiny_model['n_kv_heads'] = min(small.model.n_kv_heads, 1)
            tiny_model['band_width'] = min(small.model.band_width, 8)
        small.model.update({k: v for k, v in tiny_model.items() if k in small.model})
        small.tokenizer.n_vocab = 512
        small.batch.update(batch_tokens=16 * 32, ramp_over_tokens=0, ramp_from_tokens=0)
        small.train.update(total_tokens=6 * 16 * 32, total_epochs=0.0)
        small.train.update(log_every_steps=1, eval_every_steps=3)
        for unit in training.UNITS:
            if f'warmup_{unit}' in small.optim:
                step = {'tokens': 16 * 32, 'steps': 1, 'episodes': 16}.get(unit, 0)
                small.optim[f'warmup_{unit}'], small.optim[f'decay_{unit}'] = 2 * step, 0
                if small.optim[f'cooldown_{unit}']:
                    small.optim[f'cooldown_{unit}'] = step
        small.checkpoint.update(every_steps=2)
        small.evaluate.update(max_tokens=1000, stride=0)
        small.decode.update(max_new_tokens=8)
    return small.lock()


def _config_of(argv: list[str]) -> tuple[str, list[str]]:
    """What --config names, and the command line without it. Raises UsageError if it names two."""
    named, rest = [], argv[:1]
    arguments = iter(argv[1:])
    for arg in arguments:
        if _name(arg) != _CONFIG or not arg.startswith('-'):
            rest.append(arg)
        elif '=' in arg:
            named.append(arg.partition('=')[2])
        else:
            named.append(next(arguments, ''))
    errors.require(
        len(named) < 2, f'--config is given twice, as {" and ".join(map(repr, named))}; give one'
    )
    return ''.join(named), rest


def _add_labels(config: ml_collections.ConfigDict, argv: list[str]) -> None:
    """Makes room for labels that only the command line names, as data.eval_sets.wiki."""
    for field in mistakes.overridden(argv):
        section, _, label = field.rpartition('.')
        if section == base.LABELS and 'data' in config and label not in config.data.eval_sets:
            with config.unlocked():
                config.data.eval_sets[label] = ''


def _check_fields(argv: list[str]) -> None:
    for field in mistakes.overridden(argv):
        leaf = next(iter(base.SECTIONS.get(field, ())), '')
        errors.require(
            not leaf,
            f'--config.{field} is a section: set its fields, as --config.{field}.{leaf}=...',
        )


def _check_read(argv: list[str], reads: tuple[str, ...]) -> None:
    for field in mistakes.overridden(argv):
        section = field.partition('.')[0]
        if section not in reads:
            others = [name for name, theirs in readings().items() if section in theirs]
            raise errors.UsageError(
                f'--config.{field} changes nothing here: {section!r} is read by '
                f'{", ".join(others)}; leave it out'
            )


def _joined(arguments: Iterable[str]) -> list[str]:
    """--name=value of every flag, also where value stood by itself."""
    whole: list[str] = []
    for part in arguments:
        if whole and not part.startswith('-') and '=' not in whole[-1]:
            whole[-1] += f'={part}'
        else:
            whole.append(part)
    return whole


def _name(flag: str) -> str:
    return flag.partition('=')[0].lstrip('-')
