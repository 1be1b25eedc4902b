# SPDX-License-Identifier: Apache-2.0
"""Storage that fails for a moment is tried again, after longer and longer waits."""

import contextlib
import contextvars
import errno
import logging
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import tenacity

from gptjax.configs import errors

PATIENCE_SECS = 30.0
FIRST_SECS, LONGEST_SECS = 0.5, 20.0
_EVERY_SECS = 60.0  # so often at most a failure is said that is tried again
# What waiting does not mend.
_LASTING = {errno.ENOENT, errno.EEXIST, errno.EACCES, errno.EPERM}
_LASTING |= {errno.ENOTDIR, errno.EISDIR, errno.EROFS, errno.EINVAL}
_log = logging.getLogger(__name__)
T = TypeVar('T')


class _Said:
    at = -_EVERY_SECS


_patience: contextvars.ContextVar[float | None] = contextvars.ContextVar('secs', default=None)


def call(what: str, function: Callable[[], T], failure: type[Exception] = OSError) -> T:
    """function(), tried again while it raises `failure`; waits have jitter.

    Patience ends so long after the first failure.

    Args:
      what: for the log, as 'reading the checkpoint'.

    Raises:
      failure: the last one, or at once where waiting would not mend it.
    """

    failed: list[float] = []

    def passes(error: BaseException) -> bool:
        failed.append(time.monotonic())
        if isinstance(error, errors.InputError):  # said already
            return False
        return isinstance(error, failure) and getattr(error, 'errno', None) not in _LASTING

    def say(state: tenacity.RetryCallState) -> None:
        now = time.monotonic()
        if now - _Said.at >= _EVERY_SECS:
            _Said.at = now
            error = state.outcome.exception() if state.outcome else ''
            _log.warning('%s failed (%s); trying again', what, error)

    asked = _patience.get()
    secs = PATIENCE_SECS if asked is None else asked
    trying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(passes),
        wait=tenacity.wait_random_exponential(FIRST_SECS, LONGEST_SECS),
        stop=lambda state: time.monotonic() - failed[0] >= secs,  # a long transfer is none
        before_sleep=say,
        reraise=True,
    )
    return trying(function)


@contextlib.contextmanager
def patience(secs: float) -> Iterator[None]:
    """How long call() tries meanwhile, in this thread and in those that buckets.each() uses."""
    before = _patience.set(secs)
    try:
        yield
    finally:
        _patience.reset(before)
