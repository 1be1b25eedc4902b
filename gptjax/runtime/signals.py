# SPDX-License-Identifier: Apache-2.0
"""What SIGTERM, SIGINT and SIGHUP do, at any moment: imports and compilation included.

No handler raises: what stands in the main thread may be a compiler's code, or a library's that
swallows exceptions. A thread of its own hears of every signal and acts at once: it ends the program
with exit code STOPPED, or, while there is something to save, asks for that by stop_requested().
Nothing heavy is imported: gptjax/__init__.py installs this before a program's imports begin.
"""

import atexit
import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

STOPPED = 75
LINE = 'stopped; run the same command again to go on'
SAME_SECS = 1.0  # a signal so soon after the last one is the same request: groups send twice
_NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_LAST = 0  # in the pipe, behind all signals
_SAY_SECS = 1.0  # most that a line waits for its reader


class _State:
    write_end = -1  # of the pipe that Python writes the numbers of signals to
    graceful = False
    requested = False
    alone = True
    unsaved = ''  # what would be lost by ending now
    heard_at = -SAME_SECS  # the last signal that was a request of its own
    bars = 0  # drawn on the terminal now
    handler: Callable[[], None] | None = None
    at_end: list[Callable[[], None]] = []
    code: int | None = None  # of a program that has ended
    all_heard = threading.Event()
    leaving = threading.Lock()  # never released: only one thread ends the process


def install() -> None:
    """Takes the three signals over; again, where a library took them since.

    One that was ignored from the start, as SIGHUP under nohup, stays so.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    if _State.write_end < 0:
        fill_closed()
        read_end, _State.write_end = os.pipe()
        os.set_blocking(_State.write_end, False)
        atexit.register(_leave_at_last)  # the first that is registered is called last
        threading.Thread(target=_listen, args=(read_end,), name='signals', daemon=True).start()
    signal.set_wakeup_fd(_State.write_end, warn_on_full_buffer=False)
    for number in _NUMBERS:  # last: one that came before somebody listens would be lost
        if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _nothing)


def fill_closed() -> None:
    """Puts os.devnull where standard streams were closed, so that no file takes their place."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)


def stop_requested() -> bool:
    """Whether a signal has asked for what graceful() promises: to save, then to end."""
    return _State.requested


def several_hosts() -> None:
    """Says that other hosts wait for this one: a stop is agreed upon with them."""
    _State.alone = False


def is_alone() -> bool:
    """Whether no other host waits for this one."""
    return _State.alone


@contextlib.contextmanager
def graceful() -> Iterator[None]:
    """While open, a signal sets stop_requested(); a second one ends the program at once.

    Where nothing is unsaved(), the first one does, too.
    """
    _State.requested, _State.graceful, _State.unsaved = False, True, ''
    try:
        yield
    finally:
        _State.graceful, _State.unsaved = False, ''


def unsaved(what: str) -> None:
    """Says what would be lost now if a graceful() program ended at once; '' = nothing."""
    _State.unsaved = what


@contextlib.contextmanager
def handled(by: Callable[[], None]) -> Iterator[None]:
    """While open, a signal calls a function, in another thread, and does nothing else."""
    _State.handler = by
    try:
        yield
    finally:
        _State.handler = None


def at_end(do: Callable[[], None]) -> None:
    """Has a function called before leave() ends the process, in whichever thread; it is quick."""
    _State.at_end.append(do)


def bar_drawn(more: int) -> None:
    """Counts the bars that stand on the terminal: a line begins below them."""
    _State.bars += more


def unread() -> bool:
    """Takes a closed standard error for a first signal, inside graceful(); whether it is open."""
    if _State.graceful and not _State.requested:
        _request('')
    return _State.graceful


def ended(code: int) -> None:
    """Says what the process, which now takes itself down, will end with."""
    _State.code = code


def code() -> int | None:
    """What the process ends with; None while it goes on."""
    return _State.code


def leave(code: int, line: str = LINE) -> None:
    """Ends the process and its children now, with a line on standard error.

    No destructor runs: beside the threads of XLA, they crash.
    """
    _State.leaving.acquire()
    _State.code = code
    flushing = threading.Thread(target=_flush, daemon=True)  # whose lock another may hold
    with contextlib.suppress(RuntimeError):
        flushing.start()
        flushing.join(0.2)
    _end_children()
    if line:
        _say(line)
    for do in _State.at_end:
        with contextlib.suppress(Exception):
            do()
    os._exit(code)


def _leave_at_last() -> None:
    """Ends the process where Python would begin with destructors: a signal is heard until here."""
    if _State.code is not None:
        for number in _NUMBERS:
            signal.signal(number, signal.SIG_IGN)
        with contextlib.suppress(OSError):
            os.write(_State.write_end, bytes([_LAST]))
            _State.all_heard.wait(1.0)
        _State.leaving.acquire()
        _flush()
        os._exit(_State.code)


def _nothing(number: int, frame: object) -> None:
    """The handler: that there is one makes Python write the number to the pipe."""
    del number, frame


def _listen(read_end: int) -> None:
    while numbers := os.read(read_end, 64):
        for number in numbers:
            if number in _NUMBERS:
                _hear(signal.Signals(number).name)
            elif number == _LAST:
                _State.all_heard.set()


def _hear(name: str) -> None:
    now = time.monotonic()
    same = now - _State.heard_at < SAME_SECS
    if not same:
        _State.heard_at = now
    if _State.handler is not None:
        if not same:
            _State.handler()
    elif not _State.graceful:
        leave(STOPPED)
    elif not _State.requested:
        _request(name)
    elif same:
        pass
    elif _State.unsaved:
        leave(STOPPED, f'stopped at once: {_State.unsaved} are lost; run the same command again')
    else:
        leave(STOPPED)


def _request(name: str) -> None:
    if _State.alone and not _State.unsaved:
        leave(STOPPED)
    _State.requested = True
    if name:
        _say(f'{name}: finishing this step and saving; once more to stop at once')


def _say(line: str) -> None:
    """Writes a line to standard error, below a bar; where nobody reads it, it is left out."""
    below = '\n' if _State.bars > 0 else ''
    with contextlib.suppress(OSError):
        ready = select.poll()
        ready.register(2, select.POLLOUT)
        if ready.poll(1000 * _SAY_SECS):
            os.write(2, f'{below}{line}\n'.encode())


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


def _end_children() -> None:
    """Of multiprocessing, where it is in use: nothing of theirs is half done that matters."""
    if processes := sys.modules.get('multiprocessing.process'):
        with contextlib.suppress(Exception):
            for child in processes.active_children():
                child.kill()
