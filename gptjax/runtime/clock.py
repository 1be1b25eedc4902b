# SPDX-License-Identifier: Apache-2.0
"""Where the time goes: tokens/s, time left, model FLOP/s, waiting for data, goodput."""

import logging
import threading
import time

import jax
import numpy as np

from gptjax.runtime import hang
from gptjax.scaling import devices

_SLOW_DATA = 0.2  # of the time; more is said aloud
_log = logging.getLogger(__name__)


class Clock:
    """Counts training time apart from pauses (evaluation, saving); totals survive a resume."""

    def __init__(self, flops_per_token: float, watched_by: hang.Hang | None = None) -> None:
        """Args: flops_per_token: of one training step, forward and backward."""
        self._hang = watched_by
        self._flops_per_token = flops_per_token
        self._begun = self._mark = time.monotonic()
        self._paused = self._pause_mark = 0.0
        self._wait = self._tokens = 0.0
        self._steps: list[float] = []
        self._compiling: tuple[int, float] | None = None  # tokens and seconds of the first step
        self._said_slow = False
        self._total_secs = self._train_secs = 0.0

    def restore(self, totals: dict[str, float]) -> None:
        """Takes over the totals of a checkpoint."""
        self._total_secs, self._train_secs = totals['total_secs'], totals['train_secs']

    def lost(self, total_secs: float) -> None:
        """Counts what was spent in vain: the run had got this far before it was cut short."""
        self._total_secs = max(self._total_secs, total_secs)

    def totals(self) -> dict[str, float]:
        """Seconds since the run began, and those spent training, for the checkpoint."""
        total = self._total_secs + time.monotonic() - self._begun
        return {'total_secs': total, 'train_secs': self._train_secs}

    def pause(self) -> None:
        """Stops counting, for an evaluation or a save."""
        self._pause_mark = time.monotonic()
        if self._hang:
            self._hang.pause()

    def go_on(self) -> None:
        """Ends a pause."""
        if self._hang:
            self._hang.go_on()
        self._paused += time.monotonic() - self._pause_mark

    def waited(self, secs: float) -> None:
        """Adds time in which the device had nothing to do for want of data."""
        self._wait += secs

    def trained(self, tokens: int, secs: float) -> None:
        """Adds a step: its tokens, and the seconds from its beginning to the next one's."""
        if self._hang:
            self._hang.step(secs)
        self._compiling = self._compiling or (tokens, secs)
        self._tokens += tokens
        self._steps.append(secs)

    def step_secs(self) -> list[float]:
        """The seconds of every step since the last reading."""
        return list(self._steps)

    def read(self, tokens_left: float) -> dict[str, float]:
        """Metrics since the last reading; MFU only where the device's peak is known.

        The first step of all, in which programs are compiled, does not count in the speed where
        there are others.
        """
        now = time.monotonic()
        secs = max(now - self._mark - self._paused, 1e-9)
        self._train_secs += secs
        tokens, compiling = self._compiling or (0, 0.0)
        if self._tokens > tokens:
            speed = (self._tokens - tokens) / max(secs - compiling, 1e-9)
        else:
            speed = self._tokens / secs
        self._compiling = self._compiling and (0, 0.0)
        total = self.totals()
        found = {
            'perf/tokens_per_sec': speed,
            'perf/data_wait': self._wait / secs,
            **self._percentiles(),
            'perf/total_secs': total['total_secs'],
            'perf/goodput': total['train_secs'] / max(total['total_secs'], 1e-9),
            'perf/eta_secs': tokens_left / speed if speed else float('inf'),
            **_memory(),
        }
        device = devices.of(jax.devices()[0].device_kind)
        if device:
            peak = device.peak_flops * jax.device_count()
            found['perf/mfu'] = speed * self._flops_per_token / peak
        if self._wait > _SLOW_DATA * secs and not self._said_slow:
            self._said_slow = True
            _log.warning(
                'the data pipeline is slow: training waited for it %.0f %% of the time (metric '
                'perf/data_wait); raise --config.data.prefetch_steps or use a faster disk',
                100 * self._wait / secs,
            )
        self._mark, self._paused, self._wait, self._tokens = now, 0.0, 0.0, 0.0
        self._steps.clear()
        return found

    def _percentiles(self) -> dict[str, float]:
        if not self._steps:
            return {}
        middle, high, longest = np.percentile(self._steps, (50, 90, 100))
        return {
            'perf/step_secs_p50': float(middle),
            'perf/step_secs_p90': float(high),
            'perf/step_secs_max': float(longest),
        }


def _memory() -> dict[str, float]:
    """The most memory that one of this host's devices has used, and which; of those that say."""
    used = {d.id: (d.memory_stats() or {}).get('peak_bytes_in_use') for d in jax.local_devices()}
    known = {device: peak for device, peak in used.items() if peak}
    if not known:
        return {}
    device = max(known, key=known.__getitem__)
    return {'perf/memory_peak_bytes': known[device], 'perf/memory_peak_device': device}


class Watchdog:
    """Says so, again and again, when something inside `with watchdog` takes suspiciously long."""

    def __init__(self, what: str, after_secs: float = 30.0) -> None:
        """Args: what: is waited for."""
        self._what, self._after = what, after_secs
        self._since = 0.0
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name='watchdog', daemon=True).start()

    def __enter__(self) -> None:
        self._since = time.monotonic()

    def __exit__(self, *error: object) -> None:
        self._since = 0.0

    def close(self) -> None:
        self._closed.set()

    def _watch(self) -> None:
        said = self._after
        while not self._closed.wait(min(self._after / 4, 5.0)):
            waited = time.monotonic() - self._since if self._since else 0.0
            if waited < self._after:
                said = self._after
            elif waited >= said:
                said *= 2
                _log.warning('waiting for %.0f s for %s', waited, self._what)


class Due:
    """Whether something periodic is due, by steps, by seconds, or by both."""

    def __init__(self, every_steps: int, every_secs: float = 0.0) -> None:
        """0 turns either off."""
        self._steps, self._secs = every_steps, every_secs
        self._last = time.monotonic()

    def __call__(self, step: int) -> bool:
        by_steps = self._steps > 0 and step % self._steps == 0
        by_secs = self._secs > 0 and time.monotonic() - self._last >= self._secs
        if by_steps or by_secs:
            self.done()
        return by_steps or by_secs

    def done(self) -> None:
        """Counts the seconds anew: it was done, on another host's clock or for another reason."""
        self._last = time.monotonic()
