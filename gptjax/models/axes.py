# SPDX-License-Identifier: Apache-2.0
"""The vocabulary of logical axes, strictly resolved.

flax drops in silence what it does not understand: a misspelt axis is replicated, the second of two
logical axes on one mesh axis is lost, and a constraint outside a mesh does nothing. Ours raise.
The rules (logical axis -> mesh axes) are those in force, set by runtime.mesh's scope().
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
from flax import linen as nn
from flax import struct
from flax.core import meta
from jax.sharding import PartitionSpec

PARAMETER_AXES = frozenset(
    {'vocab', 'embed', 'heads', 'head_dim', 'mlp', 'experts', 'layers', 'ctx'}
)
ACTIVATION_AXES = frozenset(
    {'batch', 'length', 'act_embed', 'act_heads', 'act_head_dim', 'act_mlp', 'act_vocab'}
)

NO_MESH = jax.sharding.AbstractMesh((), ())  # in force: what is traced is on one device
Initializer = Callable[..., jax.Array]


class Parameter(NamedTuple):
    """What the layer that makes a parameter says of it, once for all who ask.

    Sharding, the decay mask, muP, optimisers that need matrices, quantisation, freezing.
    """

    kind: Literal['matrix', 'table', 'vector']
    names: tuple[str, ...]  # of its axes
    inputs: tuple[int, ...]  # axes that are summed over; of a table where it gives logits
    outputs: tuple[int, ...]  # axes that then remain
    turns: bool  # whether what reads it also takes models.quantize.ByOutput
    stacked: bool = False  # whether the first axis is of layers
    rate: float = 1.0  # what multiplies its learning rate

    @property
    def decays(self) -> bool:
        """Whether weight decay shrinks it: embeddings too, but no bias and no gain."""
        return self.kind != 'vector'

    def stack(self, name: str) -> 'Parameter':
        """The description of several such, along a new first axis."""
        inputs, outputs = (tuple(i + 1 for i in some) for some in (self.inputs, self.outputs))
        names = (name, *self.names)
        return self._replace(names=names, inputs=inputs, outputs=outputs, stacked=True)

    def unstack(self) -> 'Parameter':
        """The description of one of a stack."""
        inputs, outputs = (tuple(i - 1 for i in some) for some in (self.inputs, self.outputs))
        return self._replace(names=self.names[1:], inputs=inputs, outputs=outputs, stacked=False)


class Boxed(struct.PyTreeNode, meta.AxisMetadata):
    """A parameter with what its layer says of it; its partition spec is resolved strictly."""

    value: Any
    about: Parameter = struct.field(pytree_node=False)

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> 'Boxed':
        return self.replace(value=val)

    def add_axis(self, index: int, params: dict[Any, Any]) -> 'Boxed':
        if index:
            raise ValueError('layers are stacked along the first axis')
        return self.replace(about=self.about.stack(params[nn.PARTITION_NAME]))

    def remove_axis(self, index: int, params: dict[Any, Any]) -> 'Boxed':
        raise NotImplementedError('nothing takes a stack apart by its boxes')

    def get_partition_spec(self) -> PartitionSpec:
        found = _resolve(self.about.names, PARAMETER_AXES)
        if self.about.kind != 'vector':
            return found
        of_batch = flat(spec('batch'))  # a vector is too small to be worth gathering
        return PartitionSpec(*(None if axis in of_batch else axis for axis in found))


def matrix(
    init: Initializer, *names: str, inputs: tuple[int, ...], turns: bool = False
) -> Initializer:
    """`init` of a weight that multiplies, boxed with one axis name a dimension.

    Args:
      inputs: the axes that are summed over; those behind them are the outputs, those before them
        neither (one weight for each of several experts, say).
      turns: whether what reads it also takes models.quantize.ByOutput.

    Raises:
      ValueError: a name is not in the vocabulary, or their number is not that of the dimensions.
    """
    outputs = tuple(range(max(inputs) + 1, len(names)))
    return _boxed(init, Parameter('matrix', names, inputs, outputs, turns))


def table(init: Initializer, *names: str, turns: bool = False) -> Initializer:
    """`init` of a table of one vector (last axis) a token or position; the rest as matrix()."""
    return _boxed(init, Parameter('table', names, (1,), (0,), turns))


def vector(init: Initializer, *names: str) -> Initializer:
    """`init` of a bias, a gain, or what else does not decay; the rest as matrix()."""
    return _boxed(init, Parameter('vector', names, (), (), False))


def describe(boxed: Any, rate: Callable[[Parameter], float] = lambda about: 1.0) -> dict:
    """Path -> Parameter, of a tree of boxed parameters, abstract or not.

    Args:
      rate: what multiplies a parameter's learning rate.
    """
    leaves = jax.tree_util.tree_leaves_with_path(boxed, is_leaf=lambda x: isinstance(x, Boxed))
    return {
        '/'.join(key.key for key in path): leaf.about._replace(rate=rate(leaf.about))
        for path, leaf in leaves
    }


def stacked(tree: Any) -> Any:
    """A tree of boxed parameters whose values got a leading axis: names it 'layers'."""
    return meta.add_axis(tree, 0, {nn.PARTITION_NAME: 'layers'})


def constrain(x: jax.Array, *names: str) -> jax.Array:
    """Shards an activation by its logical axes; the identity where no mesh is in force.

    Raises:
      ValueError: an unknown name, two names on one mesh axis, or a mesh without rules.
    """
    _check(names, ACTIVATION_AXES)
    if len(names) != x.ndim:
        raise ValueError(f'axes {names} do not fit the shape {x.shape}')
    if jax.sharding.get_abstract_mesh().empty or not _free():
        return x
    return jax.lax.with_sharding_constraint(x, _resolve(names, ACTIVATION_AXES))


def spec(*names: str) -> PartitionSpec:
    """The mesh axes of an activation's logical axes, by the rules in force."""
    return _resolve(names, ACTIVATION_AXES)


def parameter_spec(*names: str) -> PartitionSpec:
    """The mesh axes of a parameter's logical axes, by the rules in force."""
    return _resolve(names, PARAMETER_AXES)


def flat(spec: PartitionSpec) -> tuple[str, ...]:
    """The mesh axes that occur in a spec."""
    return tuple(a for part in spec if part for a in ((part,) if isinstance(part, str) else part))


def mesh_axis(name: str) -> str:
    """The one mesh axis that an activation axis is split over."""
    return spec(name)[0]


def mesh_size(name: str) -> int:
    """How many devices an activation axis is split over; 1 where no mesh is in force."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return 1
    return math.prod(mesh.shape[axis] for axis in flat(spec(name)))


def parameter_size(name: str) -> int:
    """How many devices a parameter's axis is split over."""
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape[axis] for axis in flat(parameter_spec(name)))


def fits(shape: tuple[int, ...], *names: str) -> bool:
    """Whether an activation divides over the mesh in force."""
    return all(n % mesh_size(name) == 0 for n, name in zip(shape, names, strict=True))


def n_devices() -> int:
    """The number of devices of the mesh in force; 1 where there is none, or each is on its own."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in _free())


def shard_map(f: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """jax.shard_map over all mesh axes that the code around is not mapped over already."""
    return jax.shard_map(
        f, in_specs=in_specs, out_specs=out_specs, axis_names=_free(), check_vma=False
    )


def platform() -> str:
    """What is being compiled for: cpu, tpu, cuda ...; a mesh may be of devices that are absent."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()


def device_kind() -> str:
    """The same, by the name that vendors sell it under."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device is not None else jax.devices()[0].device_kind


def _free() -> frozenset[str]:
    """The axes of the mesh in force that the code around is not mapped over."""
    mesh = jax.sharding.get_abstract_mesh()
    return frozenset(mesh.axis_names) - frozenset(mesh.manual_axes)


def _boxed(init: Initializer, about: Parameter) -> Initializer:
    _check(about.names, PARAMETER_AXES)

    def init_boxed(rng: jax.Array, shape: tuple[int, ...], dtype: Any) -> Boxed:
        if len(shape) != len(about.names):
            raise ValueError(f'axes {about.names} do not fit the shape {shape}')
        return Boxed(init(rng, shape, dtype), about)

    return init_boxed


def _check(names: tuple[str, ...], vocabulary: frozenset[str]) -> None:
    for name in names:
        if name not in vocabulary:
            raise ValueError(
                f'no logical axis {name!r}; there are: {", ".join(sorted(vocabulary))}'
            )


def _resolve(names: tuple[str, ...], vocabulary: frozenset[str]) -> PartitionSpec:
    """Logical names -> mesh axes, by the rules in force; without those that code is mapped over."""
    _check(names, vocabulary)
    mapped = jax.sharding.get_abstract_mesh().manual_axes
    rules = dict(nn.get_logical_axis_rules())
    if not rules:
        raise ValueError('no axis rules are in force; enter runtime.mesh scope() first')
    spec, taken = [], {}
    for name in names:
        if name not in rules:
            raise ValueError(f'the axis rules do not name {name!r}')
        target = rules[name]
        for mesh_axis in (target,) if isinstance(target, str) else target or ():
            if mesh_axis in taken:
                raise ValueError(
                    f'logical axes {taken[mesh_axis]!r} and {name!r} of {names} both map to mesh '
                    f'axis {mesh_axis!r}; give one of them another rule'
                )
            taken[mesh_axis] = name
        if isinstance(target, str):
            spec.append(None if target in mapped else target)
        else:
            spec.append(tuple(axis for axis in target or () if axis not in mapped) or None)
    return PartitionSpec(*spec)
