# SPDX-License-Identifier: Apache-2.0
"""The checkpoints of a run as folders: which are finished, which were cut short, which are odd.

A save begins with the file UNFINISHED in its folder and ends with the manifest; a removal begins
with UNFINISHED, too, which goes last. So a folder with neither was whole once: it is put aside,
never removed.
"""

import contextlib
import logging
import pathlib

from gptjax.configs import errors
from gptjax.runtime import manifest
from gptjax.storage import buckets, files, scratch

FOLDER = scratch.IN_PLACE
UNFINISHED = '.incomplete'
_STATE = 'state'
_log = logging.getLogger(__name__)


def of(workdir: str | pathlib.Path) -> buckets.Anywhere:
    """The folder of a run's checkpoints, in place; absolute, as orbax takes no other."""
    return scratch.origin(pathlib.Path(workdir).absolute() / FOLDER)


def at(folder: buckets.Anywhere, step: int) -> buckets.Anywhere:
    """Where the checkpoint of a step stands."""
    return folder / f'{step:08d}'


def finished(folder: buckets.Anywhere) -> list[buckets.Anywhere]:
    """Those with a manifest, in order."""
    return [p for p in _numbered(folder) if (p / manifest.NAME).is_file()]


def candidates(folder: buckets.Anywhere) -> list[buckets.Anywhere]:
    """Those that are finished, or were: their manifest is gone."""
    return [p for p in _numbered(folder) if not _was_cut_short(p)]


def clear(folder: buckets.Anywhere) -> None:
    """Removes what a crash has cut short."""
    for checkpoint in _numbered(folder):
        if _was_cut_short(checkpoint):
            drop(checkpoint)
        else:
            (checkpoint / UNFINISHED).unlink(missing_ok=True)  # of a save that was all but ended


def begin(checkpoint: buckets.Anywhere) -> None:
    """Makes the folder of a save, empty. What might have been whole there is put aside."""
    if checkpoint in candidates(checkpoint.parent):
        put_aside(checkpoint)
    _delete(checkpoint)
    checkpoint.mkdir(parents=True)
    (checkpoint / UNFINISHED).touch()


def finish(checkpoint: buckets.Anywhere) -> None:
    """Hashes every file of a save; with this it is whole."""
    manifest.write(checkpoint)
    (checkpoint / UNFINISHED).unlink(missing_ok=True)


def drop(checkpoint: buckets.Anywhere) -> None:
    """Removes what a save has begun and not finished, as far as it can be, and nothing else."""
    if checkpoint.is_dir() and _was_cut_short(checkpoint):
        with contextlib.suppress(OSError):
            _delete(checkpoint)


def remove(checkpoint: buckets.Anywhere) -> None:
    """Removes a checkpoint; half removed it is an unfinished one. Of a link, the link alone."""
    try:
        if checkpoint.is_symlink():
            checkpoint.unlink()
            return
        (checkpoint / UNFINISHED).touch()
        (checkpoint / manifest.NAME).unlink(missing_ok=True)
        _delete(checkpoint)
    except OSError as e:
        _log.warning('could not remove the old checkpoint %s: %s', checkpoint, e)


def put_aside(checkpoint: buckets.Anywhere) -> buckets.Anywhere:
    """Renames a damaged checkpoint, in place of one of that name put aside before."""
    aside = checkpoint.with_name(checkpoint.name + '.damaged')
    with contextlib.suppress(OSError):
        files.remove_tree(aside)
    checkpoint.rename(aside)
    return aside


def check(workdir: str | pathlib.Path) -> None:
    """Raises InputError where something stands in the place of checkpoints, or beside them."""
    folder = of(workdir)
    if not folder.is_dir() and (folder.exists() or folder.is_symlink()):
        raise errors.InputError(f'{folder} is no folder; move it away')
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name.isdigit() and (odd := _odd(path)):
            raise errors.InputError(f'{path} {odd}; move it away')


def warn(workdir: str | pathlib.Path) -> None:
    """Says the same, for readers: what is whole beside it is read."""
    try:
        check(workdir)
    except errors.InputError as e:
        _log.warning('%s', e)


def _odd(path: buckets.Anywhere) -> str:
    """Why something is none of our checkpoints; '' = it may be one."""
    if not path.is_dir():
        return 'is no folder'
    return '' if _is_step(path.name) else 'is no name of a checkpoint of ours'


def _delete(checkpoint: buckets.Anywhere) -> None:
    """UNFINISHED last: what is half removed has it. Raises OSError where something stays."""
    if checkpoint.is_symlink():
        checkpoint.unlink()
    if not checkpoint.is_dir():
        return
    for path in checkpoint.iterdir():
        if path.name == UNFINISHED:
            continue
        if path.is_dir() and not path.is_symlink():
            files.remove_tree(path)
        else:
            path.unlink()
    (checkpoint / UNFINISHED).unlink(missing_ok=True)
    checkpoint.rmdir()


def is_removed(checkpoint: buckets.Anywhere) -> bool:
    """Whether a checkpoint that was whole is gone, or half gone."""
    half = (checkpoint / UNFINISHED).exists() and not (checkpoint / manifest.NAME).exists()
    return half or not checkpoint.exists()


def _numbered(folder: buckets.Anywhere) -> list[buckets.Anywhere]:
    found = (p for p in folder.glob('[0-9]*') if p.name.isdigit() and not _odd(p))
    return sorted(found, key=lambda p: int(p.name))


def _is_step(name: str) -> bool:
    return name.isascii() and name.isdigit() and at(pathlib.Path(), int(name)).name == name


def _was_cut_short(checkpoint: buckets.Anywhere) -> bool:
    if (checkpoint / manifest.NAME).is_file():
        return False
    return (checkpoint / UNFINISHED).exists() or not (checkpoint / _STATE).is_dir()
