# SPDX-License-Identifier: Apache-2.0
"""The manifest of a checkpoint: a sha256 of every file, written last, checked before a restore."""

import concurrent.futures
import json
import pathlib

import jax

from gptjax.runtime import scores
from gptjax.storage import files, retry

NAME = 'manifest.json'
_BESIDE = (NAME, scores.NAME)  # not covered by it


def write(checkpoint: pathlib.Path) -> None:
    """Hashes every file; with this a checkpoint is finished."""
    found = (p for p in checkpoint.rglob('*') if p.is_file() and p.name not in _BESIDE)
    names = (str(p.relative_to(checkpoint)) for p in found if not p.name.endswith('.partial'))
    digests = _digests(checkpoint, sorted(names))
    files.replace(checkpoint / NAME, json.dumps(digests, indent=1))


def damage(checkpoint: pathlib.Path) -> str:
    """What is wrong with this host's share of a finished checkpoint's files; '' if nothing."""
    try:
        digests = json.loads((checkpoint / NAME).read_text(encoding='utf-8'))
        share = list(digests)[jax.process_index() :: jax.process_count()]
        for name in share:
            if not (checkpoint / name).is_file():
                return f'{name} is missing'
        for name, found in _digests(checkpoint, share).items():
            if found != digests[name]:
                return f'{name} does not have the bytes that were saved'
    except (ValueError, OSError) as e:
        return f'unreadable: {e}'
    return ''


def _digests(checkpoint: pathlib.Path, names: list[str]) -> dict[str, str]:
    with concurrent.futures.ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(lambda n: _digest(checkpoint / n), names), strict=True))


def _digest(path: pathlib.Path) -> str:
    return retry.call(f'reading {path}', lambda: files.sha256(path))
