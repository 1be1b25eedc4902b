# SPDX-License-Identifier: Apache-2.0
"""Commands side by side on one machine: cheapest first, within its cores and memory."""

import glob
import logging
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any, NamedTuple

from gptjax.configs import errors
from gptjax.runtime import program, signals

WAITING, RUNNING, DONE, FAILED, BLOCKED = 'waiting', 'running', 'done', 'failed', 'blocked'
_TRIES = 2
_POLL_SECS = 0.1
_TAIL_BYTES = 4096
_ACCELERATORS = ('/dev/accel[0-9]*', '/dev/vfio/[0-9]*', '/dev/nvidia[0-9]*')
# Code that runs between fork and exec would be run in a copy of JAX's threads.
_WITH_PARENT = """
import ctypes, os, sys
if sys.platform == 'linux':
    ctypes.CDLL(None).prctl(1, 15)  # PR_SET_PDEATHSIG, SIGTERM
if os.getppid() != int(sys.argv[1]):
    sys.exit(75)
os.execv(sys.argv[2], sys.argv[2:])
"""
_log = logging.getLogger(__name__)


class Job(NamedTuple):
    """A command, which can be run again after any end and then goes on where it was.

    Attributes:
      cost: in any unit; the cheapest that can begin is begun first.
      memory: bytes it takes.
      after: names of those that must be done before.
      log: where its output goes, behind what stands there.
    """

    name: str
    command: Sequence[str]
    cost: float
    memory: float
    after: frozenset[str]
    log: pathlib.Path


class Room(NamedTuple):
    """What there is to run in.

    Attributes:
      slots: sets of cores, each for one job at a time; an empty set = all cores.
      memory: bytes, for all jobs together; one job alone is run whatever it takes.
    """

    slots: Sequence[frozenset[int]]
    memory: float


def room(cores_a_job: int, at_once: int) -> Room:
    """This machine's: its cores, or, where it has accelerators, one job at a time.

    Args:
      cores_a_job: of its own; 0 = all of them, for one job at a time.
      at_once: jobs, at most; 0 = as many as there is room for.

    Raises:
      UsageError: it has fewer cores.
    """
    cores = sorted(os.sched_getaffinity(0))
    errors.require(
        cores_a_job <= len(cores), f'--cores_a_point={cores_a_job}: this machine has {len(cores)}'
    )
    number = len(cores) // cores_a_job if cores_a_job else 1
    slots = [frozenset(cores[i * cores_a_job : (i + 1) * cores_a_job]) for i in range(number)]
    on_cpu = os.environ.get('JAX_PLATFORMS') == 'cpu'
    if not on_cpu and any(glob.glob(pattern) for pattern in _ACCELERATORS):
        slots = [frozenset()]
    free = os.sysconf('SC_AVPHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    return Room(slots[: at_once or None], 0.9 * max(free, _available()))


def run(
    jobs: Sequence[Job],
    within: Room,
    is_hopeless: Callable[[Job], bool],
    show: Callable[[Mapping[str, str]], None],
) -> dict[str, str]:
    """Runs jobs, each as soon as it can be; one that fails is tried once more.

    Args:
      is_hopeless: whether a job that has failed would fail again.
      show: is told the state of every job, again and again.

    Returns:
      The state of each: DONE, FAILED, or BLOCKED by one that failed.

    Raises:
      program.Preempted: a signal came, was passed on, and all have ended.
    """
    runner = _Runner(jobs, within, is_hopeless)
    with signals.handled(runner.stop):
        while runner.goes_on():
            show(runner.states)
            time.sleep(_POLL_SECS)
    show(runner.states)
    if runner.stopping:
        raise program.Preempted
    return runner.states


def last_line(log: pathlib.Path) -> str:
    """What a job said last; '' = nothing."""
    try:
        with log.open('rb') as f:
            f.seek(max(0, f.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = f.read().decode(errors='replace').strip().splitlines()
    except OSError:
        return ''
    return lines[-1].strip() if lines else ''


class _Child(NamedTuple):
    job: Job
    process: subprocess.Popen
    slot: frozenset[int]


class _Runner:
    def __init__(
        self, jobs: Sequence[Job], within: Room, is_hopeless: Callable[[Job], bool]
    ) -> None:
        self._waiting = sorted(jobs, key=lambda job: job.cost)
        self._free, self._memory = list(within.slots), within.memory
        self._is_hopeless = is_hopeless
        self._children: list[_Child] = []
        self._tries = dict.fromkeys((job.name for job in jobs), 0)
        self.states = dict.fromkeys((job.name for job in jobs), WAITING)
        self.stopping = False

    def stop(self) -> None:
        """Passes a stop on; called by the thread that hears of signals."""
        self.stopping = True
        for child in list(self._children):
            child.process.send_signal(signal.SIGTERM)

    def goes_on(self) -> bool:
        """Begins what can begin, ends what has ended. Returns whether anything runs."""
        for child in list(self._children):
            code = child.process.poll()
            if code is not None:
                self._children.remove(child)
                self._free.append(child.slot)
                self._settle(child.job, code)
        for job in self._ready():
            if self.stopping or not self._free:
                break
            if self._children and job.memory > self._memory_left():
                break  # the cheapest first: what is dearer does not pass it
            self._begin(job)
        return bool(self._children)

    def _ready(self) -> Iterator[Job]:
        """Those that may begin; whoever waits for what has failed is passed over, for good."""
        for job in list(self._waiting):
            before = {self.states.get(name, DONE) for name in job.after}
            if before & {FAILED, BLOCKED}:
                self.states[job.name] = BLOCKED
                self._waiting.remove(job)
            elif before <= {DONE}:
                yield job

    def _memory_left(self) -> float:
        return self._memory - sum(child.job.memory for child in self._children)

    def _begin(self, job: Job) -> None:
        self._waiting.remove(job)
        slot = self._free.pop(0)
        self._tries[job.name] += 1
        self.states[job.name] = RUNNING
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with job.log.open('ab') as log:
            child = _Child(job, _started(job, slot, log), slot)
        self._children.append(child)
        if self.stopping:  # since before it was there; twice is as once
            child.process.send_signal(signal.SIGTERM)

    def _settle(self, job: Job, code: int) -> None:
        if code == 0:
            self.states[job.name] = DONE
            return
        stopped = code in (program.PREEMPTED, -signal.SIGTERM)
        if self.stopping or (stopped and self._tries[job.name] < _TRIES):
            self._again(job)
            return
        why = f'{job.name} failed, exit code {code}: {last_line(job.log)}'
        hopeless = code == program.WRONG_USAGE or self._is_hopeless(job)
        if self._tries[job.name] < _TRIES and not hopeless:
            _log.warning('%s; it is tried once more', why)
            self._again(job)
            return
        _log.warning('%s; all it said is in %s', why, job.log)
        self.states[job.name] = FAILED

    def _again(self, job: Job) -> None:
        self.states[job.name] = WAITING
        self._waiting = sorted([*self._waiting, job], key=lambda job: job.cost)


def _started(job: Job, slot: frozenset[int], log: IO[Any]) -> subprocess.Popen:
    """Begins a job on its cores; it is asked to stop where this process ends."""
    ours = os.sched_getaffinity(0)
    if slot:
        os.sched_setaffinity(0, slot)  # which a child inherits
    try:
        return subprocess.Popen(
            [sys.executable, '-c', _WITH_PARENT, str(os.getpid()), *job.command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            process_group=0,  # of its own: Ctrl-C reaches us alone, and is passed on once
        )
    finally:
        os.sched_setaffinity(0, ours)


def _available() -> float:
    """Bytes that the system would find for a new process, what it only caches included."""
    try:
        for line in pathlib.Path('/proc/meminfo').read_text().splitlines():
            if line.startswith('MemAvailable:'):
                return float(line.split()[1]) * 1024
    except OSError:
        pass
    return 0.0
