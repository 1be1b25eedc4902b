# SPDX-License-Identifier: Apache-2.0
"""Folders in buckets, as programs work in them: copied into a scratch folder of the process.

gs://bucket/name stands below it, at bucket/name. What is small comes with the workdir, what is
large when need() asks for it, checkpoints never: they are written and read in place.
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

from gptjax.configs import errors, written
from gptjax.storage import buckets, files, gcs, leases, retry

IN_PLACE = 'checkpoints'  # the folder of a workdir that is not copied
_OWN = '.work'
# What stays where it is: of writing, of holding the folder, of a program at work.
TRANSIENT = re.compile(rf'\.partial$|(^|/)\.(lease|lock|writable)[^/]*$|(^|/)\{_OWN}/')
SMALL = 2**26  # bytes of a folder, or of a file, that comes with its workdir
_WRITTEN_ONLY = re.compile(r'(^|/)(tensorboard|profile|xla)/')
_METAS = re.compile(rf'{IN_PLACE}/\d+/meta\.json$')
_log = logging.getLogger(__name__)


class Seen(NamedTuple):
    """A file of the scratch folder as it is in the bucket, too."""

    state: tuple[int, int, int]
    at: float  # when it was copied there


class Scratch:
    """The scratch folder of this process."""

    def __init__(self) -> None:
        parent = files.cache_dir() / 'scratch'
        parent.mkdir(parents=True, exist_ok=True)
        _clear(parent)
        begun = pathlib.Path(tempfile.mkdtemp(prefix='new-', dir=parent)).resolve()
        self.lock = (begun / leases.LOCK).open('w')
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX)
        except OSError as e:
            if e.errno not in leases.NO_LOCKS:  # then nobody can clear it while it is in use
                raise
        self.root = begun.rename(begun.with_name(begun.name.replace('new-', 'run-', 1)))
        self.workdirs: list[pathlib.Path] = []
        self.seen: dict[pathlib.Path, Seen] = {}
        self.fetched: set[pathlib.Path] = set()
        self.busy = threading.RLock()
        atexit.register(remove)

    def check(self) -> None:
        """Raises OSError where somebody has removed it."""
        if not (self.root / leases.LOCK).exists():
            raise OSError(errno.ENOENT, 'the scratch folder was removed', str(self.root))

    def keep(self) -> pathlib.Path:
        """Puts it where no process removes it. Returns where."""
        self.root = self.root.rename(
            self.root.with_name(self.root.name.replace('run-', 'kept-', 1))
        )
        return self.root


_scratch: Scratch | None = None


def here(name: str | os.PathLike) -> pathlib.Path:
    """The local path of a name, which may be in a bucket; nothing is copied."""
    global _scratch
    if '://' not in str(name):
        return pathlib.Path(name)
    path = buckets.of(str(name))
    _scratch = _scratch or Scratch()
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


def need(path: pathlib.Path, most: int = 2**62, own: bool = True) -> pathlib.Path:
    """Makes sure that a file, or all of a folder but checkpoints, is here. Returns the path.

    Args:
      most: bytes of a file or folder in it that are copied; larger ones stay away.
      own: whether it was written by gptjax: of the user's folders everything is wanted.
    """
    remote = origin(path)
    if isinstance(remote, buckets.Path):
        path = here(remote)
        with _scratch.busy:
            if not _covered(path):
                _fetch(path, remote, most, own)
    return path


def within(workdir: str | os.PathLike, name: str) -> pathlib.Path:
    """The local path of a name that is taken from a workdir where it is relative."""
    return small(here(name) if '://' in name else pathlib.Path(workdir, name))


def small(path: pathlib.Path) -> pathlib.Path:
    """need(), of what is small in a folder: large folders and files in it stay away."""
    return need(path, SMALL)


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
            small(path)
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
            path = here(remote)
            known = _scratch.fetched
            known -= {f for f in known if f.is_relative_to(path) or path.is_relative_to(f)}
            _fetch(path, remote, SMALL, own=True)


def told(text: str) -> str:
    """A text with buckets in place of the scratch folder."""
    return text if _scratch is None else text.replace(f'{_scratch.root}/', buckets.SCHEME)


@contextlib.contextmanager
def own_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """An empty folder below one that this process holds; its files go with it, to no bucket."""
    clear_own(folder)
    own = folder / _OWN
    own.mkdir(parents=True)
    try:
        yield own
    finally:
        clear_own(folder)


def clear_own(folder: pathlib.Path) -> None:
    """Removes what an ended process left there."""
    shutil.rmtree(folder / _OWN, ignore_errors=True)


def names(folder: pathlib.Path) -> list[str]:
    """What a folder holds in its bucket, also what was not copied; of a local one, nothing."""
    remote = origin(folder)
    found = remote.objects() if isinstance(remote, buckets.Path) else {}
    return [name for name in found if not TRANSIENT.search(name)]


def clear(folder: pathlib.Path, kept: str) -> None:
    """Removes what a folder holds in its bucket, but for one file."""
    remote = origin(folder)
    found = [remote / name for name in names(folder) if name != kept]
    buckets.each(lambda path: path.unlink(missing_ok=True), found)


def current() -> Scratch | None:
    """The scratch folder of this process; None where it needs none."""
    return _scratch


def state(path: pathlib.Path) -> tuple[int, int, int]:
    """Of a file: changes with its content. Raises OSError: it is none."""
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, 'no file', str(path))
    return found.st_size, found.st_mtime_ns, found.st_ino


def remove() -> None:
    """Removes the scratch folder: the process ends."""
    if _scratch and _scratch.root.name.startswith('run-'):
        shutil.rmtree(_scratch.root, ignore_errors=True)


def _covered(path: pathlib.Path) -> bool:
    return not _scratch.fetched.isdisjoint((path, *path.parents))


def _fetch(path: pathlib.Path, remote: buckets.Path, most: int, own: bool) -> None:
    """Copies what is not here as it is there; what is gone there goes here, too."""
    try:
        found = whole = remote.objects()
    except FileNotFoundError as e:
        raise errors.InputError(f'there is no bucket {buckets.SCHEME}{remote.bucket}') from e
    if not found and (alone := remote.object()):
        found = {'': alone}
    found = {name: o for name, o in found.items() if _wanted(name, own)}
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
            _scratch.seen[target] = Seen(state(target), time.monotonic())
            return
        partial = target.with_name(f'{target.name}.{os.getpid()}.partial')
        try:
            origin(target).fetch(partial)
        except FileNotFoundError:  # removed since it was listed
            partial.unlink(missing_ok=True)
            return
        partial.replace(target)
        _scratch.seen[target] = Seen(state(target), time.monotonic())

    buckets.each(one, targets)
    if len(chosen) == len(found):
        _scratch.fetched.add(path)


def _wanted(name: str, own: bool) -> bool:
    parts = name.split('/')
    if name and {'', '.', '..'} & {*parts}:
        return False
    if not own:
        return True
    if TRANSIENT.search(name) or _WRITTEN_ONLY.search(name):
        return False
    if f'/{IN_PLACE}/' in f'/{name}':
        return bool(_METAS.search(name))
    return True


def _clear(parent: pathlib.Path) -> None:
    """Removes scratch folders of processes that are no more."""
    for old in (*parent.glob('run-*'), *parent.glob('new-*')):
        with contextlib.suppress(OSError), (old / leases.LOCK).open('r') as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(old, ignore_errors=True)


WHERE = written.Where(workdir=open_workdir, other=lambda name: str(small(here(name))))
