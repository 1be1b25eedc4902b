# SPDX-License-Identifier: Apache-2.0
"""One table of all points of a sweep, drawn again and again; in a log, a line when one changes."""

import logging
import sys
import time
from collections.abc import Mapping
from types import TracebackType

import rich.console
import rich.live
import rich.table

from gptjax.runtime import jobs, signals
from gptjax.sweeps import points as points_lib
from gptjax.sweeps import states

_EVERY_SECS, _LOG_SECS = 1.0, 60.0
_STYLES = {
    jobs.RUNNING: 'bold',
    jobs.DONE: 'green',
    jobs.FAILED: 'red',
    jobs.BLOCKED: 'red',
    states.DIVERGED: 'magenta',
}
_log = logging.getLogger('gptjax')


class Board:
    """Shows a sweep while it runs; use as a context manager."""

    def __init__(self, points: Mapping[str, points_lib.Point], slots: int) -> None:
        """Args: slots: points that run side by side."""
        self._points, self._slots = points, slots
        self._shown, self._logged = 0.0, time.monotonic()
        self._said: dict[str, str] = {}
        console = rich.console.Console(file=sys.stderr)
        self._live = (
            rich.live.Live(console=console, auto_refresh=False) if sys.stderr.isatty() else None
        )

    def __enter__(self) -> 'Board':
        if self._live:
            self._live.start()
            signals.bar_drawn(1)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            self._live.stop()
            signals.bar_drawn(-1)

    def is_due(self) -> bool:
        """Whether it is time to look again."""
        return time.monotonic() - self._shown >= _EVERY_SECS

    def show(self, looks: Mapping[str, states.Look], last: bool = False) -> None:
        """Shows the points as they are now."""
        self._shown = time.monotonic()
        left = secs_left(self._points, looks)
        if self._live:
            self._live.update(table(self._points, looks, self._slots), refresh=True)
            return
        for name, look in looks.items():
            if self._said.get(name, jobs.WAITING) != look.state:
                _log.info('%s: %s%s', name, look.state, _loss_said(look))
            self._said[name] = look.state
        if last or self._shown - self._logged >= _LOG_SECS:
            self._logged = self._shown
            done = sum(look.state == jobs.DONE for look in looks.values())
            eta = _span(total_left(left, self._slots))
            _log.info('%d of %d points done, %s left', done, len(looks), eta)


def table(
    points: Mapping[str, points_lib.Point], looks: Mapping[str, states.Look], slots: int
) -> rich.table.Table:
    """Point, state, step, loss and time left of each, and of all together."""
    left = secs_left(points, looks)
    found = rich.table.Table(box=None, pad_edge=False)
    found.add_column('point', overflow='fold')
    found.add_column('state')
    for column in ('parameters', 'step', 'of', 'loss', 'left'):
        found.add_column(column, justify='right')
    for name, point in points.items():
        look, batch = looks[name], point.config.batch.batch_tokens
        steps = ('', '') if point.is_counted else (look.tokens // batch, point.tokens // batch)
        loss = f'{look.loss:.4f}' if look.loss == look.loss else ''
        eta = _span(left[name]) if left[name] else ''
        cells = [name, look.state, f'{point.counts.parameters:,}', *map(str, steps), loss, eta]
        found.add_row(*cells, style=_STYLES.get(look.state))
    done = sum(look.state == jobs.DONE for look in looks.values())
    total = _span(total_left(left, slots))
    found.caption = f'{done} of {len(looks)} points done, {total} left'
    return found


def secs_left(
    points: Mapping[str, points_lib.Point], looks: Mapping[str, states.Look]
) -> dict[str, float]:
    """Seconds until the end of each point, from its own speed, or from that of the others.

    A point that has not begun takes FLOPs as fast as those of the nearest size that have; before
    any has, the answer is nan.
    """
    speeds = [
        (points[name].counts.parameters, look.speed * points[name].counts.flops_per_token)
        for name, look in looks.items()
        if look.speed and not points[name].is_counted
    ]
    found = {}
    for name, look in looks.items():
        point = points[name]
        if look.state in (jobs.DONE, jobs.FAILED, jobs.BLOCKED, states.DIVERGED):
            found[name] = 0.0
            continue
        rest = point.counts.flops_per_token * (point.tokens - max(look.tokens, point.begins))
        size = point.counts.parameters
        near = min(speeds, key=lambda s: abs(s[0] - size), default=(0, float('nan')))[1]
        own = look.speed * point.counts.flops_per_token
        found[name] = rest / (own or near) if rest else 0.0
    return found


def total_left(left: Mapping[str, float], slots: int) -> float:
    """Seconds until the end of all, so many side by side."""
    return max(sum(left.values()) / slots, max(left.values(), default=0.0))


def _span(secs: float) -> str:
    if secs != secs:
        return '?'
    minutes, rest = divmod(round(secs), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02}:{rest:02}' if hours else f'{minutes}:{rest:02}'


def _loss_said(look: states.Look) -> str:
    said = f', loss {look.loss:.4f}' if look.loss == look.loss else ''
    return said + (f': {look.why}' if look.why else '')
