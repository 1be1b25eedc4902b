# SPDX-License-Identifier: Apache-2.0
"""Jobs side by side in processes that end with this one, whatever ends it.

Signals are this process's to hear: in the others they are blocked from the start.
"""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection, process, resource_tracker
from typing import NamedTuple, TypeVar

from gptjax.configs import errors

Job = TypeVar('Job')
Result = TypeVar('Result')
_SAID_SECS = 0.2


def each(
    work: Callable[[Job, Callable[[int], None]], Result],
    jobs: Sequence[Job],
    processes: int,
    advance: Callable[[int], None],
) -> Iterator[Result]:
    """The results of jobs, as they come; of one process they are made in this one.

    Args:
      work: a function of a module; job, advance -> result. Job and result can be pickled.
      advance: what work() says there that it has done is said here, too.

    Raises:
      InputError: a process was killed. What work() raises.
    """
    processes = min(processes, len(jobs))
    if processes < 2:
        yield from (work(job, advance) for job in jobs)
        return
    left, busy, workers = iter(jobs), set(), []
    try:
        for place, worker in _begin(work, processes):
            workers.append(worker)
            busy.add(place)
            _send(place, next(left))
        while busy:
            for place in connection.wait(list(busy)):
                found = _received(place)
                if isinstance(found, _Done):
                    advance(found.more)
                    continue
                yield found
                busy.remove(place)
                for following in left:
                    busy.add(place)
                    _send(place, following)
                    break
    finally:
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.join()


def _begin(work: Callable, number: int) -> list[tuple[connection.Connection, process.BaseProcess]]:
    """Processes that wait for jobs."""
    context, begun = multiprocessing.get_context('spawn'), []
    resource_tracker.ensure_running()  # which unblocks signals as it begins
    with _signals_blocked():
        for _ in range(number):
            here, there = context.Pipe()
            worker = context.Process(target=_work, args=(work, there, os.getpid()), daemon=True)
            worker.start()
            there.close()
            begun.append((here, worker))
    return begun


def _send(place: connection.Connection, job: object) -> None:
    with _naming_death():
        place.send(job)


def _received(place: connection.Connection) -> object:
    with _naming_death():
        found = place.recv()
    if isinstance(found, Exception):
        raise found
    return found


@contextlib.contextmanager
def _naming_death() -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError) as e:
        raise errors.InputError(
            'a process at work was killed, perhaps for want of memory; let fewer of them run, and '
            'run the same command again: what was done is kept'
        ) from e


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """In this thread, and in the processes that it starts meanwhile."""
    ours = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ours)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(work: Callable, place: connection.Connection, parent: int) -> None:
    _die_with(parent)
    while True:
        try:
            job = place.recv()
        except (EOFError, OSError):  # nobody waits any more
            return
        told = _Told(place)
        try:
            found = work(job, told.advance)
            told.say()
        except OSError as e:
            found = e
        except Exception as e:
            # Of our own class: others may be impossible to send, or to read there.
            found = errors.InputError(str(e) if isinstance(e, errors.InputError) else repr(e))
        place.send(found)


class _Done(NamedTuple):
    """So much of a job is done since this was last said."""

    more: int


class _Told:
    """What a job says that it has done, told every now and then."""

    def __init__(self, place: connection.Connection) -> None:
        self._place, self._more, self._at = place, 0, time.monotonic()

    def advance(self, more: int) -> None:
        """Counts it."""
        self._more += more
        if time.monotonic() > self._at + _SAID_SECS:
            self.say()

    def say(self) -> None:
        """Tells it."""
        self._place.send(_Done(self._more))
        self._more, self._at = 0, time.monotonic()


def _die_with(parent: int) -> None:
    signalled_with_parent(signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def signalled_with_parent(number: signal.Signals) -> None:
    """Sends this process a signal when its parent ends, on Linux."""
    if sys.platform == 'linux':
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, number)
