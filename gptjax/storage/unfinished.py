# SPDX-License-Identifier: Apache-2.0
"""Folders that are written into an empty place, from a mark that comes first to its removal.

A folder with the mark is unfinished: readers refuse it, and its writer, run again, begins afresh.
A finished one may say what it was made of, by which its writer, run again, knows that it is done.
"""

import contextlib
import json
import os
import pathlib
import shlex
import shutil
import sys
from collections.abc import Iterator

from gptjax.configs import checksum, errors
from gptjax.storage import files, leases, mirror, scratch

MARK = '.unfinished'
_MADE_OF = '.made_of'
_LONGEST = 2**16  # bytes of a mark that are read
_PACKAGE = pathlib.Path(__file__).resolve().parents[1]


def check_free(folder: pathlib.Path) -> None:
    """Raises InputError where a folder holds anything that is not of an unfinished writer."""
    held = (folder.exists() and _held(folder)) or scratch.names(folder)
    if held and not is_unfinished(folder):
        raise errors.InputError(f'{folder} is not empty; choose another --workdir, or remove it')


def says_of_what(folder: pathlib.Path) -> bool:
    """Whether a folder was finished, and says what it was made of."""
    return not is_unfinished(folder) and (folder / _MADE_OF).is_file()


def is_made_of(folder: pathlib.Path, what: str) -> bool:
    """Whether a folder was finished by writing(folder, what)."""
    if not says_of_what(folder):
        return False
    return files.content(folder / _MADE_OF, _LONGEST).decode(errors='replace') == f'{what}\n'


@contextlib.contextmanager
def writing(folder: pathlib.Path, what: str = '') -> Iterator[None]:
    """Marks a folder while it is written; what an earlier writer left unfinished is removed.

    Args:
      what: it is made of, in a line that changes with it; '' = not kept.

    Raises:
      InputError: it holds anything else.
    """
    check_free(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with files.naming(folder / MARK), files.open_(folder / MARK, 'w') as f:
        f.write(json.dumps(checksum.sealed({'command': _command()})))
    mirror.sync()  # the mark is there before anything else
    scratch.clear(folder, MARK)
    for path in _held(folder):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    yield
    if what:
        files.replace(folder / _MADE_OF, f'{what}\n')
    with contextlib.suppress(OSError):  # a system that syncs no folders
        _sync(folder)
    (folder / MARK).unlink()


def is_unfinished(folder: pathlib.Path) -> bool:
    """Whether a folder has the mark, as a file of its own."""
    mark = folder / MARK
    return mark.is_file() and not mark.is_symlink()


def refuse(folder: pathlib.Path) -> None:
    """Raises InputError where a folder is unfinished, with the command that finishes it."""
    if is_unfinished(folder):
        again = 'write it again'
        with contextlib.suppress(OSError, ValueError, RecursionError):
            with (folder / MARK).open('rb') as f:
                command = checksum.opened(json.loads(f.read(_LONGEST))).get('command')
            if isinstance(command, list) and str(command[2:3]).startswith("['gptjax."):
                again = f'run again: {shlex.join(map(str, command))}'
        raise errors.InputError(f'{folder} is an unfinished conversion; {again}')


def _held(folder: pathlib.Path) -> list[pathlib.Path]:
    names = (path.name for path in folder.iterdir())
    return [folder / name for name in names if name != MARK and not leases.is_ours(name)]


def _command() -> list[str]:
    """The command line of this process, where it is one of our programs; else empty."""
    program = pathlib.Path(sys.argv[0])
    if program.resolve().parent != _PACKAGE:
        return []
    return ['python', '-m', f'gptjax.{program.stem}', *sys.argv[1:]]


def _sync(folder: pathlib.Path) -> None:
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
