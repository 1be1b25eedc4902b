# SPDX-License-Identifier: Apache-2.0
"""Saves of a run in training: storage that is full, slow or failing is waited for, not died of."""

import logging
import time
from typing import Any

from gptjax.runtime import checkpoint, program
from gptjax.storage import leases

FIRST_SECS, _LONGEST_SECS = 5.0, 600.0
INSIST_SECS = 15.0  # how long a save is tried that a stop waits for
_SLOW_SECS = 30.0  # what training waits for a save under way before the next one is put off
_log = logging.getLogger(__name__)


class Saver:
    """Saves through Checkpoints; one that fails is tried again later, with the state of then."""

    def __init__(self, checkpoints: checkpoint.Checkpoints, give_up_minutes: float) -> None:
        """Args: give_up_minutes: how long saves may fail before the run ends; 0 = for ever."""
        self._checkpoints = checkpoints
        self._give_up_secs = 60 * give_up_minutes or float('inf')
        self._wait_secs = FIRST_SECS
        self._retry_at = float('inf')
        self._failing_since = 0.0  # by time.monotonic(); 0 = they do not

    def save(self, step: int, items: dict[str, Any], meta: dict) -> None:
        """Starts a save; where it, or the one before, fails, warns and goes on.

        Raises:
          SaveError: they have failed for longer than give_up_minutes.
        """
        self._look()
        if program.agreed(not self._checkpoints.ended(_SLOW_SECS))[0]:
            self._later('the save before is still under way: storage is slow')
            return
        try:
            self._checkpoints.wait()
        except checkpoint.SaveError as e:
            self._later(e)
        self._retry_at = float('inf')
        try:
            self._checkpoints.save(step, items, meta)
        except checkpoint.SaveError as e:
            self._later(e)

    def insist(self, step: int, items: dict[str, Any], meta: dict, stopping: bool) -> None:
        """Saves and waits until it is whole, trying again.

        Args:
          stopping: for so long only as whoever stops the process may wait; else for
            give_up_minutes.

        Raises:
          SaveError: it could not be saved.
        """
        try:
            self._checkpoints.wait()
        except checkpoint.SaveError as e:
            _log.warning('%s', e)

        long = min(self._give_up_secs, _LONGEST_SECS)
        deadline = time.monotonic() + (INSIST_SECS if stopping else max(INSIST_SECS, long))
        wait = 1.0
        while True:
            error = None
            try:
                self._checkpoints.save(step, items, meta)
                self._checkpoints.wait()
            except checkpoint.SaveError as e:
                error = e
            late = time.monotonic() + wait > deadline
            failed, late = program.agreed(error is not None, late)
            # What one host cannot save, none has saved: they try again, or give up, together.
            if not failed:
                return
            if late:
                raise error or checkpoint.SaveError(f'another host could not save step {step}')
            _log.warning('%s; again in %.0f s', error or 'another host could not save', wait)
            time.sleep(wait)
            wait = min(2 * wait, 60.0)

    def due(self) -> bool:
        """Whether a save that failed is to be tried again now. Raises as save(), and Lost."""
        leases.check()
        self._look()
        return time.monotonic() >= self._retry_at

    def _look(self) -> None:
        """Learns how the save under way ended, if it has."""
        if self._checkpoints.done():
            try:
                self._checkpoints.wait()
            except checkpoint.SaveError as e:
                self._later(e)
            else:
                self._wait_secs, self._failing_since = FIRST_SECS, 0.0

    def _later(self, why: checkpoint.SaveError | str) -> None:
        now = time.monotonic()
        self._failing_since = self._failing_since or now
        failing = now - self._failing_since
        if failing > self._give_up_secs:
            raise checkpoint.SaveError(
                f'{why}. That has been so for {failing / 60:.0f} minutes '
                '(checkpoint.give_up_minutes): what was trained since the last save is lost'
            )
        _log.warning('training goes on: %s. Trying again in %.0f s', why, self._wait_secs)
        self._retry_at = now + self._wait_secs
        self._wait_secs = min(2 * self._wait_secs, _LONGEST_SECS)
