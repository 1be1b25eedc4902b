# SPDX-License-Identifier: Apache-2.0
"""A folder that one process at a time may write: a locked file, or a lease.

Buckets and file systems that lock no files have leases. One is an object that is created only where
there is none, and written again before its time ends; by storage's clock, no other. One whose
holder died is taken over when its time has ended.
"""

import contextlib
import errno
import fcntl
import json
import logging
import math
import os
import pathlib
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import IO

from gptjax.configs import checksum, errors
from gptjax.storage import buckets, files, lease_file, retry

LOCK, LEASE = '.lock', '.lease'
LOCK_SECS = 60.0  # longer than a stop with saving takes
LEASE_SECS, RENEW_SECS = 60.0, 15.0
_ANSWER_SECS = 10.0  # after which an answer is not waited for
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # of Lustre, and of some NFS
_log = logging.getLogger(__name__)


class Lost(errors.InputError):
    """Another process holds the folder now."""


@contextlib.contextmanager
def held(folder: buckets.Anywhere, secs: float | None = None) -> Iterator[None]:
    """Keeps other processes out, waiting for one that holds it to end, and saying so at once.

    Args:
      secs: how long it is waited for, LOCK_SECS where not said; a lease until its time has ended,
        at least.

    Raises:
      InputError: another one holds it for longer, by default than a stop with saving takes.
    """
    secs = LOCK_SECS if secs is None else secs
    if isinstance(folder, buckets.Path):
        path = folder / LEASE
        with _leased(_Lease(folder, path, secs, lambda: _now(path))):
            yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with _open(folder / LOCK) as f:
        locks = True
        try:
            _wait(lambda: _locked(f), folder, secs)
        except OSError as e:
            locks = e.errno not in NO_LOCKS
            if locks:
                raise
        if locks:
            f.truncate(0)
            files.appended(f, _name(), folder / LOCK)
            yield
            return
        line = (
            '%s is on a file system that locks no files: %s is written every %.0f s instead, and '
        )
        line += 'after a kill the next run waits for up to %.0f s'
        _log.warning(line, folder, LEASE, RENEW_SECS, LEASE_SECS)
        path = lease_file.Path(folder / LEASE)
        with _leased(_Lease(folder, path, secs, path.now)):
            yield


@contextlib.contextmanager
def _leased(lease: '_Lease') -> Iterator[None]:
    _leases[str(lease.folder)] = lease
    try:
        yield
    finally:
        if not lease.is_lost:  # else check() goes on to say so: nothing more is written
            del _leases[str(lease.folder)]
            lease.release()


def is_held(folder: buckets.Anywhere) -> bool:
    """Whether a process is at work in a folder now, as far as can be seen without waiting."""
    path: buckets.Path | lease_file.Path
    if isinstance(folder, buckets.Path):
        path = folder / LEASE
    elif not folder.is_dir():
        return False
    else:
        path = lease_file.Path(folder / LEASE)
        with contextlib.suppress(FileNotFoundError), (folder / LOCK).open('r') as f:
            try:
                fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            except OSError as e:
                if e.errno not in NO_LOCKS:
                    raise
    found = path.object()
    return found is not None and bool(_read(path)) and time.time() - found.updated < LEASE_SECS


def is_ours(name: str) -> bool:
    """Whether a file of this name in a folder is what holds it."""
    return name == LOCK or name.startswith(LEASE)


def check() -> None:
    """Before anything is written: renews a lease that may have run out.

    Raises:
      Lost: it has become another's. OSError: storage does not say.
    """
    for lease in list(_leases.values()):
        lease.check()


def is_lost() -> bool:
    """Whether it is known that a lease has become another's."""
    return any(lease.is_lost for lease in _leases.values())


def release_all() -> None:
    """Gives leases back, where the process ends now."""
    for lease in list(_leases.values()):
        lease.release()


class _Lease:
    def __init__(
        self,
        folder: buckets.Anywhere,
        path: buckets.Path | lease_file.Path,
        secs: float,
        now: Callable[[], float],
    ) -> None:
        """Args: now: by storage's clock, seconds since the epoch."""
        self.folder, self._path, self._now = folder, path, now
        self._lost = ''
        self._token = uuid.uuid4().hex  # machines' names and processes' numbers come again
        self._busy = threading.Lock()
        self._generation = 0
        # What a holder that is alive has renewed meanwhile is not ours; see _taken().
        _wait(self._taken, folder, max(secs, LEASE_SECS + RENEW_SECS))
        self._renewed = time.monotonic()
        self._ended = threading.Event()
        threading.Thread(target=self._keep, name='lease', daemon=True).start()

    @property
    def is_lost(self) -> bool:
        return bool(self._lost)

    def check(self) -> None:
        if not self._lost and time.monotonic() - self._renewed > LEASE_SECS - RENEW_SECS:
            self._renew()  # it may have run out unseen: this process was stopped, or cut off
        if self._lost:
            raise Lost(
                f'{self._lost} has taken {self.folder} over, as this process could not renew its '
                'lease in time; nothing more is written by this one'
            )

    def release(self) -> None:
        self._ended.set()  # and is not renewed any more
        with self._busy, contextlib.suppress(OSError), retry.patience(5.0):
            if not self._lost:
                self._path.unlink(generation=self._generation)

    def _taken(self) -> str:
        """Takes the lease; else who holds it."""
        with contextlib.suppress(FileExistsError):
            self._generation = self._put(0)
            return ''
        found = self._path.object()
        if found is None:
            return self._taken()
        if _read(self._path).get('token') == self._token:  # the answer was lost, not the lease
            self._generation = found.generation
            return ''
        holder = _holder(self._path)
        if self._now() - found.updated < LEASE_SECS:
            return holder
        try:
            self._generation = self._put(found.generation)
        except OSError:  # another was quicker
            return holder
        _log.warning('%s holds %s no more: its lease has run out', holder, self.folder)
        return ''

    def _keep(self) -> None:
        while not self._ended.wait(RENEW_SECS):
            try:
                self._renew()
            except Exception as e:  # the next one may do
                _log.debug('%s could not be renewed: %s', self._path, e)

    def _renew(self) -> None:
        with self._busy, retry.patience(RENEW_SECS):
            if self._lost or self._ended.is_set():
                return
            begun = time.monotonic()
            try:
                self._generation, self._renewed = self._put(self._generation), begun
            except (FileExistsError, FileNotFoundError):
                found = self._path.object()
                if found is None:  # somebody removed it
                    self._generation, self._renewed = self._put(0), begun
                elif _read(self._path).get('token') == self._token:  # its answer was lost
                    self._generation, self._renewed = found.generation, begun
                else:
                    self._lost = _holder(self._path)

    def _put(self, generation: int) -> int:
        said = json.dumps(checksum.sealed({'holder': _name(), 'token': self._token}))
        return self._path.put(said.encode(), generation, _ANSWER_SECS).generation


_leases: dict[str, _Lease] = {}


def _wait(taken: Callable[[], str], folder: buckets.Anywhere, secs: float) -> None:
    """Args: taken: takes it, and gives '', or who holds it."""
    deadline, told = time.monotonic() + secs, False
    while holder := taken():
        said = f'{holder} is at work in {folder}'
        if not told:
            told = True
            most = f'up to {secs:.0f} s ' if secs < math.inf else ''
            _log.warning('%s: waiting %sfor its end', said, most)
        if time.monotonic() > deadline:
            raise errors.InputError(
                f'{said}; stop it or use another --workdir (with --config.init_from={folder} '
                'where its weights are wanted)'
            )
        time.sleep(2.0 if isinstance(folder, buckets.Path) else 0.2)


def _now(path: buckets.Path) -> float:
    """By the clock of its storage."""
    probe = path.with_name(f'{path.name}-{os.uname().nodename}-{os.getpid()}')
    now = probe.put(b'').updated
    probe.unlink(missing_ok=True)
    return now


def _locked(f: IO) -> str:
    try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return ''
    except BlockingIOError:
        f.seek(0)
        return f.read() or 'another process'


def _open(path: pathlib.Path) -> IO:
    try:
        return files.open_(path, 'a+')
    except OSError as e:
        if path.is_symlink():
            raise errors.InputError(f'{path} is a symbolic link; remove it') from e
        raise


def _name() -> str:
    program = pathlib.Path(sys.argv[0]).stem
    return f'process {os.getpid()} on {os.uname().nodename} ({program})'


def _holder(path: buckets.Path | lease_file.Path) -> str:
    return str(_read(path).get('holder', 'another process'))


def _read(path: buckets.Path | lease_file.Path) -> dict[str, str]:
    try:
        found = checksum.opened(json.loads(path.read_bytes()))
        return found if isinstance(found, dict) else {}
    except (FileNotFoundError, ValueError):
        return {}
