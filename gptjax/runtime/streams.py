# SPDX-License-Identifier: Apache-2.0
"""Text in and out of a process, whatever its locale: every character, or its escape."""

import os
import sys


def set_up() -> None:
    """Makes standard streams and arguments ready for any text.

    Files and pipes are UTF-8; a terminal keeps its encoding, and shows as \\uXXXX what that lacks.
    A stream that was closed becomes os.devnull, so that no file takes its place.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
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
    sys.argv[:] = map(_typed, sys.argv)


def _typed(argument: str) -> str:
    """An argument as UTF-8, where its bytes are; else as the locale takes them."""
    try:
        return os.fsencode(argument).decode()
    except UnicodeError:
        return argument


def flush() -> bool:
    """Whether what was printed arrived; where nobody reads, no more is printed."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return False
    return True
