# SPDX-License-Identifier: Apache-2.0
"""The manifest of a checkpoint: a hash of every file, written last, checked before a restore.

On a disk it is the sha256 of the bytes. In a bucket it is the checksum that storage keeps of every
object, so that nothing is read for it. Copied from one to the other, files are read and compared.
"""

import concurrent.futures
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from gptjax.runtime import meta
from gptjax.storage import buckets, documents, files, retry

NAME = 'manifest.json'


def write(checkpoint: buckets.Anywhere) -> None:
    """Hashes every file; with this a checkpoint is finished."""
    known = _files(checkpoint)
    documents.write(checkpoint / NAME, _digests(checkpoint, known, {}, sorted(known)))


def damage(checkpoint: buckets.Anywhere) -> str:
    """What is wrong with this host's share of a finished checkpoint's files; '' if nothing."""
    try:
        listed, known = _read(checkpoint), _files(checkpoint)
        if unlisted := known.keys() - listed.keys():
            return f'{NAME} does not list {min(unlisted)}'
        share = sorted(listed)[jax.process_index() :: jax.process_count()]
        for name in share:
            if name not in known:
                return f'{name} is missing'
        for name, found in _digests(checkpoint, known, listed, share).items():
            if found != listed[name]:
                return f'{name} does not have the bytes that were saved'
        step = read_meta(checkpoint).get('step')
        if step != int(checkpoint.name):
            return f'it is that of step {step}'
    except (ValueError, OSError) as e:
        return str(e)
    return ''


def read_meta(checkpoint: buckets.Anywhere) -> dict[str, Any]:
    """The meta of a finished checkpoint, verified. Raises OSError or ValueError."""
    content, said = (checkpoint / meta.NAME).read_bytes(), _read(checkpoint)[meta.NAME]
    if buckets.is_crc32c(said):
        found = buckets.crc32c(content)
    else:
        found = hashlib.sha256(content).hexdigest()
    if found != said:
        raise ValueError(f'{meta.NAME} does not have the bytes that were saved')
    return documents.parse(content, dict, ('step',))


def _read(checkpoint: buckets.Anywhere) -> dict[str, str]:
    """Name -> hash; of every file that must be there."""
    listed = documents.parse((checkpoint / NAME).read_bytes(), dict[str, str])
    if meta.NAME not in listed or len(listed) < 2:
        raise ValueError(f'{NAME} lists no checkpoint')
    for name in listed:
        for part in name.split('/'):
            files.plain_name(part, checkpoint / NAME)
    return listed


def _files(checkpoint: buckets.Anywhere) -> dict[str, str]:
    """The files it covers, of the arrays and the meta: what storage says they hash to, or ''."""
    if isinstance(checkpoint, buckets.Path):
        found = {n: o.checksum for n, o in checkpoint.objects().items() if not n.endswith('/')}
        return {n: known for n, known in found.items() if n == meta.NAME or n.startswith('state/')}
    paths = [checkpoint / meta.NAME, *(checkpoint / 'state').rglob('*')]
    return {p.relative_to(checkpoint).as_posix(): '' for p in paths if p.is_file()}


def _digests(
    checkpoint: buckets.Anywhere,
    known: Mapping[str, str],
    listed: Mapping[str, str],
    names: Sequence[str],
) -> dict[str, str]:
    """Name -> hash, of the kind that is listed."""

    def digest(name: str) -> str:
        path, kind = checkpoint / name, listed.get(name, known[name])
        if buckets.is_crc32c(kind):
            return known[name] or buckets.crc32c_of(path)
        return retry.call(f'reading {path}', lambda: files.sha256(path))

    with concurrent.futures.ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))
