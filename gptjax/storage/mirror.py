# SPDX-License-Identifier: Apache-2.0
"""What changes in the scratch folder of a workdir goes to its bucket, every few seconds.

Removals first, then files in the order of their writing, so that what commits others comes behind
them there as here. A file that grows is copied whole, the larger the more rarely.
"""

import contextlib
import logging
import os
import pathlib
import re
import threading
import time
from collections.abc import Iterator

from gptjax.configs import errors
from gptjax.storage import buckets, leases, retry, scratch

EVERY_SECS = 5.0
_DOCUMENT = re.compile(r'(\.json|/SHA256SUMS)$')  # may commit what was written before
_LAST = re.compile(r'/\.unfinished$')  # removed behind everything else
_BYTES_PER_SEC = 2**20  # of a file that grows, copied again and again
_CLOSE_SECS = 60.0  # how long the last files are tried
_SAID_SECS = 60.0  # so often what is wrong is said
_LEAVE_SECS = 3.0  # the same, where whoever stops the process may not wait
_log = logging.getLogger(__name__)


class _Mirror:
    """What copies, in a thread of its own."""

    def __init__(self, folder: scratch.Scratch) -> None:
        self.folder, self.ended = folder, threading.Event()
        threading.Thread(target=self._keep, name='mirror', daemon=True).start()

    def _keep(self) -> None:
        said = -_SAID_SECS
        while not self.ended.wait(EVERY_SECS):
            try:
                for workdir in self.folder.workdirs:
                    _copy(workdir, whole=False)
            except Exception as e:
                if time.monotonic() - said >= _SAID_SECS:
                    said = time.monotonic()
                    _log.warning('what changes is not copied to its bucket now: %s', e)


_mirror: _Mirror | None = None


@contextlib.contextmanager
def mirroring(first: bool) -> Iterator[None]:
    """While open, what changes in workdirs goes to their buckets; all of it, when it ends.

    Args:
      first: whether this is the first of several hosts, which does it.

    Raises:
      InputError: it could not be written; it stays in the scratch folder, which the line names.
    """
    if first:
        begin()
    try:
        yield
    except BaseException:
        try:
            end()
        except errors.InputError as e:
            _log.warning('%s', e)
        raise
    end()


@contextlib.contextmanager
def synced() -> Iterator[None]:
    """sync() at the end, while a lease is still held; after an error as far as it can be."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError, errors.InputError), retry.patience(_LEAVE_SECS):
            sync()
        raise
    sync()


def begin() -> None:
    """Begins to copy what changes in workdirs to their buckets, every few seconds."""
    global _mirror
    found = scratch.current()
    if found and found.workdirs and (_mirror is None or _mirror.folder is not found):
        _mirror = _Mirror(found)


def sync() -> None:
    """Returns when all that was written is in its bucket. Raises OSError where it cannot be."""
    if mirror := _running():
        for workdir in mirror.folder.workdirs:
            _copy(workdir, whole=True)


def send(folder: pathlib.Path) -> None:
    """Copies what a folder holds to its bucket now: of a host that mirrors nothing."""
    found = [(path, scratch.origin(path)) for path, _ in _files(folder)]
    buckets.each(
        lambda pair: pair[1].put(pair[0]),
        [pair for pair in found if isinstance(pair[1], buckets.Path)],
    )


def end() -> None:
    """sync(), for the last time. Raises InputError as mirroring()."""
    mirror = _running()
    if mirror is None:
        return
    mirror.ended.set()
    try:
        with retry.patience(_CLOSE_SECS):
            sync()
    except Exception as e:
        where = ', '.join(str(scratch.origin(workdir)) for workdir in mirror.folder.workdirs)
        kept = mirror.folder.keep()
        if isinstance(e, leases.Lost):
            raise
        raise errors.InputError(
            f'{where} cannot be written ({e}); what it lacks is kept in {kept}: copy it there, or '
            'run the same command again, which goes on from the last checkpoint'
        ) from e


def leave() -> None:
    """Before the process ends at once: what can be copied in a moment, and leases given back."""
    if scratch.current() is None:
        return
    ending = threading.Thread(target=_leave, daemon=True)  # storage may not answer
    ending.start()
    ending.join(2 * _LEAVE_SECS)


def _leave() -> None:
    mirror = _running()
    if mirror and not mirror.ended.is_set() and mirror.folder.busy.acquire(timeout=_LEAVE_SECS):
        mirror.ended.set()
        with contextlib.suppress(Exception), retry.patience(_LEAVE_SECS):
            sync()
        mirror.folder.busy.release()
    with contextlib.suppress(Exception):
        leases.release_all()
    scratch.remove()


def _running() -> _Mirror | None:
    """The mirror of the scratch folder of now."""
    found = scratch.current()
    return _mirror if _mirror and found and _mirror.folder is found else None


def _copy(workdir: pathlib.Path, whole: bool) -> None:
    """Brings a bucket up to the scratch folder.

    Args:
      whole: also files that grow and were copied a moment ago.
    """
    folder = scratch.current()
    with folder.busy:
        leases.check()
        found = dict(_files(workdir))
        gone = [p for p in folder.seen if p.is_relative_to(workdir) and p not in found]
        gone = [p for p in gone if not _in_place(p, workdir) and _is_gone(p)]
        folder.check()  # else all of it is gone, which says nothing of the bucket
        last = [p for p in gone if _LAST.search(str(p))]
        _remove_there([p for p in gone if p not in last])
        group: list[pathlib.Path] = []
        early: list[pathlib.Path] = []  # files that grow, which were copied a moment ago
        now = time.monotonic()
        for path, state in sorted(found.items(), key=_order):
            seen = folder.seen.get(path)
            if seen and seen.state == state:
                continue
            if seen and not (whole or _due(seen, state, now)):
                early.append(path)
            elif _DOCUMENT.search(str(path)):
                _put(group + early)
                group, early = [], []
                _put([path])
            else:
                group.append(path)
        _put(group + (early if last else []))
        _remove_there(last)


def _order(item: tuple[pathlib.Path, tuple[int, int, int]]) -> tuple[int, bool]:
    """By the time of writing; of one moment, documents last."""
    path, state = item
    return state[1], bool(_DOCUMENT.search(str(path)))


def _is_gone(path: pathlib.Path) -> bool:
    """Whether there is no such file, for sure."""
    try:
        path.lstat()
    except FileNotFoundError:
        return True
    except OSError:
        pass
    return False


def _due(seen: scratch.Seen, state: tuple[int, int, int], now: float) -> bool:
    return now - seen.at >= state[0] / _BYTES_PER_SEC


def _put(paths: list[pathlib.Path]) -> None:
    def one(path: pathlib.Path) -> None:
        try:
            state = scratch.state(path)
            content = path.read_bytes() if state[0] <= scratch.SMALL else path
        except FileNotFoundError:  # removed since
            return
        scratch.origin(path).put(content)
        scratch.current().seen[path] = scratch.Seen(state, time.monotonic())

    buckets.each(one, paths)


def _remove_there(paths: list[pathlib.Path]) -> None:
    def one(path: pathlib.Path) -> None:
        scratch.origin(path).unlink(missing_ok=True)
        del scratch.current().seen[path]

    buckets.each(one, paths)


def _files(workdir: pathlib.Path) -> Iterator[tuple[pathlib.Path, tuple[int, int, int]]]:
    for folder, folders, names in os.walk(workdir, onerror=_raise):
        here_ = pathlib.Path(folder)
        if here_ == workdir and scratch.IN_PLACE in folders:
            folders.remove(scratch.IN_PLACE)
        for name in names:
            path = here_ / name
            if not scratch.TRANSIENT.search(str(path)):
                with contextlib.suppress(OSError):
                    state = scratch.state(path)
                    yield path, state


def _in_place(path: pathlib.Path, workdir: pathlib.Path) -> bool:
    return scratch.IN_PLACE in path.relative_to(workdir).parts


def _raise(error: OSError) -> None:
    raise error
