# SPDX-License-Identifier: Apache-2.0
"""Jobs side by side in processes that end with this one, whatever ends it.

Signals are this process's to hear: in the others they are blocked from the start.
"""

import collections
import contextlib
import ctypes
import functools
import itertools
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection, resource_tracker
from typing import Any, NamedTuple, TypeVar

from gptjax.configs import errors

Job = TypeVar('Job')
Result = TypeVar('Result')
AHEAD = 4  # jobs of each process that are done before they are wanted, at most
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
    left = iter(jobs)
    with contextlib.closing(_Pool(functools.partial(_one, work), processes)) as pool:
        while True:
            for job in itertools.islice(left, len(pool.idle)):
                pool.give(job)
            if not pool.busy:
                return
            for _, said in pool.answers(advance):
                if isinstance(said, _Result):
                    yield said.value


def in_order(
    work: Callable[[Job, Callable[[int], None]], Iterator[Result]],
    jobs: Sequence[Job],
    processes: int,
    advance: Callable[[int], None],
) -> Iterator[Result]:
    """The results of the first job, as it gives them, then those of the next, and so on.

    Later jobs are done meanwhile, up to AHEAD a process.

    Args:
      work: as for each(), but it gives any number of results.

    Raises:
      as each().
    """
    processes = min(processes, len(jobs))
    if processes < 2:
        for job in jobs:
            yield from work(job, advance)
        return
    numbers: dict[connection.Connection, int] = {}
    held: dict[int, collections.deque] = collections.defaultdict(collections.deque)
    begun = 0
    with contextlib.closing(_Pool(work, processes)) as pool:
        for first in range(len(jobs)):
            while True:
                while pool.idle and begun < min(len(jobs), first + AHEAD * processes):
                    numbers[pool.give(jobs[begun])] = begun
                    begun += 1
                while held[first] and isinstance(held[first][0], _Result):
                    yield held[first].popleft().value
                if held[first]:
                    break
                for place, said in pool.answers(advance):
                    held[numbers[place]].append(said)
            del held[first]


class _Pool:
    """Processes that do jobs."""

    def __init__(self, work: Callable, number: int) -> None:
        self._workers, self.busy = [], set()
        self.idle: list[connection.Connection] = []
        context = multiprocessing.get_context('spawn')
        resource_tracker.ensure_running()  # which unblocks signals as it begins
        with _signals_blocked():
            for _ in range(number):
                here, there = context.Pipe()
                worker = context.Process(target=_work, args=(work, there, os.getpid()), daemon=True)
                worker.start()
                there.close()
                self._workers.append(worker)
                self.idle.append(here)

    def give(self, job: object) -> connection.Connection:
        """Has an idle process do a job. Returns where it will answer."""
        place = self.idle.pop()
        with _naming_death():
            place.send(job)
        self.busy.add(place)
        return place

    def answers(
        self, advance: Callable[[int], None]
    ) -> 'Iterator[tuple[connection.Connection, _Result | _Ended]]':
        """Waits for some: results; an end, from whoever is idle again."""
        for place in connection.wait(list(self.busy)):
            said = _received(place)
            if isinstance(said, _Done):
                advance(said.more)
                continue
            if isinstance(said, _Ended):
                self.busy.remove(place)
                self.idle.append(place)
            yield place, said

    def close(self) -> None:
        """Ends the processes."""
        for worker in self._workers:
            worker.kill()
        for worker in self._workers:
            worker.join()


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


def _one(work: Callable, job: object, advance: Callable[[int], None]) -> Iterator[Any]:
    """A job that gives one result, as one that gives any number."""
    yield work(job, advance)


def _work(work: Callable, place: connection.Connection, parent: int) -> None:
    _die_with(parent)
    while True:
        try:
            job = place.recv()
        except (EOFError, OSError):  # nobody waits any more
            return
        told = _Told(place)
        try:
            for one in work(job, told.advance):
                told.say()
                place.send(_Result(one))
            told.say()
            place.send(_Ended())
        except OSError as e:
            place.send(e)
        except Exception as e:
            # Of our own class: others may be impossible to send, or to read there.
            said = str(e) if isinstance(e, errors.InputError) else repr(e)
            place.send(errors.InputError(said))


class _Result(NamedTuple):
    """What a job has given."""

    value: Any


class _Ended(NamedTuple):
    """A job has given all."""


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
