# SPDX-License-Identifier: Apache-2.0
"""The train step, and the state it carries."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

Batch = dict[str, jax.Array]
# (params, batch, dropout key) -> (sum of nats, weight)
Loss = Callable[[Any, Batch, jax.Array], tuple[jax.Array, jax.Array]]


class State(NamedTuple):
    """What a step changes."""

    step: jax.Array  # updates made, int32
    params: Any
    opt_state: Any


def abstract(
    init_params: Callable[[jax.Array], Any],
    optimizer: optax.GradientTransformation,
    shardings: Callable[[Any], Any],
) -> State:
    """The state's shapes, dtypes and shardings, without an array.

    Args:
      init_params: key -> boxed parameters; Adam's moments inherit their boxes.
      shardings: from runtime.mesh.
    """
    boxed = jax.eval_shape(lambda: _create(init_params, optimizer, 0))
    plain = nn.meta.unbox(boxed)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), plain, shardings(boxed)
    )


def init(
    init_params: Callable[[jax.Array], Any],
    optimizer: optax.GradientTransformation,
    seed: int,
    target: State,
) -> State:
    """A fresh state, made directly in the shardings of `target` (from abstract())."""

    def create() -> State:
        return nn.meta.unbox(_create(init_params, optimizer, seed))

    return jax.jit(create, out_shardings=jax.tree.map(lambda x: x.sharding, target))()


def init_from(params: Any, optimizer: optax.GradientTransformation, target: State) -> State:
    """A state that starts from given parameters, which it takes over; otherwise as init()."""
    shardings = jax.tree.map(lambda x: x.sharding, target)
    return jax.jit(
        lambda params: _start(params, optimizer), out_shardings=shardings, donate_argnums=0
    )(params)


def make_train_step(
    loss: Loss, optimizer: optax.GradientTransformation, seed: int, accum_steps: int
) -> Callable[[State, Batch], tuple[State, dict[str, jax.Array]]]:
    """A jitted (state, batch) -> (state, metrics); the old state's memory is reused.

    A batch is cut into `accum_steps` microbatches. Nats and weights are summed over all of them and
    divided once, so that masked microbatches count by their tokens.
    """

    def train_step(state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        rng = jax.random.fold_in(jax.random.key(seed + 1), state.step)

        def add(carry, scanned):
            microbatch, index = scanned
            key = jax.random.fold_in(rng, index)
            (nats, weight), grads = jax.value_and_grad(loss, has_aux=True)(
                state.params, microbatch, key
            )
            return jax.tree.map(jnp.add, carry, (nats, weight, grads)), None

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), state.params)
        start = (jnp.zeros(()), jnp.zeros(()), zeros)
        if accum_steps == 1:
            (nats, weight, grads), _ = add(start, (batch, 0))
        else:
            scanned = (jax.tree.map(_microbatches, batch), jnp.arange(accum_steps))
            (nats, weight, grads), _ = jax.lax.scan(add, start, scanned)
        weight = jnp.maximum(weight, 1.0)
        grads = jax.tree.map(lambda g: g / weight, grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            'train/loss': nats / weight,
            'opt/grad_norm': optax.tree.norm(grads),
            'opt/update_norm': optax.tree.norm(updates),
        }
        return State(state.step + 1, params, opt_state), metrics

    def _microbatches(x: jax.Array) -> jax.Array:
        return x.reshape(-1, accum_steps, *x.shape[1:]).swapaxes(0, 1)

    return jax.jit(train_step, donate_argnums=0)


def make_eval_step(
    loss: Callable[[Any, Batch], tuple[jax.Array, jax.Array]],
) -> Callable[[Any, Batch], tuple[jax.Array, jax.Array]]:
    """A jitted (params, batch) -> (sum of nats, weight), without dropout."""
    return jax.jit(loss)


def _create(init_params: Callable, optimizer: optax.GradientTransformation, seed: int) -> State:
    return _start(init_params(jax.random.key(seed)), optimizer)


def _start(params: Any, optimizer: optax.GradientTransformation) -> State:
    # Gradients are summed in float32, so the moments are float32 whatever the weights are.
    moments = optimizer.init(jax.tree.map(lambda p: p.astype(jnp.float32), params))
    return State(jnp.zeros((), jnp.int32), params, moments)
