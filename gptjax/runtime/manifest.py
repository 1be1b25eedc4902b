# SPDX-License-Identifier: Apache-2.0
"""The manifest of a checkpoint: a sha256 of every file, written last, checked before a restore."""

import concurrent.futures
import hashlib
import pathlib
from typing import Any

import jax

from gptjax.runtime import meta
from gptjax.storage import documents, files, retry

NAME = 'manifest.json'


def write(checkpoint: pathlib.Path) -> None:
    """Hashes every file; with this a checkpoint is finished."""
    digests = _digests(checkpoint, sorted(_names(checkpoint)))
    documents.write(checkpoint / NAME, digests)


def damage(checkpoint: pathlib.Path) -> str:
    """What is wrong with this host's share of a finished checkpoint's files; '' if nothing."""
    try:
        listed = _read(checkpoint)
        if unlisted := _names(checkpoint) - listed.keys():
            return f'{NAME} does not list {min(unlisted)}'
        share = sorted(listed)[jax.process_index() :: jax.process_count()]
        for name in share:
            if not (checkpoint / name).is_file():
                return f'{name} is missing'
        for name, found in _digests(checkpoint, share).items():
            if found != listed[name]:
                return f'{name} does not have the bytes that were saved'
        step = read_meta(checkpoint).get('step')
        if step != int(checkpoint.name):
            return f'it is that of step {step}'
    except (ValueError, OSError) as e:
        return str(e)
    return ''


def read_meta(checkpoint: pathlib.Path) -> dict[str, Any]:
    """The meta of a finished checkpoint, verified. Raises OSError or ValueError."""
    content = (checkpoint / meta.NAME).read_bytes()
    if hashlib.sha256(content).hexdigest() != _read(checkpoint).get(meta.NAME):
        raise ValueError(f'{meta.NAME} does not have the bytes that were saved')
    return documents.parse(content, dict, ('step',))


def _read(checkpoint: pathlib.Path) -> dict[str, str]:
    """Name -> hash; of every file that must be there."""
    listed = documents.parse((checkpoint / NAME).read_bytes(), dict[str, str])
    if meta.NAME not in listed or len(listed) < 2:
        raise ValueError(f'{NAME} lists no checkpoint')
    for name in listed:
        for part in name.split('/'):
            files.plain_name(part, checkpoint / NAME)
    return listed


def _names(checkpoint: pathlib.Path) -> set[str]:
    """The files it covers: of the arrays, and the meta."""
    found = [checkpoint / meta.NAME, *(checkpoint / 'state').rglob('*')]
    return {p.relative_to(checkpoint).as_posix() for p in found if p.is_file()}


def _digests(checkpoint: pathlib.Path, names: list[str]) -> dict[str, str]:
    with concurrent.futures.ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(lambda n: _digest(checkpoint / n), names), strict=True))


def _digest(path: pathlib.Path) -> str:
    return retry.call(f'reading {path}', lambda: files.sha256(path))
