# SPDX-License-Identifier: Apache-2.0
"""AdamW with a schedule counted in tokens, and the batch ramp: which windows a step reads."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.core import meta

from gptjax.configs import errors


@dataclasses.dataclass(frozen=True)
class Config:
    """The optim section of configs/base.py."""

    peak_lr: float
    schedule: Literal['cosine', 'linear', 'constant', 'wsd', 'inverse_sqrt']
    warmup_tokens: int
    decay_tokens: int
    cooldown_tokens: int
    final_lr_fraction: float
    b1: float
    b2: float
    eps: float
    weight_decay: float
    clip_norm: float
    mu_dtype: Literal['float32', 'bfloat16']
    nu_dtype: Literal['float32', 'bfloat16']
    ema_decay: float
    offload: bool

    def __post_init__(self) -> None:
        errors.require_choice(
            self, 'schedule', ('cosine', 'linear', 'constant', 'wsd', 'inverse_sqrt')
        )
        for field in ('mu_dtype', 'nu_dtype'):
            errors.require_choice(self, field, ('float32', 'bfloat16'))
        errors.require_between(self, 0.0, 0.9999999, 'ema_decay')
        errors.require(
            self.nu_dtype == 'float32' or self.b2 <= 0.99,
            f"optim.nu_dtype = 'bfloat16' keeps 8 bits: with b2 = {self.b2} it would stand still; "
            'use b2 up to 0.99, or float32',
        )
        errors.require_between(self, 0.0, 1e3, 'peak_lr', 'weight_decay', 'clip_norm')
        errors.require_between(self, 0.0, 1.0, 'final_lr_fraction')
        errors.require_between(self, 0.0, 0.999999, 'b1', 'b2')
        errors.require_positive(self, 'eps')
        errors.require_between(self, 0, 2**60, 'warmup_tokens', 'decay_tokens', 'cooldown_tokens')
        errors.require(
            self.decay_tokens == 0 or self.decay_tokens > self.warmup_tokens,
            f'optim.decay_tokens = {self.decay_tokens} includes the warm-up and must be above '
            f'warmup_tokens = {self.warmup_tokens}',
        )
        errors.require(
            (self.cooldown_tokens > 0) == (self.schedule == 'wsd'),
            f'optim.cooldown_tokens = {self.cooldown_tokens} does not fit schedule = '
            f'{self.schedule!r}: it is above 0 exactly for wsd',
        )
        errors.require(
            self.schedule != 'inverse_sqrt' or self.warmup_tokens > 0,
            'optim.schedule = inverse_sqrt falls from the end of the warm-up; set warmup_tokens',
        )


@dataclasses.dataclass(frozen=True)
class Batch:
    """The batch section of configs/base.py."""

    batch_tokens: int
    accum_steps: int
    ramp_from_tokens: int
    ramp_over_tokens: int
    ramp_stages: int

    def __post_init__(self) -> None:
        errors.require_positive(self, 'batch_tokens', 'accum_steps')
        errors.require_between(self, 0, 2**60, 'ramp_from_tokens', 'ramp_over_tokens')
        errors.require_between(self, 1, 64, 'ramp_stages')
        errors.require(
            (self.ramp_from_tokens > 0) == (self.ramp_over_tokens > 0),
            'batch.ramp_from_tokens and batch.ramp_over_tokens go together: both 0 or both above',
        )
        errors.require(
            self.ramp_from_tokens <= self.batch_tokens,
            f'batch.ramp_from_tokens = {self.ramp_from_tokens} is above batch_tokens',
        )


class Plan:
    """Which windows step s consumes: [n(s), n(s) + b(s)), in closed form.

    The ramp (GPT-3, section B: linear in tokens from a small batch) goes through `ramp_stages`
    batch sizes, each held for an equal share of `ramp_over_tokens` and a multiple of the first
    batch: so neither mesh nor accumulation changes which step consumes which window.
    """

    def __init__(self, config: Batch, n_ctx: int) -> None:
        """Raises UsageError where a batch is not made of whole windows."""
        for field in ('batch_tokens', 'ramp_from_tokens'):
            value = getattr(config, field)
            errors.require(
                value % n_ctx == 0,
                f'batch.{field} = {value} is not a multiple of n_ctx = {n_ctx}; '
                f'use {max(1, round(value / n_ctx)) * n_ctx}',
            )
        full, start = config.batch_tokens // n_ctx, config.ramp_from_tokens // n_ctx
        self.n_ctx = n_ctx
        self.skipped: list[tuple[int, int]] = []  # (from this step on, windows left out before it)
        sizes, lengths = [], []
        if start:
            share = config.ramp_over_tokens / config.ramp_stages
            # Each stage begins on the line from the first batch to the full one.
            for size in np.linspace(start, full, config.ramp_stages, endpoint=False):
                size = min(full, max(1, round(size / start)) * start)
                sizes.append(size)
                lengths.append(int(np.ceil(share / (size * n_ctx))))
        self._sizes = np.array([*sizes, full], np.int64)
        self._steps = np.cumsum([0, *lengths], dtype=np.int64)  # first step of each stage
        self._windows = np.cumsum([0, *np.multiply(sizes, lengths)], dtype=np.int64)

    def sizes(self) -> list[int]:
        """The batch sizes that occur, in windows, in order."""
        return list(dict.fromkeys(int(size) for size in self._sizes))

    def position(self, step: int) -> tuple[int, int]:
        """(windows before it, number of windows) of a step."""
        stage = int(np.searchsorted(self._steps, step, side='right')) - 1
        size = int(self._sizes[stage])
        return int(self._windows[stage]) + (step - int(self._steps[stage])) * size, size

    def windows(self, step: int) -> tuple[int, int]:
        """(first window, number of windows) that a step reads, those left out passed over."""
        first, size = self.position(step)
        return first + sum(n for start, n in self.skipped if start <= step), size

    def skip(self, step: int, until: int) -> None:
        """From `step` on, leaves out the windows that steps up to and with `until` - 1 read."""
        first = self.windows(step)[0]
        last, size = self.windows(until - 1)
        self.skipped[:] = [
            pair for pair in self.skipped if pair[0] <= step
        ]  # all lie before `last`
        self.skipped.append((step, last + size - first))

    def tokens(self, step: int) -> int:
        """Tokens consumed before a step."""
        return self.position(step)[0] * self.n_ctx

    def steps(self, total_tokens: int) -> int:
        """The fewest steps that consume at least `total_tokens`."""
        windows = -(-total_tokens // self.n_ctx)
        stage = int(np.searchsorted(self._windows, windows, side='left')) - 1
        stage = max(stage, 0)
        rest = windows - int(self._windows[stage])
        return int(self._steps[stage]) + -(-rest // int(self._sizes[stage]))

    def tokens_after(self, step: jax.Array) -> jax.Array:
        """Tokens consumed up to and including a step, traced; float32, exact to 2^-24."""
        stage = jnp.searchsorted(jnp.asarray(self._steps, jnp.int32), step, side='right') - 1
        first = jnp.asarray(self._steps, jnp.int32)[stage]
        size = jnp.asarray(self._sizes, jnp.int32)[stage]
        windows = jnp.asarray(self._windows, jnp.int32)[stage] + (step + 1 - first) * size
        return windows.astype(jnp.float32) * self.n_ctx


def learning_rate(config: Config, total_tokens: int, tokens: jax.Array | float) -> jax.Array:
    """The rate of the update after which `tokens` tokens were consumed, its own included.

    So the first update has a rate above 0, and the update that completes the warm-up the peak.
    After it: cosine and linear fall to final_lr_fraction at decay_tokens; wsd stays until
    cooldown_tokens before that, then falls linearly (Hu et al. 2024, MiniCPM, section 4.2);
    inverse_sqrt is the peak x sqrt(warm-up / tokens) (Vaswani et al. 2017, section 5.3).
    """
    warmup = float(config.warmup_tokens)  # floats: token counts do not fit int32
    decay = float(config.decay_tokens or total_tokens)
    final = config.final_lr_fraction
    begin = decay - config.cooldown_tokens if config.schedule == 'wsd' else warmup
    done = jnp.clip((tokens - begin) / max(decay - begin, 1.0), 0.0, 1.0)
    shape = {
        'cosine': final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * done)),
        'linear': 1 - (1 - final) * done,
        'constant': jnp.ones_like(done),
        'wsd': 1 - (1 - final) * done,
        'inverse_sqrt': jnp.sqrt(warmup / jnp.maximum(tokens, max(warmup, 1.0))),
    }[config.schedule]
    return config.peak_lr * jnp.minimum(tokens / max(warmup, 1.0), 1.0) * shape


def make(
    config: Config,
    total_tokens: int,
    plan: Plan,
    rate_scale: Callable[[str], float] = lambda name: 1.0,
) -> optax.GradientTransformation:
    """Clip by global norm, Adam, scale by parameter, decoupled decay, learning rate: in this order.

    Args:
      rate_scale: of a parameter's path, as 'network/block_0/mlp/up/kernel', for muP: multiplies its
        learning rate, not its decay.

    Raises:
      UsageError: warm-up, or warm-up and cool-down, are longer than training.
    """
    end = config.decay_tokens or total_tokens
    errors.require(
        config.warmup_tokens + config.cooldown_tokens <= end,
        f'optim.warmup_tokens = {config.warmup_tokens} and cooldown_tokens = '
        f'{config.cooldown_tokens} together exceed the {end} tokens until the decay ends',
    )
    errors.require(
        config.warmup_tokens < total_tokens,
        f'optim.warmup_tokens = {config.warmup_tokens} is not below the {total_tokens} tokens of '
        'training; lower it',
    )

    def rate(step: jax.Array) -> jax.Array:
        return learning_rate(config, total_tokens, plan.tokens_after(step))

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        _adam(config),
        _scale(rate_scale),
        optax.add_decayed_weights(config.weight_decay, decays),
        optax.scale_by_learning_rate(rate),
    )


def decays(params: Any) -> Any:
    """Mask of what weight decay shrinks: every weight, embeddings too, but no bias and no gain."""

    return _by_name(lambda name: not name.endswith(('bias', 'scale')), params)


def _adam(config: Config) -> optax.GradientTransformation:
    """Adam, its moments kept in the dtypes of the config; sums are made in float32."""
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=config.mu_dtype)

    def stored(state: optax.ScaleByAdamState, dtype: str) -> optax.ScaleByAdamState:
        return state._replace(nu=jax.tree.map(lambda x: x.astype(dtype), state.nu))

    def init(params: Any) -> optax.ScaleByAdamState:
        return stored(adam.init(params), config.nu_dtype)

    def update(updates: Any, state: optax.ScaleByAdamState, params: Any = None) -> tuple:
        updates, state = adam.update(updates, stored(state, 'float32'), params)
        return updates, stored(state, config.nu_dtype)

    return optax.GradientTransformation(init, update)


def _scale(by: Callable[[str], float]) -> optax.GradientTransformation:
    def update(updates: Any, params: Any = None) -> Any:
        del params
        scales = _by_name(by, updates)
        return jax.tree.map(lambda u, s: u if s == 1 else u * s, updates, scales)

    return optax.stateless(update)


def _by_name(of: Callable[[str], Any], params: Any) -> Any:
    """of(path) for every parameter; paths as 'network/token_embedding'."""

    def one(path: tuple, _: Any) -> Any:
        keys = (key.key for key in path if isinstance(key, jax.tree_util.DictKey))
        return of('/'.join(keys))

    return jax.tree_util.tree_map_with_path(
        one, params, is_leaf=lambda x: isinstance(x, meta.AxisMetadata)
    )
