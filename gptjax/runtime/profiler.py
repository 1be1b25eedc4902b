# SPDX-License-Identifier: Apache-2.0
"""Profiles of a few steps, for TensorBoard or xprof: of the first host, or of all."""

import logging
import pathlib
import threading
from typing import Literal

import jax

from gptjax.runtime import hosts
from gptjax.storage import mirror

Hosts = Literal['first', 'all']
_log = logging.getLogger(__name__)


class Profiler:
    """Writes a profile of a few steps to WORKDIR/profile, at a given step or when asked.

    Other hosts than the first, each into a folder of its own: profile/host-3.
    """

    def __init__(self, workdir: pathlib.Path, at_step: int, steps: int, of: Hosts) -> None:
        """Args: at_step: the first step; 0 = only when asked. of: whose steps are profiled then."""
        self._folder, self._steps, self._stop_at = workdir / 'profile', steps, -1
        self._sending: threading.Thread | None = None
        self._at = at_step if of == 'all' or hosts.is_first() else 0
        if not hosts.is_first():
            self._folder /= f'host-{jax.process_index()}'

    def before(self, step: int, asked: bool) -> None:
        """Called before every step; `asked` starts a profile of this host now."""
        if self._stop_at < 0 and (asked or (self._at and step == self._at)):
            try:
                jax.profiler.start_trace(str(self._folder))
            except Exception as e:  # never worth a run
                _log.warning('could not begin a profile: %s', e)
                return
            self._stop_at = step + self._steps
            _log.info('profiling steps %d to %d', step, self._stop_at - 1)
        elif step == self._stop_at:
            self._stop()

    def close(self) -> None:
        """Ends the profile under way, if there is one; all of them are where they belong then."""
        self._stop()
        if self._sending:
            self._sending.join()

    def _stop(self) -> None:
        if self._stop_at < 0:
            return
        self._stop_at = -1
        try:
            jax.profiler.stop_trace()
        except Exception as e:
            _log.warning('could not write the profile: %s', e)
            return
        _log.info('profile in %s; look at it with TensorBoard or xprof', self._folder)
        if not hosts.is_first():  # whose files are mirrored
            if self._sending:
                self._sending.join()
            self._sending = threading.Thread(target=self._send, name='profile', daemon=True)
            self._sending.start()  # no step of any host waits for it

    def _send(self) -> None:
        try:
            mirror.send(self._folder)
        except Exception as e:
            _log.warning('could not copy the profile: %s', e)
