# SPDX-License-Identifier: Apache-2.0
"""The device mesh: the only place that names its axes and makes shardings."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax.core import meta
from jax.experimental import mesh_utils
from jax.sharding import NamedSharding, PartitionSpec

from gptjax.configs import errors

_AXES = ('data', 'fsdp', 'tensor', 'context')
_BATCH = ('data', 'fsdp')

# Logical axis -> mesh axes. Parameters are split over fsdp along d_model and over tensor along
# heads, d_ff and the vocabulary (Megatron-LM, section 3); activations by batch, length and heads.
_RULES = {
    'vocab': 'tensor',
    'embed': 'fsdp',
    'heads': 'tensor',
    'head_dim': None,
    'mlp': 'tensor',
    'layers': None,
    'ctx': None,
    'batch': _BATCH,
    'length': 'context',
    'act_embed': None,
    'act_heads': 'tensor',
    'act_head_dim': None,
    'act_mlp': 'tensor',
    'act_vocab': 'tensor',
}


def one_device() -> 'Mesh':
    """A mesh of this process's first device alone."""
    return Mesh(Config(1, 1, 1, 1), jax.local_devices()[:1])


@dataclasses.dataclass(frozen=True)
class Config:
    """Devices along each axis; -1 on at most one axis takes all that are left."""

    data: int
    fsdp: int
    tensor: int
    context: int

    def __post_init__(self) -> None:
        sizes = [getattr(self, axis) for axis in _AXES]
        errors.require(
            all(size > 0 or size == -1 for size in sizes) and sizes.count(-1) <= 1,
            f'mesh sizes must be above 0, one of them may be -1; got {sizes} for {_AXES}',
        )


class Mesh:
    """A mesh of devices, the axis rules that go with it, and what is sharded over it."""

    def __init__(self, config: Config, devices: list[Any] | None = None) -> None:
        """Raises UsageError where the sizes do not make up the number of devices."""
        devices = jax.devices() if devices is None else devices
        sizes = [getattr(config, axis) for axis in _AXES]
        known = math.prod(size for size in sizes if size > 0)
        if -1 in sizes and len(devices) % known == 0:
            sizes[sizes.index(-1)] = len(devices) // known
        shape = dict(zip(_AXES, sizes, strict=True))
        errors.require(
            math.prod(sizes) == len(devices),
            f'a mesh of {shape} does not make up {len(devices)} devices; set --config.mesh.<axis>, '
            'one of them may be -1',
        )
        self.mesh = jax.sharding.Mesh(
            mesh_utils.create_device_mesh(sizes, devices=devices, allow_split_physical_axes=True),
            _AXES,
            axis_types=(jax.sharding.AxisType.Auto,) * len(_AXES),
        )

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """Puts the mesh and its axis rules in force."""
        with jax.set_mesh(self.mesh), nn.logical_axis_rules(tuple(_RULES.items())):
            yield

    def shardings(self, abstract: Any) -> Any:
        """Shardings of a tree of (boxed) abstract arrays; what is not boxed is replicated.

        Raises:
          UsageError: an array does not divide over the mesh, two of its axes fall on one mesh axis,
            or an axis is unknown; the message names its path.
        """
        with self.scope():
            return jax.tree_util.tree_map_with_path(self._sharding, abstract, is_leaf=_is_box)

    def replicated(self) -> NamedSharding:
        """Of an array that every device holds whole."""
        return NamedSharding(self.mesh, PartitionSpec())

    def rows(self) -> int:
        """How many devices share the rows of a batch: data x fsdp."""
        return math.prod(self.mesh.shape[axis] for axis in _BATCH)

    def check_batch(self, windows: int, n_ctx: int, accum_steps: int = 1) -> None:
        """Raises UsageError unless microbatches of (windows / accum_steps, n_ctx) divide."""
        over = self.rows()
        errors.require(
            windows % (over * accum_steps) == 0,
            f'a batch of {windows} windows in {accum_steps} microbatches does not divide over '
            f'data x fsdp = {over}; use a multiple of {over * accum_steps} windows of {n_ctx} '
            'tokens (batch_tokens, and ramp_from_tokens for a ramp), or change the mesh',
        )
        errors.require(
            n_ctx % self.mesh.shape['context'] == 0,
            f'n_ctx = {n_ctx} does not divide over context = {self.mesh.shape["context"]}',
        )

    def region(self, windows: int, n_ctx: int) -> tuple[np.ndarray, slice]:
        """The rows and columns of a (windows, n_ctx) batch that this process's devices hold.

        Rows are listed, for on a torus of devices those of one host need not be neighbours.
        """
        indices = self._batch_sharding().addressable_devices_indices_map((windows, n_ctx)).values()
        rows = {row for index in indices for row in range(windows)[index[0]]}
        columns = [index[1].indices(n_ctx) for index in indices]
        return np.array(sorted(rows)), slice(min(c[0] for c in columns), max(c[1] for c in columns))

    def put(self, batch: Mapping[str, np.ndarray], windows: int, n_ctx: int) -> dict[str, Any]:
        """This process's region of a batch -> arrays sharded over the whole mesh."""
        sharding = self._batch_sharding()
        rows, columns = self.region(windows, n_ctx)

        def put_one(part: np.ndarray) -> jax.Array:
            def shard(index: tuple[slice, slice]) -> np.ndarray:
                mine = np.searchsorted(rows, range(windows)[index[0]])
                start, stop, _ = index[1].indices(n_ctx)
                return part[mine, start - columns.start : stop - columns.start]

            return jax.make_array_from_callback((windows, n_ctx), sharding, shard)

        return {name: put_one(part) for name, part in batch.items()}

    def abstract_batch(self, windows: int, n_ctx: int) -> dict[str, jax.ShapeDtypeStruct]:
        """What put() makes of a batch, without an array: to compile for."""
        kinds = {'tokens': np.int32, 'targets': np.int32, 'weights': np.float32}
        sharding = self._batch_sharding()
        return {
            name: jax.ShapeDtypeStruct((windows, n_ctx), kind, sharding=sharding)
            for name, kind in kinds.items()
        }

    def _batch_sharding(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(_RULES['batch'], _RULES['length']))

    def _sharding(self, path: tuple, leaf: Any) -> NamedSharding:
        if not _is_box(leaf):
            return self.replicated()
        name = jax.tree_util.keystr(path)
        try:
            spec = leaf.get_partition_spec()
        except ValueError as e:
            raise errors.UsageError(f'{name}: {e}') from e
        for size, axis, logical in zip(leaf.unbox().shape, spec, leaf.names, strict=True):
            over = self.mesh.shape[axis] if axis else 1
            errors.require(
                size % over == 0,
                f'{name}: axis {logical} of size {size} does not divide over mesh axis '
                f'{axis} = {over}; change --config.mesh.{axis}'
                + (' or pad --config.model.n_vocab' if logical == 'vocab' else ''),
            )
        return NamedSharding(self.mesh, spec)


def _is_box(x: Any) -> bool:
    return isinstance(x, meta.AxisMetadata)
