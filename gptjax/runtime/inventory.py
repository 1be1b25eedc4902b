# SPDX-License-Identifier: Apache-2.0
"""What lies on the devices: every parameter with its sharding, and how much memory it takes."""

import logging
import math
import os
from collections.abc import Collection
from typing import Any

import jax

from gptjax.configs import errors

_log = logging.getLogger(__name__)


def table(params: Any, frozen: Collection[str] = ()) -> tuple[str, int, int]:
    """Name, shape, dtype, sharding and bytes on a device of every parameter.

    Args:
      params: arrays, or abstract ones, with shardings.
      frozen: paths of those that are not trained.

    Returns:
      the table as text, the number of parameters, and their bytes on one device.
    """
    rows = [('parameter', 'shape', 'dtype', 'sharding', 'bytes a device', '')]
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        name = '/'.join(str(key.key) for key in path)
        spec = getattr(x.sharding, 'spec', None) or ()
        axes = ', '.join(
            '-' if a is None else '+'.join([a] if isinstance(a, str) else a) for a in spec
        )
        note = 'frozen' if name in frozen else ''
        rows.append((name, str(x.shape), str(x.dtype), axes or '-', f'{_bytes(x):,}', note))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ['  '.join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    number = sum(x.size for x in jax.tree.leaves(params))
    total = per_device(params)
    lines += ['', f'{number:,} parameters, {total:,} bytes on a device']
    return '\n'.join(line.rstrip() for line in lines) + '\n', number, total


def describe(state: Any, params: Any, frozen: Collection[str], steps: int) -> str:
    """Logs what is about to be trained and what it takes of every device; the table of params."""
    text, number, n_bytes = table(params, frozen)
    _log.info(
        '%s parameters%s are trained for %s steps, on %d %s device(s)',
        f'{number:,}',
        f', {len(frozen)} arrays of them frozen,' if frozen else '',
        f'{steps:,}',
        jax.device_count(),
        jax.devices()[0].platform,
    )
    _log.info(
        'of a device: parameters %s, with the optimizer %s%s; every parameter in parameters.txt',
        size(n_bytes),
        size(per_device(state)),
        memory(),
    )
    return text


def per_device(tree: Any) -> int:
    """Bytes of a tree on one device, at its shardings; what waits on the host is not counted."""
    leaves = jax.tree.leaves(tree)
    return sum(_bytes(x) for x in leaves if x.sharding.memory_kind != 'pinned_host')


def memory() -> str:
    """The memory of this host's first device: in use and in all, where the platform says."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if 'bytes_limit' not in stats:
        return ''
    return f' ({size(stats.get("bytes_in_use", 0))} of {size(stats["bytes_limit"])} in use)'


def check_room(n_bytes: int, what: str, advice: str) -> None:
    """Raises UsageError where all devices, or the host in their place, have less memory in all."""
    limit = (jax.local_devices()[0].memory_stats() or {}).get('bytes_limit', 0)
    host = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    most = limit * jax.device_count() or host * jax.process_count()
    errors.require(
        n_bytes <= most,
        f'{what} would take {size(n_bytes)} of memory; there are {size(most)} in all. {advice}',
    )


def size(n_bytes: int) -> str:
    """Bytes as people read them."""
    return f'{n_bytes / 2**30:.2f} GiB' if n_bytes >= 2**28 else f'{n_bytes / 2**20:.1f} MiB'


def _bytes(x: Any) -> int:
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
