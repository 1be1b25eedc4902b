# SPDX-License-Identifier: Apache-2.0
"""The arrays of a checkpoint: how orbax writes them, and reads them on any mesh."""

import errno
import os
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from gptjax.storage import buckets

_WORTH_BYTES = 2**20


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
