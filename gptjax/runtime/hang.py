# SPDX-License-Identifier: Apache-2.0
"""Notices that training hangs: what every thread is at is said, and the process may end."""

import collections
import faulthandler
import logging
import statistics
import sys
import threading
import time

from gptjax.runtime import signals

LEAST_SECS, TIMES = 300.0, 10  # without the end of a step; the usual seconds of one
_log = logging.getLogger(__name__)


class Hang:
    """Watches steps from the end of the first one, which compiles, inside `with Hang(...)`."""

    def __init__(self, end: bool) -> None:
        """Args: end: the process then, with code 1, so that whoever started it does so again."""
        self._end = end
        self._steps: collections.deque[float] = collections.deque(maxlen=100)
        self._last = 0.0  # when a step ended; 0 = none has, or training waits
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name='hang', daemon=True).start()

    def step(self, secs: float) -> None:
        """A step has ended, after so long."""
        self._steps.append(secs)
        self._last = time.monotonic()

    def pause(self) -> None:
        """Training waits for an evaluation or a save."""
        self._last = 0.0

    def go_on(self) -> None:
        if self._steps:
            self._last = time.monotonic()

    def __enter__(self) -> 'Hang':
        return self

    def __exit__(self, *raised: object) -> None:
        self._closed.set()

    def _watch(self) -> None:
        limit = LEAST_SECS
        while not self._closed.wait(min(5.0, LEAST_SECS / 4)):
            last = self._last
            waited = time.monotonic() - last if last else 0.0
            usual = statistics.median(self._steps or [0.0])
            least = max(LEAST_SECS, TIMES * usual)
            if waited < least:
                limit = least
            elif waited >= limit:
                limit *= 2
                _log.warning(
                    'no step has ended for %.0f s (usual: %.1f s): another host, storage or a '
                    'device is waited for; what every thread is at:',
                    waited,
                    usual,
                )
                faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
                if self._end:
                    signals.leave(1, f'error: training hung for {waited:.0f} s, and was ended')
