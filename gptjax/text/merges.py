# SPDX-License-Identifier: Apache-2.0
"""The two files of a BPE as GPT-1 and GPT-2 were published: a table of ids, a list of merges."""

import pathlib

from gptjax.configs import errors
from gptjax.storage import files
from gptjax.text import trial

# A vocabulary's file -> that of its merges.
FILES = {
    'vocab.json': 'merges.txt',
    'encoder.json': 'vocab.bpe',
    'encoder_bpe_40000.json': 'vocab_40000.bpe',
}


def vocabulary(path: pathlib.Path) -> dict[str, int]:
    """Token -> id. Raises InputError where the file is no such table."""
    found = files.json_object(files.content(path), str(path))
    taken: set[int] = set()
    for token, i in found.items():
        if type(i) is not int or not 0 <= i < trial.MOST_IDS or i in taken:
            raise errors.InputError(
                f'{path} gives {token[:80]!r} the id {str(i)[:80]}; ids are whole numbers from 0 '
                f'to {trial.MOST_IDS - 1}, each given once; mend it, or fetch it again'
            )
        taken.add(i)
    return found


def merges(path: pathlib.Path) -> list[tuple[str, str]]:
    """The merges, first to last. Raises InputError where the file is missing."""
    if not path.is_file():
        raise errors.InputError(f'{path} is missing; it belongs beside the vocabulary')
    lines = files.decoded(files.content(path)).split('\n')[1:]  # after the version line
    return [tuple(line.split(' ')) for line in lines if line.count(' ') == 1]
