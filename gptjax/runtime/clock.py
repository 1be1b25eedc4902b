# SPDX-License-Identifier: Apache-2.0
"""Where the time goes: tokens/s, time left, model FLOP/s, waiting for data, goodput."""

import time

import jax

# Peak dense bf16 FLOP/s of one device, from the vendors' data sheets.
_PEAK_FLOPS = {
    'TPU v4': 275e12,
    'TPU v5 lite': 197e12,
    'TPU v5e': 197e12,
    'TPU v5': 459e12,
    'TPU v5p': 459e12,
    'TPU v6 lite': 918e12,
    'NVIDIA A100-SXM4-80GB': 312e12,
    'NVIDIA H100 80GB HBM3': 989e12,
}


class Clock:
    """Counts training time apart from pauses (evaluation, saving); totals survive a resume."""

    def __init__(self, flops_per_token: float) -> None:
        """Args: flops_per_token: of one training step, forward and backward."""
        self._flops_per_token = flops_per_token
        self._begun = self._mark = time.monotonic()
        self._paused = self._pause_mark = 0.0
        self._wait = self._tokens = 0.0
        self._total_secs = self._train_secs = 0.0

    def restore(self, totals: dict[str, float]) -> None:
        """Takes over the totals of a checkpoint."""
        self._total_secs, self._train_secs = totals['total_secs'], totals['train_secs']

    def totals(self) -> dict[str, float]:
        """For the checkpoint: seconds since the run began, and seconds spent training."""
        total = self._total_secs + time.monotonic() - self._begun
        return {'total_secs': total, 'train_secs': self._train_secs}

    def pause(self) -> None:
        """Stops counting, for an evaluation or a save."""
        self._pause_mark = time.monotonic()

    def go_on(self) -> None:
        """Ends a pause."""
        self._paused += time.monotonic() - self._pause_mark

    def waited(self, secs: float) -> None:
        """Adds time in which the device had nothing to do for want of data."""
        self._wait += secs

    def trained(self, tokens: int) -> None:
        """Adds the tokens of a step."""
        self._tokens += tokens

    def read(self, tokens_left: float) -> dict[str, float]:
        """Metrics since the last reading; MFU only where the device's peak is known."""
        now = time.monotonic()
        secs = max(now - self._mark - self._paused, 1e-9)
        self._train_secs += secs
        speed = self._tokens / secs
        total = self.totals()
        found = {
            'perf/tokens_per_sec': speed,
            'perf/data_wait': self._wait / secs,
            'perf/goodput': total['train_secs'] / max(total['total_secs'], 1e-9),
            'perf/eta_secs': tokens_left / speed if speed else float('inf'),
        }
        peak = _PEAK_FLOPS.get(jax.devices()[0].device_kind)
        if peak:
            found['perf/mfu'] = speed * self._flops_per_token / (peak * jax.device_count())
        self._mark, self._paused, self._wait, self._tokens = now, 0.0, 0.0, 0.0
        return found


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
            self._last = time.monotonic()
        return by_steps or by_secs
