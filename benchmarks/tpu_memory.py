# SPDX-License-Identifier: Apache-2.0
"""What a train step takes of a TPU, compiled here without one: memory, collectives.

  make .venv/tpu   # libtpu beside the environment, not inside
  PYTHONPATH=.venv/tpu python benchmarks/tpu_memory.py --size=gpt3-1.3b --windows=4
  PYTHONPATH=.venv/tpu python benchmarks/tpu_memory.py --size=gpt3-175b --topology=v5p:8x8x8 \
      --windows=2

Prints JSON: bytes on one device at the peak, of arguments, of temporaries; parameters; the shapes
of every collective that the compiled program holds, and how many overlap with other work; what it
was compiled for. LIBTPU_INIT_ARGS=--NAME=VALUE tries an option of the compiler.
"""

import argparse
import ast
import collections
import json
import math
import os
import re
import time

os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
os.environ['JAX_PLATFORMS'] = 'cpu'

import hlo  # beside this file
import jax
from jax.experimental import topologies

from gptjax.configs import base, sizes
from gptjax.models import heads
from gptjax.runtime import mesh as mesh_lib
from gptjax.training import optim
from gptjax.training import plan as plan_lib
from gptjax.training import step as step_lib
from gptjax.training.objectives import next_token


def compile_step(
    section,
    topology: str,
    mesh_sizes: tuple[int, ...],
    windows: int,
    options: step_lib.Options,
    slices: int = 1,
    across: str = 'data',
) -> dict:
    """Compiles the train step of a model section; `windows` a device."""
    how = {'chip_config_name': 'megacore'} if topology[:3] in ('v4:', 'v5p') else {}
    how |= {'num_slices': slices} if slices > 1 else {}
    devices = list(
        topologies.get_topology_desc(platform='tpu', topology_name=topology, **how).devices
    )
    mesh = mesh_lib.Mesh(mesh_lib.Config(*mesh_sizes, slices=slices, across=across), devices)
    model = heads.build(section)
    n_ctx, config = section.n_ctx, base.get_config()
    batch = windows * len(devices) // (mesh.mesh.shape['tensor'] * mesh.mesh.shape['context'])
    config.batch.batch_tokens = batch * n_ctx
    plan = plan_lib.of_tokens(plan_lib.Config(**config.batch), n_ctx, 10**12)
    optimizer = optim.make(optim.configure(config.optim), plan, heads.describe(model))
    began = time.monotonic()
    with mesh.scope():
        target = step_lib.abstract(model.init_params, optimizer, mesh.shardings, options)
        loss = next_token.make(model.apply, None)
        train_step = step_lib.make_train_step(loss, optimizer, 0, options, target)
        compiled = train_step.lower(target, mesh.abstract_batch(batch, n_ctx)).compile()
    memory = compiled.memory_analysis()
    n_params = sum(x.size for x in jax.tree.leaves(target.params))
    found = {
        'model': section.to_dict(),
        'topology': topology,
        'slices': slices,
        'mesh': dict(mesh.mesh.shape),
        'devices': len(devices),
        'windows_a_device': windows,
        'device_windows': options.device_windows,
        'parameters': n_params,
        'peak_gib': memory.peak_memory_in_bytes / 2**30,
        'argument_gib': memory.argument_size_in_bytes / 2**30,
        'temporary_gib': memory.temp_size_in_bytes / 2**30,
        'host_gib': memory.host_argument_size_in_bytes / 2**30,
        'compile_secs': time.monotonic() - began,
    }
    try:
        text = compiled.as_text()
    except Exception as e:  # it fails on some meshes
        return found | {'collectives': None, 'why_not': str(e)[:200]}
    counts = collections.Counter(f'{op} {shape}' for shape, op in hlo.COLLECTIVE.findall(text))
    kernels = sorted(set(re.findall(r'splash_[a-z_]+', text)))
    return found | {
        'collectives': dict(counts),
        'kernels': kernels,
        **hlo.overlap(text),
        'between_slices': hlo.between_slices(text),
        'over_replicas': hlo.over_replicas(text, mesh.mesh.devices.shape),
        'lines': len(text.splitlines()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--size', default='gpt3-1.3b')
    parser.add_argument('--topology', default='v5e:4x4')
    parser.add_argument('--mesh', default='', help='data,fsdp,tensor,context; all fsdp without')
    parser.add_argument('--slices', type=int, default=1)
    parser.add_argument('--across', default='data', help='the axis that slices share')
    parser.add_argument('--windows', type=int, default=4, help='of every data x fsdp device')
    parser.add_argument('--device_windows', type=int, default=0, help='of a microbatch')
    parser.add_argument('--reduce_dtype', default='float32')
    parser.add_argument('--shard_moments', action='store_true', help='over data, too')
    parser.add_argument('--offload', action='store_true', help="Adam's moments to the host")
    parser.add_argument('--set', action='append', default=[], help='a model field: remat=blocks')
    args = parser.parse_args()
    section = sizes.model(args.size, compute_dtype='bfloat16', remat='full')
    for pair in args.set:
        name, _, value = pair.partition('=')
        try:
            section[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            section[name] = value
    n_devices = math.prod(int(n) for n in args.topology.split(':')[1].split('x'))
    if args.mesh:
        mesh = tuple(map(int, args.mesh.split(',')))
    elif args.across == 'fsdp':
        mesh = (1, n_devices * args.slices, 1, 1)
    else:
        mesh = (args.slices, n_devices, 1, 1)
    options = step_lib.Options(
        device_windows=args.device_windows,
        reduce_dtype=args.reduce_dtype,
        shard_moments=args.shard_moments,
        offload=args.offload,
    )
    how = (mesh, args.windows, options, args.slices, args.across)
    print(json.dumps(compile_step(section, args.topology, *how)))


if __name__ == '__main__':
    main()
