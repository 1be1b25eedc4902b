# SPDX-License-Identifier: Apache-2.0
"""The arrays of a checkpoint: how orbax writes them, and reads them on any mesh.

Devices that hold the same arrays read a part of each, and give the others the rest: storage is
asked for every byte once, however many there are.
"""

import concurrent.futures
import errno
import logging
import math
import os
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from gptjax.runtime import replicas
from gptjax.storage import buckets

_WORTH_BYTES = 2**20
_SPREAD_BYTES = 2**29  # of a device, that it has in parts and whole at once
_log = logging.getLogger(__name__)


def handler(folder: buckets.Anywhere) -> ocp.CompositeCheckpointHandler:
    """Uncompressed: compression takes 8 % off and 7 times as long.

    On a disk a file an array shard. In a bucket, where every request counts, a few large objects
    a process, of several arrays (docs/pods.md has the numbers).
    """
    few = isinstance(folder, buckets.Path)
    # Devices that hold the same array write a part of it each, if that is worth a message.
    kinds = ocp.type_handlers
    writer = kinds.ArrayHandler(min_slice_bytes_for_replica_parallel=_WORTH_BYTES)
    scalars = ((kind, kinds.ScalarHandler()) for kind in (int, float, np.number))
    registry = kinds.create_type_handler_registry(
        (jax.Array, writer), (np.ndarray, kinds.NumpyHandler()), *scalars
    )

    def plain() -> ocp.PyTreeCheckpointHandler:
        return ocp.PyTreeCheckpointHandler(
            use_compression=False, use_ocdbt=few, type_handler_registry=registry
        )

    return ocp.CompositeCheckpointHandler(params=plain(), rest=plain(), average=plain())


def check_space(folder: buckets.Anywhere, tree: Any) -> None:
    """Raises OSError before anything is written where the disk cannot take the arrays."""
    needed = sum(x.nbytes for x in jax.tree.leaves(tree))
    if isinstance(folder, buckets.Path):
        return
    if shutil.disk_usage(folder).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def parts(items: Mapping[str, Any]) -> Any:
    """The abstract trees as they are to be read: what several devices hold is split over them."""

    def part(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        named = isinstance(x.sharding, jax.sharding.NamedSharding)
        if not named or x.sharding.memory_kind == 'pinned_host':
            return x
        return x.update(sharding=replicas.split(x.sharding, x))

    return jax.tree.map(part, dict(items))


def whole(found: Any, items: Mapping[str, Any]) -> Any:
    """What was read as parts() says, in the shardings that are wanted. The parts are given up."""
    read, tree = jax.tree.flatten(found)
    wanted = jax.tree.leaves(items)
    for group in _groups(read, wanted):
        parts_ = [read[i] for i in group]
        spread = jax.block_until_ready(_spread([wanted[i] for i in group])(parts_))
        for i, part, x in zip(group, parts_, spread, strict=True):
            part.delete()
            read[i] = x
    return tree.unflatten(read)


def compile_ahead(items: Mapping[str, Any]) -> None:
    """Compiles what whole() will run, beside all else: a run that is started again finds it."""
    read, wanted = jax.tree.leaves(parts(items)), jax.tree.leaves(items)
    groups = _groups(read, wanted)

    def compile_() -> None:
        try:
            for group in groups:
                _spread([wanted[i] for i in group]).lower([read[i] for i in group]).compile()
        except Exception as e:  # whoever needs it will say what is wrong with it
            _log.debug('reading checkpoints was not compiled ahead: %s', e)

    if groups:
        pool = concurrent.futures.ThreadPoolExecutor(1, 'compiler')
        pool.submit(compile_)
        pool.shutdown(wait=False)


def _groups(read: list[Any], wanted: list[Any]) -> list[list[int]]:
    """Numbers of the arrays whose shardings differ, so many together as there is room for."""
    groups: list[list[int]] = []
    room = 0
    for i, (a, b) in enumerate(zip(read, wanted, strict=True)):
        if a.sharding.is_equivalent_to(b.sharding, len(b.shape)):
            continue
        size = math.prod(b.sharding.shard_shape(b.shape)) * b.dtype.itemsize
        if not groups or size > room:
            groups.append([])
            room = _SPREAD_BYTES
        groups[-1].append(i)
        room -= size
    return groups


def _spread(wanted: list[Any]) -> Any:
    def spread(parts: list[jax.Array]) -> list[jax.Array]:
        return parts

    return jax.jit(spread, out_shardings=[x.sharding for x in wanted])


def restore(state: buckets.Anywhere, items: Mapping[str, Any]) -> Any:
    """This host's share of the items in a folder of arrays; no other host is waited for.

    Args: items: abstract trees with shardings, by item.
    """
    wanted = ocp.args.Composite(
        **{
            name: ocp.args.PyTreeRestore(
                tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree)
            )
            for name, tree in items.items()
        }
    )
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f'host{me}'
    )
    with ocp.Checkpointer(handler(state), multiprocessing_options=alone) as reader:
        return reader.restore(state, args=wanted)
