# SPDX-License-Identifier: Apache-2.0
"""Gradients of a batch, which travel between devices as seldom as may be.

Devices that hold the same weights differ in their rows alone. Each group of them sums over its rows
first, through all layers and microbatches, and the groups add their sums up once, at the end:
accumulation makes that no dearer, nor do slices, between which it is slow. (Rajbhandari et al. 2020
count what travels, ZeRO, section 7.)
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from gptjax.runtime import mesh as mesh_lib
from gptjax.training import losses


def make(
    loss: losses.Loss, merge: Callable, device_windows: int, reduce_dtype: str
) -> Callable[..., tuple]:
    """(trained, frozen, batch, key, specs) -> (objective, sums, gradients in float32), of a batch.

    Args:
      merge: (trained, frozen) -> the parameters that the loss takes.
      device_windows: rows of a microbatch on every device; 0 = all it has, as where it has fewer.
      reduce_dtype: in which gradients travel between groups of devices.

    specs: the trained parameters' PartitionSpecs, which the gradients get; None = of one device.
    """

    def gradients(
        params: Any, frozen: Any, batch: Mapping[str, jax.Array], rng: jax.Array, specs: Any = None
    ) -> tuple:
        def of_rows(*arguments: Any) -> tuple:
            total, sums, grads = _summed(loss, merge, device_windows, *arguments)
            return total, sums, grads if specs is None else _constrained(grads, specs)

        def of_group(*arguments: Any) -> tuple:
            total, sums, grads = of_rows(*arguments)
            grads = jax.tree.map(lambda g: g.astype(reduce_dtype), grads)
            if mesh_lib.platform() == 'cpu':  # where XLA adds nothing narrower between devices
                grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
            found = jax.lax.psum((total, sums, grads), mesh_lib.REPLICAS)
            return found if specs is None else (*found[:2], _constrained(found[2], specs))

        rows = jnp.arange(len(jax.tree.leaves(batch)[0]))
        arguments = (params, frozen, {**batch, losses.ROWS: rows}, rng)
        if mesh_lib.replicas() == 1:
            total, sums, grads = of_rows(*arguments)
        else:
            total, sums, grads = jax.shard_map(
                of_group,
                in_specs=(PartitionSpec(),) * 2
                + (PartitionSpec(mesh_lib.REPLICAS), PartitionSpec()),
                out_specs=PartitionSpec(),
                axis_names={mesh_lib.REPLICAS},
                check_vma=False,
            )(*arguments)
        return total, sums, jax.tree.map(lambda g: g.astype(jnp.float32), grads)

    return gradients


def _summed(
    loss: losses.Loss,
    merge: Callable,
    device_windows: int,
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
        return total, sums, grads

    at_once = mesh_lib.rows_of_group(device_windows)
    rows = len(batch[losses.ROWS])
    if not at_once or rows <= at_once:
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


def _constrained(tree: Any, specs: Any) -> Any:
    return jax.tree.map(jax.lax.with_sharding_constraint, tree, specs)
