# SPDX-License-Identifier: Apache-2.0
"""Where token shards are read from: a folder here, a copy of one elsewhere, or its bucket."""

import hashlib
import math
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

from gptjax.configs import errors
from gptjax.data import token_manifest as manifest_lib
from gptjax.storage import buckets, documents, files, leases, scratch

_MOST = 0.8  # of the room on the disk that a copy may take


def locate(
    name: str,
    workdir: pathlib.Path,
    stage_dir: str,
    progress: Callable[[int], None],
    split: str,
    read: str = 'auto',
) -> buckets.Anywhere:
    """The folder of token shards of that name, below the workdir unless absolute.

    Of one that is elsewhere, the shards of a split are copied into `stage_dir` first, every hash
    verified; what was copied before is not copied again. One in a bucket need not be copied. Of
    several processes on one host the first copies, and the others wait for it.

    Args:
      stage_dir: a local folder; a relative one is in the user's cache folder.
      progress: is told the tokens copied.
      read: as data.read. Held-out splits, which are small and read whole, are always copied.

    Raises:
      InputError: the folder or its protocol's package is missing, or a hash differs.
    """
    place = scratch.origin(workdir / name) if '://' not in name else name
    if isinstance(place, pathlib.Path):
        return place
    is_bucket = isinstance(place, buckets.Path) or place.startswith(buckets.SCHEME)
    source = _Bucket(buckets.of(str(place))) if is_bucket else _Other(place)
    text = source.read(manifest_lib.NAME)
    try:
        manifest = documents.parse(text, manifest_lib.Manifest)
    except ValueError as e:
        raise errors.InputError(
            f'{place}/{manifest_lib.NAME} is damaged ({e}); upload the folder again'
        ) from e
    manifest.check_names(str(place))
    local = files.cache_dir() / (stage_dir or 'staged') / hashlib.sha256(text).hexdigest()[:16]
    records = getattr(manifest.splits, split)
    if is_bucket and split == 'train' and read != 'stage':
        size = sum(r.tokens for r in records) * manifest_lib.dtype(manifest.n_vocab).itemsize
        if read == 'stream' or not _fits(size, local):
            return source.folder
    with leases.held(local, math.inf):
        for partial in local.glob('*.partial'):  # of a copy that was cut short
            partial.unlink()
        for record in records:
            for file, digest in record.files().items():
                _fetch(source, local, file, digest)
            progress(record.tokens)
        files.replace(local / manifest_lib.NAME, text)
    return local


class _Bucket:
    """A folder in a bucket."""

    def __init__(self, folder: buckets.Path) -> None:
        self.folder = folder

    def read(self, name: str) -> bytes:
        try:
            return (self.folder / name).read_bytes()
        except FileNotFoundError as e:
            raise errors.InputError(
                f'no finished token shards in {self.folder}: it has no {name}; run python -m '
                'gptjax.prepare_tokens, or copy them there'
            ) from e

    def fetch(self, name: str, target: pathlib.Path) -> None:
        (self.folder / name).fetch(target)


class _Other:
    """A folder of any protocol that fsspec knows."""

    def __init__(self, name: str) -> None:
        import fsspec

        self._name = name
        self._remote, self._root = self._tried(lambda: fsspec.core.url_to_fs(name))

    def read(self, name: str) -> bytes:
        return self._tried(lambda: self._remote.cat_file(f'{self._root}/{name}'))

    def fetch(self, name: str, target: pathlib.Path) -> None:
        with files.naming(target):
            self._tried(lambda: self._remote.get_file(f'{self._root}/{name}', str(target)))

    def _tried(self, do: Callable[[], Any]) -> Any:
        try:
            return do()
        except Exception as e:  # of whatever library speaks the protocol
            raise errors.InputError(f'cannot read token shards at {self._name}: {e}') from e


def _fits(size: int, local: pathlib.Path) -> bool:
    """Whether a split has room beside what is there, or is there."""
    there = sum(path.stat().st_size for path in local.glob('train-*')) if local.is_dir() else 0
    folder = next(each for each in (local, *local.parents) if each.is_dir())
    return size - there <= _MOST * shutil.disk_usage(folder).free


def _fetch(source: _Bucket | _Other, local: pathlib.Path, name: str, sha256: str) -> None:
    target = local / name
    if target.is_file() and files.remembered_sha256(target) == sha256:
        return
    partial = target.with_name(f'{name}.partial')
    source.fetch(name, partial)
    if files.sha256(partial) != sha256:
        partial.unlink()
        raise errors.InputError(
            f'{name} of the token shards does not have the hash of its manifest; it is damaged: '
            'upload it again'
        )
    partial.replace(target)
    files.remember_sha256(target, sha256)
