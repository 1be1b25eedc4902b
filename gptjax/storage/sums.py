# SPDX-License-Identifier: Apache-2.0
"""A folder that is whole: SHA256SUMS, written last, as `sha256sum -c` reads it."""

import pathlib
from collections.abc import Callable, Collection

from gptjax.configs import errors
from gptjax.storage import files

NAME = 'SHA256SUMS'


def write(folder: pathlib.Path, names: Collection[str]) -> None:
    """Finishes a folder: hashes files of it, and says so."""
    lines = [f'{files.sha256(folder / name)}  {name}\n' for name in sorted(names)]
    files.replace(folder / NAME, ''.join(lines))


def is_whole(folder: pathlib.Path) -> bool:
    """Whether a folder was finished."""
    return (folder / NAME).is_file()


def check(
    folder: pathlib.Path, remedy: str, concerns: Callable[[str], bool] = lambda name: True
) -> None:
    """Compares a finished folder with its sums; one that has none is not compared.

    Args:
      remedy: what to do where it is damaged.
      concerns: name of a file -> whether it is compared.

    Raises:
      InputError: a file is missing or has other bytes.
    """
    if not is_whole(folder):
        return
    text = (folder / NAME).read_bytes().decode(errors='replace')
    for line in text.splitlines():
        digest, _, name = line.partition('  ')
        if not concerns(name):
            continue
        path = folder.joinpath(*(files.plain_name(n, folder / NAME) for n in name.split('/')))
        if not path.is_file():
            raise errors.InputError(f'{path} is missing, which {NAME} lists; {remedy}')
        if files.remembered_sha256(path) != digest:
            raise errors.InputError(f'{path} does not have the bytes that {NAME} says; {remedy}')
