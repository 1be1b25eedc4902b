# SPDX-License-Identifier: Apache-2.0
"""Files of a checkpoint whose arrays are spread over many devices, with OCDBT and without.

  python benchmarks/checkpoint_files.py [--devices=512]

Prints, for a disk and for a bucket (emulated): files, the largest, requests, seconds to save and to
restore. One process holds all devices: of several, each writes OCDBT files of its own.
"""

import argparse
import pathlib
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import orbax.checkpoint as ocp

from gptjax.runtime import mesh as mesh_lib
from gptjax.storage import buckets
from tests import emulator


def state() -> dict[str, jax.Array]:
    """Twenty arrays of 4 MiB, spread over all devices."""
    mesh = mesh_lib.Mesh(mesh_lib.Config(1, -1, 1, 1, 1, 'data'))
    spread = jax.sharding.NamedSharding(mesh.mesh, jax.sharding.PartitionSpec('fsdp'))
    made = jax.jit(
        lambda i: jax.random.normal(jax.random.key(i), (1024, 1024)), out_shardings=spread
    )
    return {f'array_{i}': made(i) for i in range(20)}


def measure(folder: buckets.Anywhere, ocdbt: bool, storage: emulator.Storage) -> None:
    arrays, begun = state(), len(storage.requests)
    jax.block_until_ready(arrays)
    kind = ocp.PyTreeCheckpointHandler(use_compression=False, use_ocdbt=ocdbt)
    with ocp.Checkpointer(kind) as saver:
        at = time.monotonic()
        saver.save(folder / 'state', args=ocp.args.PyTreeSave(arrays))
        saved, written = time.monotonic() - at, len(storage.requests) - begun
        wanted = ocp.checkpoint_utils.construct_restore_args(arrays)
        at, begun = time.monotonic(), len(storage.requests)
        saver.restore(folder / 'state', args=ocp.args.PyTreeRestore(arrays, restore_args=wanted))
        restored, read = time.monotonic() - at, len(storage.requests) - begun
    if isinstance(folder, buckets.Path):
        sizes = [found.size for found in folder.objects().values()]
    else:
        sizes = [path.stat().st_size for path in folder.rglob('*') if path.is_file()]
    where = 'bucket' if isinstance(folder, buckets.Path) else 'disk'
    print(
        f'{where}, {"OCDBT" if ocdbt else "a file a shard"}: {len(sizes)} files, the largest '
        f'{max(sizes) / 2**20:.2f} MiB; save {saved:.1f} s, {written} requests; restore '
        f'{restored:.1f} s, {read} requests',
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--devices', type=int, default=512)
    jax.config.update('jax_num_cpu_devices', parser.parse_args().devices)
    storage = emulator.Storage()
    emulator.connect(storage.url)
    with tempfile.TemporaryDirectory() as folder:
        for ocdbt in (True, False):
            measure(pathlib.Path(folder) / str(ocdbt), ocdbt, storage)
            measure(buckets.of(f'gs://{storage.bucket()}/{ocdbt}'), ocdbt, storage)
    storage.close()


if __name__ == '__main__':
    main()
