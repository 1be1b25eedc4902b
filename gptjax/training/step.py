# SPDX-License-Identifier: Apache-2.0
"""The train step, and the state it carries."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from gptjax.configs import errors
from gptjax.runtime import replicas
from gptjax.training import gradients as gradients_lib
from gptjax.training import guard as guard_lib
from gptjax.training import losses, noise, optim, parameters


class State(NamedTuple):
    """What a step changes, and what it needs beside."""

    step: jax.Array  # updates made or skipped, int32
    params: Any  # that are trained
    frozen: Any  # that are not; {} where all are trained
    opt_state: Any
    average: Any  # of the trained parameters, float32; None where none is kept
    guard: guard_lib.Guard  # what losses look like, to know a spike from them


@dataclasses.dataclass(frozen=True)
class Options:
    """What a step does beside following the gradient.

    device_windows: rows of a microbatch on every device, at most; 0 = all: there is one microbatch.
    reduce_dtype: in which gradients travel between devices that hold the same weights.
    ema_decay: of the average of the parameters; 0 keeps none.
    spike_sigmas: standard deviations above the usual loss that make a spike; 0 = only what is not
      finite.
    skip_spikes: whether a spike's update is left out.
    norms_of: the parameters whose norms, gradients' norms and updates' norms are measured, one a
      layer where layers are stacked; None = of none.
    offload: whether the moments wait in the host's memory between steps.
    shard_moments: whether devices that hold the same weights share the moments, each with a part of
      the update (Rajbhandari et al. 2020, ZeRO, section 5.1).
    frozen: paths of parameters that are not trained: without moments, clipping and decay.
    deterministic: whether GPUs compute the same bits each time; what cannot is not compiled.
    dropout_bits: what draws them: threefry, or rbg, XLA's own generator, which differs by platform.
    measure_noise: whether the gradient noise scale is measured (training/noise.py); it takes a
      batch of several microbatches, or several groups of devices.
    """

    device_windows: int = 0
    reduce_dtype: str = 'float32'
    ema_decay: float = 0.0
    spike_sigmas: float = 0.0
    skip_spikes: bool = False
    norms_of: parameters.Described | None = None
    offload: bool = False
    shard_moments: bool = False
    frozen: frozenset[str] = frozenset()
    deterministic: bool = False
    dropout_bits: str = 'threefry'
    measure_noise: bool = False


_PLAIN = Options()
_IMPLS = {'threefry': 'threefry2x32', 'rbg': 'rbg'}
# What checkpoints of earlier days lack beside the parameters, and how it begins then.
LATER = {'guard': guard_lib.empty}
_OUR_NAMES = {'loss', 'spike', 'skipped_steps'}  # train/... that no loss may report


def abstract(
    init_params: Callable[[jax.Array], Any],
    optimizer: optim.Optimizer,
    shardings: Callable[[Any], Any],
    options: Options = _PLAIN,
) -> State:
    """The state's shapes, dtypes and shardings, without an array.

    Args:
      init_params: key -> boxed parameters; moments and average inherit their boxes.
      shardings: from runtime.mesh.
    """
    boxed = jax.eval_shape(lambda: _create(init_params, optimizer, 0, options))
    plain = nn.meta.unbox(boxed)
    placed = shardings(boxed)
    if options.shard_moments:
        split = jax.tree.map(replicas.split, placed.opt_state, plain.opt_state)
        placed = placed._replace(opt_state=split)
    if options.offload:
        host = jax.tree.map(lambda s: s.with_memory_kind('pinned_host'), placed.opt_state)
        placed = placed._replace(opt_state=host)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), plain, placed
    )


def init(
    init_params: Callable[[jax.Array], Any],
    optimizer: optim.Optimizer,
    seed: int,
    target: State,
    options: Options = _PLAIN,
) -> State:
    """A fresh state, made directly in the shardings of `target` (from abstract())."""

    def create() -> State:
        return nn.meta.unbox(_create(init_params, optimizer, seed, options))

    return jax.jit(create, out_shardings=_shardings(target))()


def init_from(
    params: Any, optimizer: optim.Optimizer, target: State, options: Options = _PLAIN
) -> State:
    """A state that starts from given parameters, which it takes over; otherwise as init()."""
    start = jax.jit(
        lambda params: _start(params, optimizer, options),
        out_shardings=_shardings(target),
        donate_argnums=0,
    )
    return start(params)


def n_params(state: State) -> int:
    """How many parameters there are, trained or not."""
    return sum(x.size for x in jax.tree.leaves((state.params, state.frozen)))


def items(state: State) -> dict[str, Any]:
    """A state as the items of a checkpoint; also an abstract one. 'params' has the frozen ones."""
    rest = {'step': state.step, 'opt_state': state.opt_state, 'guard': state.guard}
    found = {'params': parameters.merge(state.params, state.frozen), 'rest': rest}
    if state.average is not None:
        found['average'] = state.average
    return found


def from_items(found: Mapping[str, Any], options: Options, target: State) -> State:
    """The state of such items; what came later than they begins as in a fresh state."""
    params, frozen = parameters.split(found['params'], options.frozen)
    average = found['average'] if options.ema_decay else None
    rest = dict(found['rest'])
    for name, fresh in LATER.items():
        if name not in rest:
            rest[name] = jax.device_put(fresh(), _shardings(getattr(target, name)))
    return State(params=params, frozen=frozen, average=average, **rest)


def make_train_step(
    loss: losses.Loss,
    optimizer: optim.Optimizer,
    seed: int,
    options: Options,
    target: State | None = None,
    merge: Callable[[Any, Any], Any] = lambda params, frozen: params,
) -> Callable[[State, Mapping[str, jax.Array]], tuple[State, dict[str, jax.Array]]]:
    """A jitted (state, batch) -> (state, metrics); the old state's memory is reused.

    Sums are made over all microbatches and divided once, so that masked microbatches count by
    their weight.

    Args:
      target: from abstract(), for states on a mesh: the new state keeps its shardings.
      merge: (trained, frozen) -> the parameters that the loss takes.
    """
    how = (options.device_windows, options.reduce_dtype, options.measure_noise)
    gradients = gradients_lib.make(loss, merge, *how)
    fetched, put_away = (_on_device, _on_host) if options.offload else (_unchanged, _unchanged)
    averaged = _averaging(options.ema_decay) if options.ema_decay else lambda average, _: average
    settled = _unless_spiked if options.skip_spikes else lambda spike, old, new: new
    norms = _norms_of(options.norms_of) if options.norms_of else lambda **trees: {}

    def train_step(
        state: State, batch: Mapping[str, jax.Array]
    ) -> tuple[State, dict[str, jax.Array]]:
        key = jax.random.key(seed + 1, impl=_IMPLS[options.dropout_bits])
        rng = jax.random.fold_in(key, state.step)
        placed = (None, None)
        if target is not None:
            split = replicas.split if options.shard_moments else lambda sharding, _: sharding
            into = jax.tree.map(lambda x: split(x.sharding, x).spec, target.params)
            placed = (jax.tree.map(lambda x: x.sharding.spec, target.params), into)
        total, sums, grads = gradients(state.params, state.frozen, batch, rng, *placed)
        taken = ', '.join(sums.keys() & _OUR_NAMES)
        errors.require(not taken, f'a loss reports {taken}, which is logged by itself; rename it')
        weight = jnp.maximum(sums['weight'], 1.0)
        pieces = {name: sums.pop(name) for name in (noise.SQUARES, noise.PIECES) if name in sums}
        means = {name: value / weight for name, value in sums.items() if name != 'weight'}
        grads = jax.tree.map(lambda g: g / weight, grads)
        grad_norm = optax.tree.norm(grads)
        opt_state = fetched(state.opt_state)
        updates, new_opt_state = optimizer.update(grads, opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        average = averaged(state.average, params)
        guard, spike = guard_lib.look(state.guard, total / weight, grad_norm, options.spike_sigmas)
        new = State(state.step + 1, params, state.frozen, new_opt_state, average, guard)
        kept = state._replace(step=state.step + 1, opt_state=opt_state)
        new = settled(spike, kept, new)
        metrics = {
            'train/loss': total / weight,
            **{f'train/{name}': mean for name, mean in means.items()},
            'train/spike': _float32(spike),
            'opt/lr': optimizer.rate(state.step),
            'opt/grad_norm': grad_norm,
            'opt/update_norm': optax.tree.norm(updates),
        }
        metrics |= noise.measured(pieces, weight, grad_norm) if pieces else {}
        metrics |= norms(param=params, grad=grads, update=updates)
        return new._replace(opt_state=put_away(new.opt_state)), metrics

    shardings = None if target is None else (_shardings(target), None)
    exact = options.deterministic and replicas.platform() != 'tpu'  # which always is
    said = {'xla_gpu_exclude_nondeterministic_ops': True} if exact else None
    return jax.jit(train_step, donate_argnums=0, out_shardings=shardings, compiler_options=said)


def make_eval_step(measure: Callable[[Any, Mapping[str, jax.Array]], Any]) -> Callable[..., Any]:
    """A jitted measure: (params, batch) -> sums of a batch."""
    return jax.jit(measure)


def _averaging(decay: float) -> Callable[[Any, Any], Any]:
    def averaged(average: Any, params: Any) -> Any:
        return optax.incremental_update(jax.tree.map(_float32, params), average, 1 - decay)

    return averaged


def _unless_spiked(spike: jax.Array, old: State, new: State) -> State:
    return jax.tree.map(lambda a, b: jnp.where(spike, a, b), old, new)


def _norms_of(described: parameters.Described) -> Callable[..., dict[str, dict[str, jax.Array]]]:
    """Trees by name -> the norm of every array by its path; of stacked layers, one a layer."""

    def norm(path: str, x: jax.Array) -> jax.Array:
        over = tuple(range(1 if described[path].stacked else 0, x.ndim))
        return jnp.sqrt(jnp.sum(jnp.square(_float32(x)), over))

    def norms(**trees: Any) -> dict[str, dict[str, jax.Array]]:
        return {
            f'norm/{kind}': {
                path: norm(path, x)
                for path, x in zip(parameters.paths(tree), jax.tree.leaves(tree), strict=True)
            }
            for kind, tree in trees.items()
        }

    return norms


def _unchanged(x: Any) -> Any:
    return x


def _on_device(x: Any) -> Any:
    return jax.device_put(x, jax.memory.Space.Device)


def _on_host(x: Any) -> Any:
    return jax.device_put(x, jax.memory.Space.Host)


def _float32(x: Any) -> Any:
    return x.astype(jnp.float32)


def _shardings(target: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, target)


def _create(
    init_params: Callable, optimizer: optim.Optimizer, seed: int, options: Options
) -> State:
    return _start(init_params(jax.random.key(seed)), optimizer, options)


def _start(params: Any, optimizer: optim.Optimizer, options: Options) -> State:
    params, frozen = parameters.split(params, options.frozen)
    # Gradients are summed in float32, so the moments are float32 whatever the weights are.
    wide = jax.tree.map(_float32, params)
    # Not the same buffers as the weights, which every step gives up.
    average = jax.tree.map(jnp.copy, wide) if options.ema_decay else None
    moments = optimizer.init(wide)
    return State(jnp.zeros((), jnp.int32), params, frozen, moments, average, guard_lib.empty())
