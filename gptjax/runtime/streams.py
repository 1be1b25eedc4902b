# SPDX-License-Identifier: Apache-2.0
"""Text in and out of a process, whatever its locale: every character, or its escape."""

import contextlib
import os
import select
import sys

from gptjax.runtime import signals
from gptjax.storage import scratch


def set_up() -> None:
    """Makes standard streams, arguments and paths ready for any text.

    Where the locale is not UTF-8 the program begins again in Python's UTF-8 mode. Files and pipes
    are UTF-8; a terminal keeps its encoding, and shows as \\uXXXX what that lacks. A stream that
    was closed becomes os.devnull, so that no file takes its place.
    """
    if sys.getfilesystemencoding() != 'utf-8' and os.environ.get('PYTHONUTF8') != '1':
        terminal = sys.stdout.encoding if sys.stdout and sys.stdout.isatty() else 'utf-8'
        encoding = {'PYTHONIOENCODING': f'{terminal}:backslashreplace', 'PYTHONUTF8': '1'}
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **encoding})
    signals.fill_closed()
    for name in ('stdin', 'stdout', 'stderr'):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, 'r+', encoding='utf-8')  # noqa: SIM115
            setattr(sys, name, stream)
        elif name == 'stdin' or not hasattr(stream, 'reconfigure'):
            continue
        elif stream.isatty():
            stream.reconfigure(errors='backslashreplace')
        else:
            stream.reconfigure(encoding='utf-8', errors='backslashreplace')


def is_read() -> bool:
    """Whether standard output, where it is a pipe, has a reader; where not, no more is printed."""
    if has_reader():
        return True
    silence()
    return False


def has_reader() -> bool:
    """Whether standard output, where it is a pipe, has a reader."""
    output = select.poll()
    output.register(1, 0)
    return not any(event & select.POLLERR for _, event in output.poll(0))


def silence(number: int = 1) -> None:
    """A standard stream to os.devnull: else Python says again, when it ends, what went wrong."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), number)


def one_line(text: str) -> str:
    """A text with what does not print as its escape: it may quote files and flags.

    >>> one_line('a\\nb\\x1b[2J')
    'a\\\\nb\\\\x1b[2J'
    """
    if text.isprintable():
        return text
    return ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def say(line: str) -> None:
    """A line on standard error; where it cannot be written, nothing."""
    with contextlib.suppress(OSError):
        print(one_line(scratch.told(line)), file=sys.stderr, flush=True)


def settle() -> None:
    """Standard error, before Python ends: what it cannot take would change the exit code."""
    try:
        sys.stderr.flush()
    except OSError:
        silence(2)
