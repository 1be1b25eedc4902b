# SPDX-License-Identifier: Apache-2.0
"""Saves of a run in training: a disk that is full or failing is waited for, not died of."""

import logging
import time
from typing import Any

from gptjax.runtime import checkpoint, program
from gptjax.storage import retry

FIRST_SECS, _LONGEST_SECS = 5.0, 600.0
_log = logging.getLogger(__name__)


class Saver:
    """Saves through Checkpoints; one that fails is tried again later, with the state of then."""

    def __init__(self, checkpoints: checkpoint.Checkpoints) -> None:
        self._checkpoints = checkpoints
        self._wait_secs = FIRST_SECS
        self._retry_at = float('inf')

    def save(self, step: int, items: dict[str, Any], meta: dict) -> None:
        """Starts a save; where it, or the one before, fails, warns and goes on."""
        self._look()
        try:
            self._checkpoints.wait()
        except checkpoint.SaveError as e:
            self._later(e)
        self._retry_at = float('inf')
        try:
            self._checkpoints.save(step, items, meta)
        except checkpoint.SaveError as e:
            self._later(e)

    def insist(self, step: int, items: dict[str, Any], meta: dict) -> None:
        """Saves and waits until it is whole, trying again a few times.

        Raises:
          SaveError: it could not be saved.
        """
        try:
            self._checkpoints.wait()
        except checkpoint.SaveError as e:
            _log.warning('%s', e)

        for wait in (*retry.WAITS_SECS, 0.0):
            error = None
            try:
                self._checkpoints.save(step, items, meta)
                self._checkpoints.wait()
            except checkpoint.SaveError as e:
                error = e
            # What one host cannot save, none has saved: they try again, or give up, together.
            if not program.agreed(error is not None)[0]:
                return
            if wait:
                _log.warning('%s; again in %.0f s', error or 'another host could not save', wait)
                time.sleep(wait)
        raise error or checkpoint.SaveError(f'another host could not save step {step}')

    def due(self) -> bool:
        """Whether a save that failed is to be tried again now."""
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
                self._wait_secs = FIRST_SECS

    def _later(self, error: checkpoint.SaveError) -> None:
        _log.warning('training goes on: %s. Trying again in %.0f s', error, self._wait_secs)
        self._retry_at = time.monotonic() + self._wait_secs
        self._wait_secs = min(2 * self._wait_secs, _LONGEST_SECS)
