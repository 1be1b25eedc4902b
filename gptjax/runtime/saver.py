# SPDX-License-Identifier: Apache-2.0
"""Saves of a run in training: storage that is full, slow or failing is waited for, not died of."""

import logging
import time
from typing import Any

from gptjax.configs import errors
from gptjax.runtime import checkpoint, hosts, program
from gptjax.storage import leases

FIRST_SECS, _LONGEST_SECS = 5.0, 600.0
INSIST_SECS = 15.0  # how long a save is tried that a stop waits for
_SLOW_SECS = 30.0  # what training waits for a save under way before the next one is put off
_log = logging.getLogger(__name__)


class Saver:
    """Saves through Checkpoints; one that fails is tried again later, with the state of then."""

    def __init__(
        self, checkpoints: checkpoint.Checkpoints, give_up_minutes: float, saved: int
    ) -> None:
        """
        Args:
          give_up_minutes: how long saves may fail before the run ends; 0 = for ever.
          saved: the step that a checkpoint holds already, or 0.
        """
        self._checkpoints, self._begun = checkpoints, saved
        self._give_up_secs = 60 * give_up_minutes or float('inf')
        self._wait_secs = FIRST_SECS
        self._retry_at = float('inf')
        self._failing_since = 0.0  # by time.monotonic(); 0 = they do not
        self._ended: errors.InputError | None = None  # why no more can be saved

    def save(self, step: int, items: dict[str, Any], meta: dict) -> None:
        """Starts a save; where it, or the one before, fails, warns and goes on."""
        if hosts.agreed(not self._checkpoints.ended(_SLOW_SECS), what=f'saving step {step}')[0]:
            self._later('the save before is still under way: storage is slow')
            return
        self._look()
        self._retry_at = float('inf')
        try:
            self._checkpoints.save(step, items, meta)
            self._begun = step
        except (checkpoint.SaveError, leases.Lost) as e:
            self._later(e)

    def has(self, step: int) -> bool:
        """Whether a step is saved on all hosts; a save of it that is under way is waited for."""
        error = None
        try:
            self._checkpoints.wait()
        except (checkpoint.SaveError, leases.Lost) as e:
            error = e
            _log.warning('%s', e)
        lacks = error is not None or self._begun != step
        return not hosts.agreed(lacks, what=f'looking for the save of step {step}')[0]

    def insist(self, step: int, items: dict[str, Any], meta: dict, stopping: bool) -> None:
        """Saves and waits until it is whole, trying again.

        Args:
          stopping: for so long only as whoever stops the process may wait; else for
            give_up_minutes.

        Raises:
          SaveError: it could not be saved. Lost: the workdir is another's.
        """
        try:
            self._checkpoints.wait()
        except (checkpoint.SaveError, leases.Lost) as e:
            _log.warning('%s', e)

        long = max(INSIST_SECS, min(self._give_up_secs, _LONGEST_SECS))
        begun = time.monotonic()
        wait = 1.0
        while True:
            error = None
            try:
                self._checkpoints.save(step, items, meta)
                self._checkpoints.wait()
            except (checkpoint.SaveError, leases.Lost) as e:
                error = e
            soon = stopping or program.stop_requested()
            late = time.monotonic() + wait - begun > (INSIST_SECS if soon else long)
            late = late or isinstance(error, leases.Lost)
            failed, late = hosts.agreed(error is not None, late, what=f'saving step {step}')
            # What one host cannot save, none has saved: they try again, or give up, together.
            if not failed:
                self._begun = step
                return
            if late:
                raise error or checkpoint.SaveError(f'another host could not save step {step}')
            _log.warning('%s; again in %.0f s', error or 'another host could not save', wait)
            time.sleep(wait)
            wait = min(2 * wait, 60.0)

    def due(self) -> bool:
        """Whether a save that failed is to be tried again now."""
        self._look()
        return time.monotonic() >= self._retry_at

    def over(self) -> bool:
        """Whether no more can be saved: give_up_minutes are over, or the workdir is another's."""
        return self._ended is not None or leases.is_lost()

    def end_if(self, over: bool) -> None:
        """Raises InputError that says why no more can be saved. Args: over: on any host."""
        if over:
            leases.check()
            raise self._ended or checkpoint.SaveError('another host can save no more; see its log')

    def _look(self) -> None:
        """Learns how the save under way ended, if it has."""
        if self._checkpoints.done():
            try:
                self._checkpoints.wait()
            except (checkpoint.SaveError, leases.Lost) as e:
                self._later(e)
            else:
                self._wait_secs, self._failing_since = FIRST_SECS, 0.0

    def _later(self, why: errors.InputError | str) -> None:
        self._begun = -1
        if isinstance(why, leases.Lost):
            self._ended = why
            return
        now = time.monotonic()
        self._failing_since = self._failing_since or now
        failing = now - self._failing_since
        if failing > self._give_up_secs:
            self._ended = checkpoint.SaveError(
                f'{why}. That has been so for {failing / 60:.0f} minutes '
                '(checkpoint.give_up_minutes): what was trained since the last save is lost'
            )
        _log.warning('training goes on: %s. Trying again in %.0f s', why, self._wait_secs)
        self._retry_at = now + self._wait_secs
        self._wait_secs = min(2 * self._wait_secs, _LONGEST_SECS)
