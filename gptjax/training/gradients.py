# SPDX-License-Identifier: Apache-2.0
"""Gradients of a batch, which travel between devices as seldom as may be.

Devices that hold the same weights differ in their rows alone. Each group of them sums over its rows
first, through all layers and microbatches, and the groups add their sums up once, at the end:
accumulation makes that no dearer, nor do slices, between which it is slow. (Rajbhandari et al. 2020
count what travels, ZeRO, section 7.)
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from gptjax.runtime import replicas
from gptjax.training import losses, noise


def make(
    loss: losses.Loss,
    merge: Callable,
    device_windows: int,
    reduce_dtype: str,
    measure_noise: bool = False,
) -> Callable[..., tuple]:
    """(trained, frozen, batch, key, specs, into) -> (objective, sums, gradients), of a batch.

    Args:
      merge: (trained, frozen) -> the parameters that the loss takes.
      device_windows: rows of a microbatch on every device, at most; 0 = all.
      reduce_dtype: in which gradients travel between groups of devices.
      measure_noise: whether the sums get those of training/noise.py.

    specs: the trained parameters' PartitionSpecs; None = every device holds them whole. into: those
    that gradients get, which may split them over the groups, too. Gradients are float32.
    """

    def gradients(
        params: Any,
        frozen: Any,
        batch: Mapping[str, jax.Array],
        rng: jax.Array,
        specs: Any = None,
        into: Any = None,
    ) -> tuple:
        if specs is None:
            specs = into = jax.tree.map(lambda _: PartitionSpec(), params)

        def of_rows(*arguments: Any) -> tuple:
            total, sums, grads = _summed(loss, merge, device_windows, measure_noise, *arguments)
            return total, sums, _placed(grads, specs)

        def of_group(*arguments: Any) -> tuple:
            total, sums, grads = of_rows(*arguments)
            added = jax.tree.map(functools.partial(_added, dtype=reduce_dtype), grads, into)
            return *jax.lax.psum((total, sums), replicas.AXIS), _placed(added, specs)

        rows = jnp.arange(len(jax.tree.leaves(batch)[0]))
        arguments = (params, frozen, {**batch, losses.ROWS: rows}, rng)
        if replicas.count() == 1:
            total, sums, grads = of_rows(*arguments)
        else:
            whole, rows_of_group = PartitionSpec(), PartitionSpec(replicas.AXIS)
            total, sums, grads = replicas.mapped(
                of_group,
                (whole, whole, rows_of_group, whole),
                (whole, whole, jax.tree.map(_over_groups, into)),
            )(*arguments)
            grads = _placed(grads, into)
        return total, sums, jax.tree.map(lambda g: g.astype(jnp.float32), grads)

    return gradients


def _summed(
    loss: losses.Loss,
    merge: Callable,
    device_windows: int,
    measure_noise: bool,
    params: Any,
    frozen: Any,
    batch: Mapping[str, jax.Array],
    rng: jax.Array,
) -> tuple:
    """(objective, sums, gradients), over all microbatches."""

    def one(batch: Mapping[str, jax.Array]) -> tuple:
        def merged(params: Any) -> tuple[jax.Array, losses.Sums]:
            return loss(merge(params, frozen), batch, rng)

        (total, sums), grads = jax.value_and_grad(merged, has_aux=True)(params)
        if measure_noise:
            sums = {**sums, **noise.of_piece(grads, sums['weight'])}
        return total, sums, grads

    rows = len(batch[losses.ROWS])
    at_once = replicas.at_once(rows, device_windows)
    if rows == at_once:
        return one(batch)

    def add(carry: tuple, microbatch: Mapping[str, jax.Array]) -> tuple[tuple, None]:
        return jax.tree.map(jnp.add, carry, one(microbatch)), None

    def microbatches(x: jax.Array) -> jax.Array:
        return x.reshape(at_once, rows // at_once, *x.shape[1:]).swapaxes(0, 1)

    scanned = jax.tree.map(microbatches, batch)
    shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], scanned))
    # Gradients are summed in float32, whatever the weights are.
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
    return jax.lax.scan(add, zeros, scanned)[0]


def _added(x: jax.Array, into: PartitionSpec, dtype: str) -> jax.Array:
    """The sum over all groups; of an array that is split over them this group's part."""
    x = x.astype(dtype)
    if replicas.platform() == 'cpu':  # where XLA adds nothing narrower between devices
        x = x.astype(jnp.float32)
    axis = replicas.split_axis(into)
    if axis is None:
        return jax.lax.psum(x, replicas.AXIS)
    return jax.lax.psum_scatter(x, replicas.AXIS, scatter_dimension=axis, tiled=True)


def _over_groups(into: PartitionSpec) -> PartitionSpec:
    axis = replicas.split_axis(into)
    return PartitionSpec() if axis is None else PartitionSpec(*(None,) * axis, replicas.AXIS)


def _placed(tree: Any, specs: Any) -> Any:
    return jax.tree.map(replicas.placed, tree, specs)
