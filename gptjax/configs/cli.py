# SPDX-License-Identifier: Apache-2.0
"""Command lines: absl flags and an ml_collections config, with every mistake told in one line."""

import ast
import dataclasses
import difflib
import pathlib
from collections.abc import Callable
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from gptjax.configs import base, errors, sizes


@dataclasses.dataclass(frozen=True)
class Args:
    """What a program's main() is given: a locked config, the run's folder, the other flags."""

    config: ml_collections.ConfigDict
    workdir: str
    flags: flags.FlagValues


def parse(
    argv: list[str],
    define: Callable[[flags.FlagValues], None] = lambda values: None,
    default_config: str = '',
) -> Args:
    """Parses `--config=FILE[:arg] [--config.field=value ...] --workdir=DIR [...]`.

    Args:
      argv: the command line, program name first.
      define: adds the program's own flags to the FlagValues it is handed.
      default_config: config file where the command line names none; '' = it must.

    Raises:
      UsageError: a mistyped flag, field or value, in one line, with a suggestion.
    """
    argv = with_config(argv, default_config)
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        'config', None, 'Experiment file, as experiments/quickstart.py or file.py:key=value.',
        flag_values=values, sys_argv=argv,
    )  # fmt: skip
    flags.DEFINE_string('workdir', None, 'Folder that holds the run.', flag_values=values)
    define(values)
    try:
        rest = values(argv)[1:]
        config = values.config and values.config.lock()  # a file that failed to load raises here
    except SystemExit as e:
        raise errors.UsageError(f'the config file stopped the program: {e}') from e
    except Exception as e:  # a config file is code: it may raise anything
        raise errors.UsageError(_explain(e, argv, values)) from e
    if rest:
        raise errors.UsageError(f'unexpected argument {rest[0]!r}; flags look like --name=value')
    errors.require(config is not None, 'give --config=experiments/<name>.py')
    errors.require(bool(values.workdir), 'give --workdir=<folder of the run>')
    errors.require(0 <= config.seed < 2**31, f'seed = {config.seed} must be from 0 to 2**31 - 1')
    blocked = next(
        (p for p in _with_parents(values.workdir) if p.exists() and not p.is_dir()), None
    )
    errors.require(
        blocked is None, f'--workdir={values.workdir}: {blocked} is a file, not a folder'
    )
    return Args(config, values.workdir, values)


def _with_parents(workdir: str) -> list[pathlib.Path]:
    path = pathlib.Path(workdir)
    return [path, *path.parents]


def with_config(argv: list[str], default_config: str) -> list[str]:
    """The command line, naming `default_config` where it names no config file."""
    if not default_config or any(a.partition('=')[0].lstrip('-') == 'config' for a in argv):
        return argv
    return [argv[0], f'--config={default_config}', *argv[1:]]


def variant(argv: list[str], arg: str, workdir: str) -> list[str]:
    """The flags of a command line for another variant of its config file, in another folder.

    >>> variant(['train', '--config=a.py:size=xl', '--workdir', 'w', '--config.seed=1'], 'n=2', 'v')
    ['--config=a.py:size=xl,n=2', '--workdir=v', '--config.seed=1']
    """
    whole: list[str] = []
    for part in argv[1:]:
        if whole and not part.startswith('-') and '=' not in whole[-1]:
            whole[-1] += f'={part}'
        else:
            whole.append(part)
    found = {flag.partition('=')[0].lstrip('-'): flag.partition('=')[2] for flag in whole}
    separator = ',' if ':' in found['config'] else ':'
    rest = [f for f in whole if f.partition('=')[0].lstrip('-') not in ('config', 'workdir')]
    return [f'--config={found["config"]}{separator}{arg}', f'--workdir={workdir}', *rest]


def parse_arg(arg: str | None, **defaults: Any) -> Any:
    """The argument of get_config(arg), 'size=small,steps=100', as a read-only record.

    Each value takes the type of its default; keys without a default are errors.

    >>> parse_arg('size=xl', size='small', steps=10)
    ConfigArg(size='xl', steps=10)
    """
    found = dict(defaults)
    for part in filter(None, (arg or '').split(',')):
        key, equals, text = part.partition('=')
        if not equals or key not in defaults:
            raise errors.UsageError(
                f'config argument {part!r} is not key=value with a key of: {", ".join(defaults)}'
            )
        found[key] = _typed(key, text, defaults[key])
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
        small.optim.update(warmup_tokens=2 * 16 * 32, decay_tokens=0)
        small.checkpoint.update(every_steps=2)
        small.evaluate.update(max_tokens=1000, stride=0)
        small.decode.update(max_new_tokens=8)
    return small.lock()


def _typed(key: str, text: str, default: Any) -> Any:
    kind = type(default)
    if kind is str:
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise errors.UsageError(f'config argument {key}={text!r} must be a {kind.__name__}')
    return value


def _explain(error: Exception, argv: list[str], values: flags.FlagValues) -> str:
    """One line for what absl and ml_collections say in many."""
    cause: BaseException | None = error
    told = ''
    while cause is not None:  # absl and ml_collections wrap what a config file raises
        told = str(cause) if isinstance(cause, errors.InputError) else told
        cause = cause.__cause__ or cause.__context__
    if told:
        return told
    if isinstance(error, flags.UnrecognizedFlagError):
        near = difflib.get_close_matches(error.flagname, list(values), n=1)
        hint = f'did you mean --{near[0]}?' if near else f'there are: --{", --".join(values)}'
        return f'unknown flag --{error.flagname}; {hint}'
    if isinstance(error, OSError):
        path = next((a.partition('=')[2] for a in argv if a.lstrip('-').startswith('config=')), '')
        reason = 'it is not there' if 'Errno 2' in str(error) else _first_line(error)
        return f'cannot read the config file {path!r}: {reason}'
    if isinstance(error, AttributeError | KeyError):
        known = ml_collections.FrozenConfigDict(base.get_config())
        for field in _overridden(argv):
            if field not in _fields(known):
                near = difflib.get_close_matches(field, _fields(known), n=1)
                hint = f'; did you mean --config.{near[0]}?' if near else ''
                return f'unknown field --config.{field}{hint}'
    if isinstance(error, flags.Error):
        return _first_line(error)
    return f'{type(error).__name__}: {_first_line(error)}{_where(error)}'


def _overridden(argv: list[str]) -> list[str]:
    names = (arg.partition('=')[0].lstrip('-') for arg in argv if arg.startswith('-'))
    return [name.removeprefix('config.') for name in names if name.startswith('config.')]


def _fields(config: ml_collections.FrozenConfigDict, prefix: str = '') -> list[str]:
    found = []
    for key, value in config.items():
        found.append(prefix + key)
        if isinstance(value, ml_collections.FrozenConfigDict):
            found += _fields(value, f'{prefix}{key}.')
    return found


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return ' '.join(text.splitlines()[0].split()) if text else type(error).__name__


def _where(error: Exception) -> str:
    """The config file's own line, when the error was raised in one."""
    frame, found = error.__traceback__, ''
    while frame is not None:
        path = frame.tb_frame.f_code.co_filename
        if 'site-packages' not in path and path != __file__:
            found = f' (at {path}:{frame.tb_lineno})'
        frame = frame.tb_next
    return found
