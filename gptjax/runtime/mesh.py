# SPDX-License-Identifier: Apache-2.0
"""The device mesh: the only place that names its axes and makes shardings."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from flax.core import meta
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from gptjax.configs import errors

_AXES = ('data', 'fsdp', 'tensor', 'context')
BATCH = ('data', 'fsdp')
REPLICAS = 'data'  # of BATCH: along which devices hold the same weights
_LENGTH = {2: 1, 3: 2}  # rank of an array of a batch -> its axis of length

# Logical axis -> mesh axes. Parameters are split over fsdp along d_model and over tensor along
# heads, d_ff and the vocabulary (Megatron-LM, section 3); activations by batch, length and heads.
_RULES = {
    'vocab': 'tensor',
    'embed': 'fsdp',
    'heads': 'tensor',
    'head_dim': None,
    'mlp': 'tensor',
    'experts': None,
    'layers': None,
    'ctx': None,
    'batch': BATCH,
    'length': 'context',
    'act_embed': None,
    'act_heads': 'tensor',
    'act_head_dim': None,
    'act_mlp': 'tensor',
    'act_vocab': 'tensor',
}


class _Part(NamedTuple):
    """A process's share of a batch."""

    rows: list[int]  # which of the data x fsdp shares of the rows
    columns: slice  # which of the shares of the length; those between are held along


def one_device() -> 'Mesh':
    """A mesh of this process's first device alone."""
    return Mesh(Config(1, 1, 1, 1, 1, 'data'), jax.local_devices()[:1])


def fetched(tree: Any) -> Any:
    """A tree of arrays as numpy, whole on every host; all hosts of a mesh ask for it together."""

    def whole(x: Any) -> Any:
        split = isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated)
        return multihost_utils.process_allgather(x, tiled=True) if split else x

    return jax.device_get(jax.tree.map(whole, tree))


@dataclasses.dataclass(frozen=True)
class Config:
    """Devices along each axis; -1 on at most one axis takes all that are left.

    slices: of TPUs, between which data centre's network runs, or of GPUs hosts; -1 = what the
    devices say. across: the axis that they share; the others stay inside one.
    """

    data: int
    fsdp: int
    tensor: int
    context: int
    slices: int
    across: Literal['data', 'fsdp']

    def __post_init__(self) -> None:
        errors.require_choice(self, 'across', BATCH)
        errors.require(
            self.slices > 0 or self.slices == -1,
            f'mesh.slices must be above 0, or -1 for what the devices say; got {self.slices}',
        )
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
            _arranged(shape, devices, config.slices, config.across),
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
        """The sharding of an array that every device holds whole."""
        return NamedSharding(self.mesh, PartitionSpec())

    def rows(self) -> int:
        """How many devices share the rows of a batch: data x fsdp."""
        return math.prod(self.mesh.shape[axis] for axis in BATCH)

    def check_batch(
        self,
        windows: int,
        n_ctx: int,
        field: str = 'batch.batch_tokens, and ramp_from_tokens for a ramp',
    ) -> None:
        """Raises UsageError unless a batch divides. Args: field: what to change."""
        over = self.rows()
        errors.require(
            windows % over == 0,
            f'a batch of {windows} windows does not divide over data x fsdp = {over}; use a '
            f'multiple of {over} windows of {n_ctx} tokens ({field}), or change the mesh',
        )
        errors.require(
            n_ctx % self.mesh.shape['context'] == 0,
            f'n_ctx = {n_ctx} does not divide over context = {self.mesh.shape["context"]}',
        )

    def check_model(self, **sizes: int) -> None:
        """Raises UsageError unless parameters of these sizes divide, as vocab=512, embed=64.

        shardings() says so of every parameter, but only once a model can be traced at all.
        """
        for logical, size in sizes.items():
            self._check_axis('the model', logical, size, _RULES[logical])

    def region(self, windows: int, n_ctx: int) -> tuple[np.ndarray, slice]:
        """The rows and columns of a (windows, n_ctx) batch that this process's devices hold.

        Rows are listed, for on a torus of devices those of one host need not be neighbours.
        """
        part = self._part()
        size, width = windows // self.rows(), n_ctx // self.mesh.shape['context']
        rows = np.array(part.rows)[:, None] * size + np.arange(size)[None]
        return rows.ravel(), slice(part.columns.start * width, part.columns.stop * width)

    def put(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """This process's region of a batch -> arrays sharded over the whole mesh.

        Each array by its own rank: (B,), (B, L), (B, C, L), and (B, ...) of images. Rows are spread
        over data x fsdp, the length over context.

        Raises:
          UsageError: an array's rows or length do not divide over the mesh.
        """
        return {name: self._put(name, part) for name, part in batch.items()}

    def abstract_batch(self, windows: int, n_ctx: int) -> dict[str, jax.ShapeDtypeStruct]:
        """What put() makes of a batch of text, without an array: to compile for."""
        kinds = {'tokens': np.int32, 'targets': np.int32, 'weights': np.float32}
        return {
            name: jax.ShapeDtypeStruct((windows, n_ctx), kind, sharding=self._of_batch(2))
            for name, kind in kinds.items()
        }

    def _of_batch(self, rank: int) -> NamedSharding:
        axes = [_RULES['batch'], *(None for _ in range(rank - 1))]
        if rank in _LENGTH:
            axes[_LENGTH[rank]] = _RULES['length']
        return NamedSharding(self.mesh, PartitionSpec(*axes))

    def _part(self) -> '_Part':
        """Which shares of the rows and of the length this process's devices hold."""
        places = [
            place
            for place, device in np.ndenumerate(self.mesh.devices)
            if device.process_index == jax.process_index()
        ]
        fsdp = self.mesh.shape['fsdp']
        rows = sorted({data * fsdp + shard for data, shard, _, _ in places})
        columns = [column for *_, column in places]
        return _Part(rows, slice(min(columns), max(columns) + 1))

    def _put(self, name: str, local: np.ndarray) -> jax.Array:
        part, shape = self._part(), list(local.shape)
        axes = [(0, len(part.rows), self.rows())]
        if local.ndim in _LENGTH:
            span = part.columns.stop - part.columns.start
            axes.append((_LENGTH[local.ndim], span, self.mesh.shape['context']))
        for axis, mine, every in axes:
            errors.require(
                local.shape[axis] % mine == 0,
                f'{name}: axis {axis} of {local.shape} does not divide over {every} devices; use '
                f'a multiple of {every}, or change --config.mesh',
            )
            shape[axis] = local.shape[axis] // mine * every
        size = shape[0] // self.rows()
        rows = np.concatenate([np.arange(i * size, (i + 1) * size) for i in part.rows])
        first = [0] * local.ndim
        if local.ndim in _LENGTH:
            axis = _LENGTH[local.ndim]
            first[axis] = part.columns.start * shape[axis] // self.mesh.shape['context']

        def shard(index: tuple[slice, ...]) -> np.ndarray:
            mine = np.searchsorted(rows, np.arange(shape[0])[index[0]])
            spans = [i.indices(n)[:2] for i, n in zip(index[1:], shape[1:], strict=True)]
            rest = (slice(a - f, b - f) for (a, b), f in zip(spans, first[1:], strict=True))
            return local[(mine, *rest)]

        return jax.make_array_from_callback(tuple(shape), self._of_batch(local.ndim), shard)

    def _sharding(self, path: tuple, leaf: Any) -> NamedSharding:
        if not _is_box(leaf):
            return self.replicated()
        name = jax.tree_util.keystr(path)
        try:
            spec = leaf.get_partition_spec()
        except ValueError as e:
            raise errors.UsageError(f'{name}: {e}') from e
        for size, axis, logical in zip(leaf.unbox().shape, spec, leaf.about.names, strict=True):
            self._check_axis(name, logical, size, axis)
        return NamedSharding(self.mesh, spec)

    def _check_axis(self, name: str, logical: str | None, size: int, axis: str | None) -> None:
        over = self.mesh.shape[axis] if axis else 1
        padded = -(-size // over) * over
        errors.require(
            size % over == 0,
            f'{name}: axis {logical} of size {size} does not divide over mesh axis '
            f'{axis} = {over}; change --config.mesh.{axis}'
            + (f' or pad: --config.model.n_vocab={padded}' if logical == 'vocab' else ''),
        )


def _arranged(
    shape: Mapping[str, int], devices: Sequence[Any], slices: int, across: str
) -> np.ndarray:
    """Devices in the shape of a mesh: one slice behind the other along one axis.

    Raises:
      UsageError: they are in another number of slices, or that axis does not divide over them.
    """
    groups = _slices(devices, slices)
    errors.require(
        shape[across] % len(groups) == 0,
        f'mesh.{across} = {shape[across]} does not divide over {len(groups)} slices; use a '
        f'multiple of {len(groups)}, or --config.mesh.across={"".join({*BATCH} - {across})}',
    )
    inside = {**shape, across: shape[across] // len(groups)}
    sizes = list(inside.values())
    parts = [
        mesh_utils.create_device_mesh(sizes, devices=group, allow_split_physical_axes=True)
        for group in groups
    ]
    return np.concatenate(parts, axis=_AXES.index(across))


def _slices(devices: Sequence[Any], wanted: int) -> list[list[Any]]:
    """The devices of each slice, as they say; of CPUs, which say nothing, `wanted` equal parts."""
    kind = devices[0].platform
    by: dict[int, list[Any]] = {}
    for device in devices:
        # Some TPUs of Google's cloud have no slice_index. GPUs of one host are near each other.
        without = device.process_index if kind == 'gpu' else 0
        slice_ = getattr(device, 'slice_index', without)
        by.setdefault(slice_, []).append(device)
    found = [by[key] for key in sorted(by)]
    if kind == 'gpu' and wanted == 1:
        return [list(devices)]
    if kind == 'cpu' and wanted > 1 and len(devices) % wanted == 0:
        size = len(devices) // wanted
        found = [list(devices[i : i + size]) for i in range(0, len(devices), size)]
    errors.require(
        wanted in (-1, len(found)),
        f'mesh.slices = {wanted}, and the devices are in {len(found)} slices; set '
        f'--config.mesh.slices={len(found)}, or -1',
    )
    errors.require(
        len({len(group) for group in found}) == 1,
        f'slices of unlike sizes make no mesh: {[len(group) for group in found]} devices',
    )
    return found


def _is_box(x: Any) -> bool:
    return isinstance(x, meta.AxisMetadata)
