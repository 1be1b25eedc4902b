# SPDX-License-Identifier: Apache-2.0
"""Progress of long work: a bar on a terminal, a line now and then in a log."""

import copy
import logging
import sys
import threading
import time
from types import TracebackType

import tqdm

from gptjax.runtime import signals, streams
from gptjax.storage import scratch

LOG_SECS = 30.0
_NOTED = '{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]'
_log = logging.getLogger(__name__)


class Progress:
    """Counts towards `total` (None where unknown); use as a context manager.

    What is left is reckoned from the end of the first advance on: before it, programs compile.
    """

    def __init__(
        self, what: str, total: int | None, unit: str, initial: int = 0, first: str = ''
    ) -> None:
        """Args: first: what is done before the first advance, where that is worth telling."""
        self._what, self._total, self._unit, self._done = what, total, unit, initial
        self._logged = time.monotonic()
        self._begun: tuple[float, int] | None = None  # when the first advance ended, and with what
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
            signals.bar_drawn(1)
            self._bar.set_postfix_str(first)
        elif first:
            _log.info('%s: %s', what, first)

    def advance(self, amount: int = 1, note: str = '') -> None:
        """Adds to what is done; `note` stands behind the bar or the line, in place of the speed."""
        self._done += amount
        self._note = note
        if self._bar is not None:
            if note and self._total is not None:
                self._bar.bar_format = _NOTED
            self._bar.set_postfix_str(note, refresh=False)
            if self._begun is None:
                self._bar.unpause()
                self._bar.initial = self._done
            self._bar.update(amount)
        elif time.monotonic() - self._logged >= LOG_SECS:
            self._log()
        self._begun = self._begun or (time.monotonic(), self._done)

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
            signals.bar_drawn(-1)
        elif self._begun:
            self._log()

    def _log(self) -> None:
        self._logged = time.monotonic()
        of = '' if self._total is None else f' of {self._total:,}'
        since, done = self._begun or (0.0, self._done)
        rest = None if self._total is None else self._total - self._done
        eta = ''
        if rest is not None and rest > 0 and self._done > done:  # a total may be an estimate
            eta = f', {rest * (self._logged - since) / (self._done - done):.0f} s left'
        note = f', {self._note}' if self._note else ''
        _log.info('%s: %s%s%s%s%s', self._what, f'{self._done:,}', of, self._unit, note, eta)


class Handler(logging.Handler):
    """Log lines on stderr that leave a running bar whole; a message is one of them.

    One that cannot be written is no mistake: a run goes on with a full disk. Without a reader, as
    under `2>&1 | head`, a run is asked to stop; any other program ends where standard output has
    none either.
    """

    def emit(self, record: logging.LogRecord) -> None:
        record = copy.copy(record)
        said = record.getMessage()
        if record.exc_info and record.exc_info[1]:  # a library's traceback: its last line
            said += f': {type(record.exc_info[1]).__name__}: {record.exc_info[1]}'
        record.msg, record.args = streams.one_line(scratch.told(said)), None
        record.exc_info = record.exc_text = record.stack_info = None
        try:
            tqdm.tqdm.write(self.format(record), file=sys.stderr)
        except BrokenPipeError:
            if signals.unread() or streams.has_reader():
                streams.silence(2)
            elif threading.current_thread() is threading.main_thread():
                raise
        except OSError:
            pass
