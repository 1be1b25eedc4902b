# SPDX-License-Identifier: Apache-2.0
"""Folders in buckets, as programs work in them: local scratch, mirrored every few seconds.

gs://bucket/name stands below one scratch folder of this process, at bucket/name. What is small
comes with the workdir, what is large when need() asks for it, checkpoints never: they are written
and read in place. Removals are mirrored first, then files in the order of their writing, so that
what commits others comes behind them there as here.
"""

import atexit
import contextlib
import errno
import fcntl
import logging
import os
import pathlib
import re
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

from gptjax.configs import cli, errors
from gptjax.storage import buckets, files, gcs, leases, retry

EVERY_SECS = 5.0
IN_PLACE = 'checkpoints'  # the folder of a workdir that is not mirrored
_LEFT = re.compile(r'(^|/)(tensorboard|profile)/|(^|/)\.(lease|lock|writable)[^/]*$')
_TRANSIENT = re.compile(r'\.partial$|(^|/)\.(lease|lock|writable)[^/]*$')
_METAS = re.compile(rf'{IN_PLACE}/\d+/meta\.json$')
_DOCUMENT = re.compile(r'(\.json|/SHA256SUMS)$')  # may commit what was written before
_LAST = re.compile(r'/\.unfinished$')  # removed behind everything else
_SMALL = 2**26  # bytes of a folder, or of a file, that comes with its workdir
_BYTES_PER_SEC = 2**20  # of a file that grows, copied again and again
_CLOSE_SECS = 60.0  # how long the last files are tried
_log = logging.getLogger(__name__)


class _Seen(NamedTuple):
    """A file of the scratch folder as it is in the bucket, too."""

    state: tuple[int, int, int]
    at: float  # when it was copied there


class _Scratch:
    """The scratch folder of this process."""

    def __init__(self) -> None:
        parent = files.cache_dir() / 'scratch'
        parent.mkdir(parents=True, exist_ok=True)
        _clear(parent)
        begun = pathlib.Path(tempfile.mkdtemp(prefix='new-', dir=parent)).resolve()
        self.lock = (begun / leases.LOCK).open('w')
        fcntl.flock(self.lock, fcntl.LOCK_EX)
        self.root = begun.rename(begun.with_name(begun.name.replace('new-', 'run-', 1)))
        self.workdirs: list[pathlib.Path] = []
        self.seen: dict[pathlib.Path, _Seen] = {}
        self.fetched: set[pathlib.Path] = set()
        self.busy = threading.RLock()
        self.ended = threading.Event()
        self.mirroring: threading.Thread | None = None


_scratch: _Scratch | None = None


def here(name: str | os.PathLike) -> pathlib.Path:
    """The local path of a name, which may be in a bucket; nothing is copied."""
    global _scratch
    if not buckets.is_remote(name) and '://' not in str(name):
        return pathlib.Path(name)
    path = buckets.of(str(name))
    _scratch = _scratch or _Scratch()
    return _scratch.root.joinpath(path.bucket, *path.parts[3:])


def origin(path: str | os.PathLike) -> buckets.Anywhere:
    """Where a local path really is: in a bucket where it is below the scratch folder."""
    path = pathlib.Path(path)
    if _scratch is None:
        return path
    whole = pathlib.Path(os.path.normpath(path.absolute()))
    if not whole.is_relative_to(_scratch.root) or whole == _scratch.root:
        return path
    return buckets.of(f'{buckets.SCHEME}{whole.relative_to(_scratch.root).as_posix()}')


def need(path: pathlib.Path, most: int = 2**62) -> pathlib.Path:
    """Makes sure that a file, or all of a folder but checkpoints, is here. Returns the path.

    Args:
      most: bytes of a file or folder in it that are copied; larger ones stay away.
    """
    remote = origin(path)
    if isinstance(remote, buckets.Path):
        path = here(remote)
        with _scratch.busy:
            if not _covered(path):
                _fetch(path, remote, most)
    return path


def within(workdir: str | os.PathLike, name: str) -> pathlib.Path:
    """The local path of a name that is taken from a workdir where it is relative."""
    return small(here(name) if '://' in name else pathlib.Path(workdir, name))


def small(path: pathlib.Path) -> pathlib.Path:
    """need(), of what is small in a folder: large folders and files in it stay away."""
    return need(path, _SMALL)


def open_workdir(name: str) -> str:
    """The local path of a workdir, which is tried: one that cannot be written is said at once.

    Raises:
      InputError: it cannot be read and written, and why.
    """
    if '://' not in name:
        return name
    path = here(name)
    remote = origin(path)
    probe = remote / f'.writable-{os.uname().nodename}-{os.getpid()}'
    try:
        with retry.patience(6.0):
            probe.put(b'')
            probe.unlink(missing_ok=True)
            need(path, _SMALL)
    except FileNotFoundError as e:
        raise errors.InputError(
            f'there is no bucket {buckets.SCHEME}{remote.bucket}; make it, or mend --workdir={name}'
        ) from e
    except PermissionError as e:
        raise errors.InputError(
            f'{name} cannot be written: {e.strerror}; the account of this machine needs the role '
            'Storage Object User (roles/storage.objectUser) on that bucket'
        ) from e
    except OSError as e:
        raise errors.InputError(
            f'{name} cannot be written: {e.strerror}; mend that, and run the same command again'
        ) from e
    if away := gcs.far(remote.bucket):
        _log.warning(
            '%s: %s; every gigabyte read from there costs from $0.02 (North America, Europe) to '
            '$0.14 (between continents), by the price list of Google Cloud: use one that is near',
            name,
            away,
        )
    if path not in _scratch.workdirs:
        _scratch.workdirs.append(path)
    path.mkdir(parents=True, exist_ok=True)
    return str(path)


def refresh(workdir: pathlib.Path) -> None:
    """Brings a workdir up to what the last holder of its lease has written."""
    remote = origin(workdir)
    if isinstance(remote, buckets.Path):
        with _scratch.busy:
            _fetch(here(remote), remote, _SMALL)


def begin() -> None:
    """From now on what changes in workdirs goes to their buckets; the first of hosts does it."""
    if _scratch and _scratch.workdirs and _scratch.mirroring is None:
        _scratch.mirroring = threading.Thread(target=_keep, name='mirror', daemon=True)
        _scratch.mirroring.start()
        atexit.register(_remove)


def sync() -> None:
    """Returns when all that was written is in its bucket. Raises OSError where it cannot be."""
    if _scratch and _scratch.mirroring:
        leases.confirm()
        for workdir in _scratch.workdirs:
            _copy(workdir, whole=True)


def end() -> None:
    """sync(), for the last time.

    Raises:
      InputError: it failed; what was written stays in the scratch folder, which it names.
    """
    if not _scratch or not _scratch.mirroring:
        return
    _scratch.ended.set()
    try:
        with retry.patience(_CLOSE_SECS):
            sync()
    except OSError as e:
        kept = _scratch.root.with_name(_scratch.root.name.replace('run-', 'kept-'))
        _scratch.root.rename(kept)
        where = ', '.join(str(origin(workdir)) for workdir in _scratch.workdirs)
        raise errors.InputError(
            f'{where} cannot be written ({e}); what it lacks is kept in {kept}: copy it there, or '
            'run the same command again, which goes on from the last checkpoint'
        ) from e


def told(text: str) -> str:
    """A text with buckets in place of the scratch folder."""
    return text if _scratch is None else text.replace(f'{_scratch.root}/', buckets.SCHEME)


WHERE = cli.Where(workdir=open_workdir, other=lambda name: str(small(here(name))))


def leave() -> None:
    """Before the process ends at once: what can be copied in a moment, and leases given back."""
    if _scratch and _scratch.mirroring and not _scratch.ended.is_set():
        with contextlib.suppress(OSError, errors.InputError), retry.patience(3.0):
            sync()
        leases.release_all()
        _remove()


def names(folder: pathlib.Path) -> list[str]:
    """What a folder holds in its bucket, also what was not copied; of a local one, nothing."""
    remote = origin(folder)
    found = remote.objects() if isinstance(remote, buckets.Path) else {}
    return [name for name in found if not _TRANSIENT.search(name)]


def clear(folder: pathlib.Path, kept: str) -> None:
    """Removes what a folder holds in its bucket, but for one file."""
    remote = origin(folder)
    found = [remote / name for name in names(folder) if name != kept]
    buckets.each(lambda path: path.unlink(missing_ok=True), found)


def _covered(path: pathlib.Path) -> bool:
    return not _scratch.fetched.isdisjoint((path, *path.parents))


def _fetch(path: pathlib.Path, remote: buckets.Path, most: int) -> None:
    """Copies what is not here as it is there; what is gone there goes here, too."""
    found = remote.objects()
    whole = found
    if not found and (alone := remote.object()):
        found = {'': alone}
    found = {name: o for name, o in found.items() if _wanted(name)}
    sizes: dict[str, int] = {}
    for name, o in found.items():
        first = name.partition('/')[0]
        sizes[first] = sizes.get(first, 0) + o.size
    chosen = {n: o for n, o in found.items() if sizes[n.partition('/')[0]] <= most}
    targets = {(path / name if name else path): o for name, o in chosen.items()}
    for each in [p for p in _scratch.seen if p.is_relative_to(path) and p not in targets]:
        name = each.relative_to(path).as_posix()
        if name not in whole and name != '.':
            each.unlink(missing_ok=True)
            del _scratch.seen[each]

    def one(target: pathlib.Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_file() and buckets.crc32c_of(target) == targets[target].checksum:
            return
        partial = target.with_name(f'{target.name}.{os.getpid()}.partial')
        origin(target).fetch(partial)
        partial.replace(target)

    buckets.each(one, targets)
    for target in targets:
        _scratch.seen[target] = _Seen(_state(target), time.monotonic())
    if len(chosen) == len(found):
        _scratch.fetched.add(path)


def _wanted(name: str) -> bool:
    if _LEFT.search(name) or name.endswith('/'):
        return False
    if f'/{IN_PLACE}/' in f'/{name}':
        return bool(_METAS.search(name))
    parts = name.split('/')
    return not {'', '.', '..'} & set(parts) or name == ''


def _keep() -> None:
    while not _scratch.ended.wait(EVERY_SECS):
        with contextlib.suppress(OSError, leases.Lost):
            for workdir in _scratch.workdirs:
                _copy(workdir, whole=False)


def _copy(workdir: pathlib.Path, whole: bool) -> None:
    """Brings a bucket up to the scratch folder.

    Args:
      whole: also files that grow and were copied a moment ago.
    """
    with _scratch.busy:
        leases.check()
        found = dict(_files(workdir))
        gone = [p for p in _scratch.seen if p.is_relative_to(workdir) and p not in found]
        gone = [p for p in gone if not _in_place(p, workdir)]
        last = [p for p in gone if _LAST.search(str(p))]
        _remove_there([p for p in gone if p not in last])
        group: list[pathlib.Path] = []
        now = time.monotonic()
        for path, state in sorted(found.items(), key=lambda item: item[1][1]):
            seen = _scratch.seen.get(path)
            if seen and (seen.state == state or not (whole or _due(seen, state, now))):
                continue
            if _DOCUMENT.search(str(path)):
                _put(group)
                group = []
                _put([path])
            else:
                group.append(path)
        _put(group)
        _remove_there(last)


def _due(seen: _Seen, state: tuple[int, int, int], now: float) -> bool:
    return now - seen.at >= state[0] / _BYTES_PER_SEC


def _put(paths: list[pathlib.Path]) -> None:
    def one(path: pathlib.Path) -> None:
        with contextlib.suppress(FileNotFoundError):  # removed since
            state = _state(path)
            content = path.read_bytes() if state[0] <= _SMALL else path
            origin(path).put(content)
            _scratch.seen[path] = _Seen(state, time.monotonic())

    buckets.each(one, paths)


def _remove_there(paths: list[pathlib.Path]) -> None:
    def one(path: pathlib.Path) -> None:
        origin(path).unlink(missing_ok=True)
        del _scratch.seen[path]

    buckets.each(one, paths)


def _files(workdir: pathlib.Path) -> Iterator[tuple[pathlib.Path, tuple[int, int, int]]]:
    for folder, folders, names in os.walk(workdir):
        here_ = pathlib.Path(folder)
        if here_ == workdir and IN_PLACE in folders:
            folders.remove(IN_PLACE)
        for name in names:
            path = here_ / name
            if not _TRANSIENT.search(str(path)):
                with contextlib.suppress(OSError):
                    state = _state(path)
                    yield path, state


def _in_place(path: pathlib.Path, workdir: pathlib.Path) -> bool:
    return IN_PLACE in path.relative_to(workdir).parts


def _state(path: pathlib.Path) -> tuple[int, int, int]:
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, 'no file', str(path))
    return found.st_size, found.st_mtime_ns, found.st_ino


def _clear(parent: pathlib.Path) -> None:
    """Removes scratch folders of processes that are no more."""
    for old in parent.glob('run-*'):
        with contextlib.suppress(OSError), (old / leases.LOCK).open('r') as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(old, ignore_errors=True)


def _remove() -> None:
    if _scratch:
        shutil.rmtree(_scratch.root, ignore_errors=True)
