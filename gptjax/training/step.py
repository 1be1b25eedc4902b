# SPDX-License-Identifier: Apache-2.0
"""The train step, and the state it carries."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from gptjax.training import guard as guard_lib

Batch = dict[str, jax.Array]
# (params, batch, dropout key) -> (sum of nats, weight)
Loss = Callable[[Any, Batch, jax.Array], tuple[jax.Array, jax.Array]]


class State(NamedTuple):
    """What a step changes."""

    step: jax.Array  # updates made or skipped, int32
    params: Any
    opt_state: Any
    average: Any  # of the parameters, float32; None where none is kept
    guard: guard_lib.Guard  # what losses look like, to know a spike from them


@dataclasses.dataclass(frozen=True)
class Options:
    """What a step does beside following the gradient.

    accum_steps: microbatches that a batch is cut into.
    ema_decay: of the average of the parameters; 0 keeps none.
    spike_sigmas: standard deviations above the usual loss that make a spike; 0 = only what is not
      finite.
    skip_spikes: whether a spike's update is left out.
    layer_norms: whether to measure every parameter's norm, its gradient's and its update's.
    offload: whether the moments wait in the host's memory between steps.
    """

    accum_steps: int = 1
    ema_decay: float = 0.0
    spike_sigmas: float = 0.0
    skip_spikes: bool = False
    layer_norms: bool = False
    offload: bool = False


_PLAIN = Options()


def abstract(
    init_params: Callable[[jax.Array], Any],
    optimizer: optax.GradientTransformation,
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
    if options.offload:
        host = jax.tree.map(lambda s: s.with_memory_kind('pinned_host'), placed.opt_state)
        placed = placed._replace(opt_state=host)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), plain, placed
    )


def init(
    init_params: Callable[[jax.Array], Any],
    optimizer: optax.GradientTransformation,
    seed: int,
    target: State,
    options: Options = _PLAIN,
) -> State:
    """A fresh state, made directly in the shardings of `target` (from abstract())."""

    def create() -> State:
        return nn.meta.unbox(_create(init_params, optimizer, seed, options))

    return jax.jit(create, out_shardings=_shardings(target))()


def init_from(
    params: Any,
    optimizer: optax.GradientTransformation,
    target: State,
    options: Options = _PLAIN,
) -> State:
    """A state that starts from given parameters, which it takes over; otherwise as init()."""
    return jax.jit(
        lambda params: _start(params, optimizer, options),
        out_shardings=_shardings(target), donate_argnums=0,
    )(params)  # fmt: skip


def make_train_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    seed: int,
    options: Options,
    target: State | None = None,
) -> Callable[[State, Batch], tuple[State, dict[str, jax.Array]]]:
    """A jitted (state, batch) -> (state, metrics); the old state's memory is reused.

    Nats and weights are summed over all microbatches and divided once, so that masked microbatches
    count by their tokens.

    Args:
      target: from abstract(), for states on a mesh: the new state keeps its shardings.
    """

    def train_step(state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        rng = jax.random.fold_in(jax.random.key(seed + 1), state.step)
        nats, weight, grads = _gradients(loss, state.params, batch, rng, options.accum_steps)
        weight = jnp.maximum(weight, 1.0)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32) / weight, grads)
        grad_norm = optax.tree.norm(grads)
        opt_state = state.opt_state
        if options.offload:
            opt_state = jax.device_put(opt_state, jax.memory.Space.Device)
        updates, opt_state = optimizer.update(grads, opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        guard, spike = guard_lib.look(state.guard, nats / weight, grad_norm, options.spike_sigmas)
        average = state.average
        if options.ema_decay:
            average = optax.incremental_update(
                jax.tree.map(lambda p: p.astype(jnp.float32), params),
                average,
                1 - options.ema_decay,
            )
        new = State(state.step + 1, params, opt_state, average, guard)
        if options.skip_spikes:
            kept = state._replace(step=state.step + 1)
            if options.offload:
                kept = kept._replace(
                    opt_state=jax.device_put(kept.opt_state, jax.memory.Space.Device)
                )
            new = jax.tree.map(lambda old, new: jnp.where(spike, old, new), kept, new)
        if options.offload:
            new = new._replace(opt_state=jax.device_put(new.opt_state, jax.memory.Space.Host))
        metrics = {
            'train/loss': nats / weight,
            'train/spike': spike.astype(jnp.float32),
            'opt/grad_norm': grad_norm,
            'opt/update_norm': optax.tree.norm(updates),
        }
        if options.layer_norms:
            trees = {'param': params, 'grad': grads, 'update': updates}
            metrics |= {f'norm/{kind}': _norms(tree) for kind, tree in trees.items()}
        return new, metrics

    shardings = None if target is None else (_shardings(target), None)
    return jax.jit(train_step, donate_argnums=0, out_shardings=shardings)


def make_eval_step(
    loss: Callable[[Any, Batch], tuple[jax.Array, jax.Array]],
) -> Callable[[Any, Batch], tuple[jax.Array, jax.Array]]:
    """A jitted (params, batch) -> (sum of nats, weight), without dropout."""
    return jax.jit(loss)


def _gradients(loss: Loss, params: Any, batch: Batch, rng: jax.Array, accum_steps: int) -> tuple:
    """(nats, weight, gradients) summed over the microbatches of a batch."""
    differentiate = jax.value_and_grad(loss, has_aux=True)
    if accum_steps == 1:
        (nats, weight), grads = differentiate(params, batch, jax.random.fold_in(rng, 0))
        return nats, weight, grads

    def add(carry, scanned):
        microbatch, index = scanned
        (nats, weight), grads = differentiate(params, microbatch, jax.random.fold_in(rng, index))
        return jax.tree.map(jnp.add, carry, (nats, weight, grads)), None

    def microbatches(x: jax.Array) -> jax.Array:
        return x.reshape(-1, accum_steps, *x.shape[1:]).swapaxes(0, 1)

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    scanned = (jax.tree.map(microbatches, batch), jnp.arange(accum_steps))
    return jax.lax.scan(add, (jnp.zeros(()), jnp.zeros(()), zeros), scanned)[0]


def _norms(tree: Any) -> dict[str, jax.Array]:
    """The norm of every array by its path; where the first axis is of layers, one a layer."""
    found = {}
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        name = '/'.join(str(key.key) for key in path)
        over = tuple(range(1 if '/block_' in name else 0, x.ndim))
        found[name] = jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), over))
    return found


def _shardings(target: State) -> Any:
    return jax.tree.map(lambda x: x.sharding, target)


def _create(init_params: Callable, optimizer: Any, seed: int, options: Options) -> State:
    return _start(init_params(jax.random.key(seed)), optimizer, options)


def _start(params: Any, optimizer: optax.GradientTransformation, options: Options) -> State:
    # Gradients are summed in float32, so the moments are float32 whatever the weights are.
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    average = wide if options.ema_decay else None
    if options.ema_decay:  # not the same buffers as the weights, which every step gives up
        average = jax.tree.map(jnp.copy, wide)
    moments = optimizer.init(wide)
    return State(jnp.zeros((), jnp.int32), params, moments, average, guard_lib.empty())
