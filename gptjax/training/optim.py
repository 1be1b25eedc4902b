# SPDX-License-Identifier: Apache-2.0
"""The optimiser of a run: clipping, an update rule by name, decay, a schedule, rates by parameter.

Durations are counted in the unit that their fields name (tokens, steps, epochs, episodes); the plan
converts them, once.
"""

import dataclasses
import difflib
import fnmatch
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gptjax.configs import errors, fields, lookup
from gptjax.configs.sections import training as section_lib
from gptjax.training import parameters as parameters_lib
from gptjax.training import plan as plan_lib
from gptjax.training import schedules

_DURATIONS = ('warmup', 'decay', 'cooldown')


@dataclasses.dataclass(frozen=True)
class Config:
    """The optim section of the config; durations are in `unit`."""

    optimizer: str
    peak_lr: float
    schedule: str
    warmup: float
    decay: float
    cooldown: float
    unit: str
    final_lr_fraction: float
    b1: float
    b2: float
    eps: float
    weight_decay: float
    clip_norm: float
    frozen: tuple[str, ...]
    mu_dtype: Literal['float32', 'bfloat16']
    nu_dtype: Literal['float32', 'bfloat16']
    reduce_dtype: Literal['float32', 'bfloat16']
    ema_decay: float
    offload: bool
    shard_moments: bool

    def __post_init__(self) -> None:
        errors.require_choice(self, 'schedule', tuple(schedules.SCHEDULES))
        lookup.plug_in('gptjax.training.optimizers', self.optimizer)
        for field in ('mu_dtype', 'nu_dtype', 'reduce_dtype'):
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
        errors.require_between(self, 0, 2**60, *_DURATIONS)
        errors.require(
            self.decay == 0 or self.decay > self.warmup,
            f'optim.decay_{self.unit} = {self.decay} includes the warm-up and must be above '
            f'warmup_{self.unit} = {self.warmup}',
        )
        self._check_schedule()

    def _check_schedule(self) -> None:
        """Raises UsageError where the schedule wants a duration, or knows no cool-down."""
        wanting = [name for name, s in schedules.SCHEDULES.items() if 'cooldown' in s.wants]
        errors.require(
            (self.cooldown > 0) == (self.schedule in wanting),
            f'optim.cooldown_{self.unit} = {self.cooldown} does not fit schedule = '
            f'{self.schedule!r}: it is above 0 exactly for {", ".join(wanting)}',
        )
        errors.require(
            'warmup' not in schedules.SCHEDULES[self.schedule].wants or self.warmup > 0,
            f'optim.schedule = {self.schedule} falls from the end of the warm-up; set '
            f'warmup_{self.unit}',
        )


class Optimizer(NamedTuple):
    """An optax.GradientTransformation that knows its learning rate.

    rate: step -> the rate of its update.
    """

    init: Callable[[Any], Any]
    update: Callable[..., tuple[Any, Any]]
    rate: Callable[[jax.Array], jax.Array]


def configure(section: fields.Values) -> Config:
    """The Config of an optim section, whose durations may be in any unit.

    Raises:
      UsageError: a field is unknown, missing or out of range, or there is not one unit.
    """
    found = [unit for unit in section_lib.UNITS if f'warmup_{unit}' in section]
    errors.require(
        len(found) == 1,
        f'the optim section counts in one unit, by warmup_<unit>; it has {found or "none"} of '
        f'{", ".join(section_lib.UNITS)}',
    )
    fields.check(section, section_lib.optim(found[0]), 'the optim section')
    plain = {f'{name}_{found[0]}': name for name in _DURATIONS}
    values = {plain.get(name, name): x for name, x in section.items()}
    return fields.make(Config, values | {'unit': found[0]}, 'optim')


def learning_rate(config: Config, total: float, at: jax.Array | float) -> jax.Array:
    """The rate of the update that is done once `at` of `total` units are, its own included.

    So the first update has a rate above 0, and the update that completes the warm-up the peak.
    """
    at = jnp.asarray(at, jnp.float32)
    # Floats: token counts do not fit int32.
    span = schedules.Span(
        float(config.warmup),
        float(config.decay or total),
        config.cooldown,
        config.final_lr_fraction,
    )
    risen = jnp.minimum(at / span.warmup, 1.0) if span.warmup else 1.0
    return config.peak_lr * risen * schedules.SCHEDULES[config.schedule].share(at, span)


def rate_of(config: Config, plan: plan_lib.Plan) -> Callable[[jax.Array], jax.Array]:
    """Step -> the rate of its update."""
    length = plan.length(config.unit)
    return lambda step: learning_rate(config, length.total, length.after(step))


def make(config: Config, plan: plan_lib.Plan, described: parameters_lib.Described) -> Optimizer:
    """Clip by global norm, the update rule, scale by parameter, decoupled decay, learning rate.

    In this order.

    Args:
      plan: how long training is, in the config's unit.
      described: every parameter that is trained.

    Raises:
      UsageError: warm-up, or warm-up and cool-down, are longer than training.
    """
    length, unit = plan.length(config.unit), config.unit
    end = config.decay or length.total
    errors.require(
        config.warmup + config.cooldown <= end,
        f'optim.warmup_{unit} = {config.warmup} and cooldown_{unit} = {config.cooldown} together '
        f'exceed the {end:g} {unit} until the decay ends',
    )
    errors.require(
        config.warmup < length.total,
        f'optim.warmup_{unit} = {config.warmup} is not below the {length.total:g} {unit} of '
        'training; lower it',
    )

    rate = rate_of(config, plan)
    rule, options = lookup.plug_in('gptjax.training.optimizers', config.optimizer)
    chain = optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        rule.make(config, described, options),
        _scale(described),
        optax.add_decayed_weights(
            config.weight_decay,
            lambda params: parameters_lib.by_path(lambda path: described[path].decays, params),
        ),
        optax.scale_by_learning_rate(rate),
    )
    return Optimizer(chain.init, chain.update, rate)


def frozen(config: Config, described: parameters_lib.Described) -> frozenset[str]:
    """The paths of the parameters that config.frozen names.

    Raises:
      UsageError: a pattern names none, or nothing is left to train.
    """
    found: set[str] = set()
    for pattern in config.frozen:
        named = fnmatch.filter(described, pattern)
        near = ', '.join(difflib.get_close_matches(pattern, described, n=3, cutoff=0.3))
        errors.require(
            bool(named), f'optim.frozen: no parameter is named {pattern!r}; near it: {near}'
        )
        found.update(named)
    errors.require(len(found) < len(described), 'optim.frozen leaves nothing to train')
    return frozenset(found)


def _scale(described: parameters_lib.Described) -> optax.GradientTransformation:
    def update(updates: Any, params: Any = None) -> Any:
        del params
        rates = parameters_lib.by_path(lambda path: described[path].rate, updates)
        return jax.tree.map(lambda u, rate: u if rate == 1 else u * rate, updates, rates)

    return optax.stateless(update)
