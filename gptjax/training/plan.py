# SPDX-License-Identifier: Apache-2.0
"""Which examples a step reads, and how many steps there are: the batch ramp, epochs, gaps.

Examples stand in one endless order, f(seed); step s reads a range of it, in closed form. An example
is a window of text, a prompt, a comparison; what it counts as is said in tokens.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.configs import errors


@dataclasses.dataclass(frozen=True)
class Config:
    """The batch section of the config."""

    batch_tokens: int
    device_windows: int
    ramp_from_tokens: int
    ramp_over_tokens: int
    ramp_stages: int

    def __post_init__(self) -> None:
        errors.require_positive(self, 'batch_tokens')
        errors.require_between(
            self, 0, 2**60, 'device_windows', 'ramp_from_tokens', 'ramp_over_tokens'
        )
        errors.require_between(self, 1, 64, 'ramp_stages')
        errors.require(
            (self.ramp_from_tokens > 0) == (self.ramp_over_tokens > 0),
            'batch.ramp_from_tokens and batch.ramp_over_tokens go together: both 0 or both above',
        )
        errors.require(
            self.ramp_from_tokens <= self.batch_tokens,
            f'batch.ramp_from_tokens = {self.ramp_from_tokens} is above batch_tokens',
        )


class Length(NamedTuple):
    """A run's length in some unit, and how much of it lies behind once a step is done."""

    total: float
    after: Callable[[jax.Array], jax.Array]  # step, traced -> float32, that step included


class Plan:
    """Step s reads examples [n(s), n(s) + b(s)), those left out passed over.

    The batch grows through stages (GPT-3, section B: linear in tokens from a small batch). Each is
    a multiple of the first, so neither mesh nor accumulation changes which step reads what.
    """

    def __init__(
        self,
        stages: list[tuple[int, int]],
        tokens_per_example: int,
        total_tokens: int,
        epoch_examples: int = 0,
        begins: int = 0,
    ) -> None:
        """Use of_tokens(), of_epochs() or after().

        Args:
          stages: (first step, examples a step) of each.
          epoch_examples: examples of an epoch; 0 = unknown.
          begins: the step from which on this run makes them.
        """
        self._steps, self._sizes = np.array(stages, np.int64).T
        held = np.diff(self._steps) * self._sizes[:-1]
        self._examples = np.concatenate([[0], np.cumsum(held)])
        self.tokens_per_example, self.total_tokens = tokens_per_example, total_tokens
        self._epoch, self.begins = epoch_examples, begins
        self.total_steps = self.steps(total_tokens)
        self.skipped: list[tuple[int, int]] = []  # (from this step on, so many examples left out)

    def sizes(self) -> list[int]:
        """The examples of every batch size there is from the beginning on, in their order."""
        ends = [*self._steps[1:].tolist(), math.inf]
        sizes = zip(self._sizes.tolist(), ends, strict=True)
        return list(dict.fromkeys(size for size, end in sizes if end > self.begins))

    def stages(self, until: int) -> list[tuple[int, int]]:
        """(first step, examples a step) of each stage that begins before a step."""
        stages = zip(self._steps.tolist(), self._sizes.tolist(), strict=True)
        return [(step, size) for step, size in stages if step < until]

    def after(
        self, step: int, stages: Sequence[Sequence[int]], skipped: Sequence[Sequence[int]]
    ) -> 'Plan':
        """A plan whose first steps are others; of the rest it says what this one does.

        Args:
          step: from which on this plan holds.
          stages: (first step, examples a step) of the steps before.
          skipped: what those have left out, as in `skipped`.

        Raises:
          UsageError: so short a run ends before that step.
        """
        later = [each for each in self.stages(2**62) if each[0] > step]
        whole = [*map(tuple, stages), (step, self.size(step)), *later]
        found = Plan(whole, self.tokens_per_example, self.total_tokens, self._epoch, step)
        found.skipped[:] = map(tuple, skipped)
        errors.require(
            found.total_steps > step,
            f'{self.total_tokens:,} tokens are over before step {step}, from which this run goes '
            f'on: {found.tokens(step):,} are consumed by then; raise --config.train.total_tokens',
        )
        return found

    def size(self, step: int) -> int:
        """How many examples a step reads."""
        return self._position(step)[1]

    def examples(self, step: int) -> tuple[int, int]:
        """(first example, number of examples) that a step reads."""
        first, size = self._position(step)
        return first + sum(n for start, n in self.skipped if start <= step), size

    def tokens(self, step: int) -> int:
        """Tokens consumed before a step."""
        return self._position(step)[0] * self.tokens_per_example

    def steps(self, total_tokens: int) -> int:
        """The fewest steps that consume at least `total_tokens`."""
        examples = -(-total_tokens // self.tokens_per_example)
        stage = max(int(np.searchsorted(self._examples, examples, side='left')) - 1, 0)
        rest = examples - int(self._examples[stage])
        return int(self._steps[stage]) + -(-rest // int(self._sizes[stage]))

    def length(self, unit: str) -> Length:
        """The run in tokens, steps, epochs or episodes (examples): what durations are counted in.

        Raises:
          UsageError: there are no epochs here, or the unit is unknown.
        """
        if unit == 'steps':
            return Length(self.total_steps, lambda step: (step + 1).astype(jnp.float32))
        of_example = {'tokens': self.tokens_per_example, 'episodes': 1}
        if self._epoch:
            of_example['epochs'] = 1 / self._epoch
        known = ', '.join(['steps', *of_example])
        errors.require(unit in of_example, f'this run is not counted in {unit}; in: {known}')
        each = of_example[unit]
        total = self.total_tokens * each / self.tokens_per_example
        return Length(total, lambda step: self._examples_after(step) * each)

    def skip(self, step: int, until: int) -> None:
        """Leaves out, from `step` on, what steps up to and with `until` - 1 read."""
        first = self.examples(step)[0]
        last, size = self.examples(until - 1)
        # All that is kept lies before `last`.
        self.skipped[:] = [pair for pair in self.skipped if pair[0] <= step]
        self.skipped.append((step, last + size - first))

    def saved(self, step: int) -> dict[str, Any]:
        """What a checkpoint holds of the data's position."""
        return {'windows': self.examples(step)[0], 'skipped': self.skipped}

    def restore(self, step: int, saved: dict[str, Any]) -> None:
        """Takes over the gaps of a checkpoint.

        Raises:
          InputError: it had read another number of examples by that step.
        """
        self.skipped[:] = [tuple(pair) for pair in saved['skipped']]
        examples = self.examples(step)[0]
        if saved['windows'] != examples:
            raise errors.InputError(
                f'the checkpoint had consumed {saved["windows"]} windows, this batch plan '
                f'{examples} by step {step}; use the version of gptjax that made it'
            )

    def _position(self, step: int) -> tuple[int, int]:
        """(examples before it, number of examples) of a step, nothing left out."""
        stage = int(np.searchsorted(self._steps, step, side='right')) - 1
        size = int(self._sizes[stage])
        return int(self._examples[stage]) + (step - int(self._steps[stage])) * size, size

    def _examples_after(self, step: jax.Array) -> jax.Array:
        """Examples read up to and with a step, traced; float32, exact to 2^-24."""
        stage = jnp.searchsorted(jnp.asarray(self._steps, jnp.int32), step, side='right') - 1
        first = jnp.asarray(self._steps, jnp.int32)[stage]
        size = jnp.asarray(self._sizes, jnp.int32)[stage]
        examples = jnp.asarray(self._examples, jnp.int32)[stage] + (step + 1 - first) * size
        return examples.astype(jnp.float32)


def of_tokens(config: Config, n_ctx: int, total_tokens: int, epoch_tokens: int = 0) -> Plan:
    """Pre-training: windows of n_ctx tokens, the batch ramped as the config says.

    Args:
      epoch_tokens: of all training sets; 0 = unknown.

    Raises:
      UsageError: a batch is not made of whole windows.
    """
    for field in ('batch_tokens', 'ramp_from_tokens'):
        value = getattr(config, field)
        errors.require(
            value % n_ctx == 0,
            f'batch.{field} = {value} is not a multiple of n_ctx = {n_ctx}; '
            f'use {max(1, round(value / n_ctx)) * n_ctx}',
        )
    full, start = config.batch_tokens // n_ctx, config.ramp_from_tokens // n_ctx
    stages, step = [], 0
    # Each stage begins on the line from the first batch to the full one.
    for ideal in np.linspace(start, full, config.ramp_stages, endpoint=False) if start else ():
        size = min(full, max(1, round(ideal / start)) * start)
        stages.append((step, size))
        step += math.ceil(config.ramp_over_tokens / config.ramp_stages / (size * n_ctx))
    stages.append((step, full))
    return Plan(stages, n_ctx, total_tokens, epoch_tokens // n_ctx)


def of_epochs(n_examples: int, batch_examples: int, epochs: float, tokens_per_example: int) -> Plan:
    """Passes over a set of examples, in batches of one size that may run from epoch to epoch.

    Args:
      epochs: may end within one.

    Raises:
      UsageError: a number is not above 0.
    """
    errors.require(
        min(n_examples, batch_examples, epochs, tokens_per_example) > 0,
        f'{epochs} epochs of {n_examples} examples in batches of {batch_examples}: all must be '
        'above 0',
    )
    total = max(1, round(n_examples * epochs)) * tokens_per_example
    return Plan([(0, batch_examples)], tokens_per_example, total, n_examples)
