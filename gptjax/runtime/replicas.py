# SPDX-License-Identifier: Apache-2.0
"""Groups of devices that each hold the weights, on the mesh in force: they differ in their rows."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from gptjax.runtime import mesh

AXIS = mesh.REPLICAS
_WORTH = 2**16  # values of an array that is worth a message of its own


def count() -> int:
    """How many groups there are; 1 where no mesh is in force."""
    return jax.sharding.get_abstract_mesh().shape.get(AXIS, 1)


def platform() -> str:
    """What the mesh is of: cpu, tpu, cuda ...; it may be absent. '' = there is no mesh."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else ''


def mapped(f: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """jax.shard_map over the groups alone; what is sharded otherwise stays so in f.

    Axes of one device are mapped, too: where no other is left, f is a single device's.
    """
    shape = jax.sharding.get_abstract_mesh().shape
    names = {AXIS, *(axis for axis, size in shape.items() if size == 1)}
    return jax.shard_map(
        f, in_specs=in_specs, out_specs=out_specs, axis_names=names, check_vma=False
    )


def placed(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """An array with a sharding, by those axes that the code around is not mapped over."""
    taken = jax.sharding.get_abstract_mesh().manual_axes
    free = [tuple(axis for axis in axes if axis not in taken) or None for axes in _axes(spec)]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*free)) if any(free) else x


def at_once(rows: int, device_windows: int) -> int:
    """How many of a group's rows make a microbatch: as many of each device as divide its rows.

    Args:
      device_windows: of each device, at most; 0 = all.
    """
    shape = jax.sharding.get_abstract_mesh().shape
    devices = math.prod(shape.get(axis, 1) for axis in mesh.BATCH if axis != AXIS)
    return devices * most(max(1, rows // devices), device_windows)


def most(rows: int, device_windows: int) -> int:
    """The rows that a device takes at once of those that it has, as at_once()."""
    return max(n for n in range(1, min(rows, device_windows or rows) + 1) if rows % n == 0)


def split(sharding: NamedSharding, x: Any) -> NamedSharding:
    """A sharding of an array that splits it over the groups, too, where one of its axes divides.

    One that is not split yet is best: then parts need not be exchanged once more.

    Args:
      x: the array, or its shape and dtype.
    """
    sizes, copies = sharding.mesh.shape, sharding.mesh.shape.get(AXIS, 1)
    axes = _axes(sharding.spec) + [()] * (len(x.shape) - len(sharding.spec))
    shares = [math.prod(sizes[name] for name in names) for names in axes]
    divide = [i for i, size in enumerate(x.shape) if size % (shares[i] * copies) == 0]
    is_split = any(AXIS in names for names in axes)
    if copies == 1 or is_split or not divide or math.prod(x.shape) < _WORTH:
        return sharding
    best = max(divide, key=lambda i: (shares[i] == 1, x.shape[i] // shares[i]))
    axes[best] = (*axes[best], AXIS)
    return NamedSharding(sharding.mesh, PartitionSpec(*(names or None for names in axes)))


def split_axis(spec: PartitionSpec) -> int | None:
    """The axis of an array that is split over the groups and over nothing else, if one is."""
    return next((i for i, axes in enumerate(_axes(spec)) if axes == (AXIS,)), None)


def _axes(spec: PartitionSpec) -> list[tuple[str, ...]]:
    return [(part,) if isinstance(part, str) else tuple(part or ()) for part in spec]
