# SPDX-License-Identifier: Apache-2.0
"""Progress of long work: a bar on a terminal, a line now and then in a log."""

import logging
import sys
import time
from types import TracebackType

import tqdm

LOG_SECS = 30.0
_log = logging.getLogger(__name__)


class Progress:
    """Counts towards `total` (None where unknown); use as a context manager."""

    def __init__(self, what: str, total: int | None, unit: str, initial: int = 0) -> None:
        self._what, self._total, self._unit, self._done = what, total, unit, initial
        self._start, self._logged, self._initial = time.monotonic(), time.monotonic(), initial
        self._note = ''
        self._bar = None
        if sys.stderr.isatty():
            scale = total is None or total >= 10_000
            self._bar = tqdm.tqdm(
                desc=what,
                total=total,
                unit=unit,
                initial=initial,
                unit_scale=scale,
                leave=True,
                dynamic_ncols=True,
            )

    def advance(self, amount: int = 1, note: str = '') -> None:
        """Adds to what is done; `note` stands behind the bar or the line."""
        self._done += amount
        self._note = note
        if self._bar is not None:
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(amount)
        elif time.monotonic() - self._logged >= LOG_SECS:
            self._log()

    def __enter__(self) -> 'Progress':
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._done > self._initial:
            self._log()

    def _log(self) -> None:
        self._logged = time.monotonic()
        of = '' if self._total is None else f' of {self._total:,}'
        done = self._done - self._initial
        rest = None if self._total is None else self._total - self._done
        eta = ''
        if rest and done:
            eta = f', {rest * (self._logged - self._start) / done:.0f} s left'
        note = f', {self._note}' if self._note else ''
        _log.info('%s: %s%s%s%s%s', self._what, f'{self._done:,}', of, self._unit, note, eta)


class Handler(logging.Handler):
    """Log lines on stderr that leave a running bar whole."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.tqdm.write(self.format(record), file=sys.stderr)
