# SPDX-License-Identifier: Apache-2.0
"""Training tokens/s, ours beside PyTorch's, on the same shapes in one run, alternating.

  python benchmarks/train_speed.py --setting=char --rounds=5
  python benchmarks/train_speed.py --setting=char --nanogpt=<checkout of karpathy/nanoGPT>

Every contender is a process of its own, set up as its users would have it (ours as the programs do:
runtime.program.keep_memory), and waits while another one is timed. One round times a few steps of
each in turn; the medians and the ratio of the best of each side are printed. The peer is nanoGPT's
model, eager and compiled, from a checkout given by path; without one only ours is timed.
"""

import argparse
import pathlib
import statistics
import subprocess
import sys
import time

import jax
import numpy as np

from gptjax.configs import base, sizes
from gptjax.models import heads
from gptjax.runtime import mesh as mesh_lib
from gptjax.runtime import program
from gptjax.training import optim
from gptjax.training import plan as plan_lib
from gptjax.training import step as step_lib
from gptjax.training.objectives import next_token

# layers, heads, width, context, vocabulary, batch
_SETTINGS = {
    'char': (6, 6, 384, 256, 65, 16),
    'gpt2-small': (12, 12, 768, 512, 50257, 2),
    'char_cpu': (4, 4, 128, 64, 257, 12),
    'quick': (4, 4, 192, 128, 2048, 8),
}


def ours(shape: tuple[int, ...], dtype: str, scan: bool):
    """A function that makes one training step and waits for it."""
    n_layers, n_heads, d_model, n_ctx, n_vocab, batch = shape
    section = sizes.model(
        'tiny',
        n_layers=n_layers,
        n_heads=n_heads,
        d_model=d_model,
        d_head=d_model // n_heads,
        d_ff=4 * d_model,
        n_ctx=n_ctx,
        n_vocab=n_vocab,
        compute_dtype=dtype,
        scan_layers=scan,
    )
    config = base.get_config()
    config.batch.batch_tokens = batch * n_ctx
    model = heads.build(section)
    mesh = mesh_lib.Mesh(mesh_lib.Config(**config.mesh), jax.devices()[:1])
    plan = plan_lib.of_tokens(plan_lib.Config(**config.batch), n_ctx, 10**9)
    optimizer = optim.make(optim.configure(config.optim), plan, heads.describe(model))
    loss = next_token.make(model.apply, None)
    train_step = step_lib.make_train_step(loss, optimizer, 0, step_lib.Options())
    with mesh.scope():
        target = step_lib.abstract(model.init_params, optimizer, mesh.shardings)
        state = step_lib.init(model.init_params, optimizer, 0, target)
    random = np.random.default_rng(0).integers(0, n_vocab, (batch, n_ctx + 1)).astype(np.int32)
    host = {
        'tokens': random[:, :-1],
        'targets': random[:, 1:],
        'weights': np.ones((batch, n_ctx), np.float32),
    }

    def step() -> None:
        nonlocal state
        with mesh.scope():
            state, metrics = train_step(state, mesh.put(host))
        float(metrics['train/loss'])

    return step


def torchs(shape: tuple[int, ...], dtype: str, compiled: bool, checkout: str):
    """The same with nanoGPT's model and torch's AdamW."""
    import torch

    sys.path.insert(0, checkout)
    import model as nanogpt

    n_layers, n_heads, d_model, n_ctx, n_vocab, batch = shape
    peer = nanogpt.GPT(
        nanogpt.GPTConfig(
            block_size=n_ctx,
            vocab_size=n_vocab,
            n_layer=n_layers,
            n_head=n_heads,
            n_embd=d_model,
            dropout=0.0,
            bias=True,
        )
    )
    optimizer = peer.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu')
    call = torch.compile(peer) if compiled else peer
    tokens = torch.randint(0, n_vocab, (batch, n_ctx + 1))

    def step() -> None:
        with torch.autocast('cpu', torch.bfloat16, enabled=dtype == 'bfloat16'):
            _, loss = call(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    return step


def work(args: argparse.Namespace) -> None:
    """A contender: makes as many steps as each line of its input says, and prints the seconds."""
    side, dtype, how = args.worker.split()
    if side == 'gptjax':
        program.keep_memory()
        step = ours(_SETTINGS[args.setting], dtype, how == 'scanned')
    else:
        step = torchs(_SETTINGS[args.setting], dtype, how == 'compiled', str(args.nanogpt))
    step()  # compiles
    for line in sys.stdin:
        began = time.perf_counter()
        for _ in range(int(line)):
            step()
        print(f'secs {time.perf_counter() - began}', flush=True)


class Contender:
    """A process that waits for its turn."""

    def __init__(self, name: str, argv: list[str]) -> None:
        command = [sys.executable, __file__, '--worker', name, *argv]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.secs(1)  # the first after compiling

    def secs(self, steps: int) -> float:
        self._process.stdin.write(f'{steps}\n')
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith('secs '):
                return float(line.split()[1])
        raise RuntimeError('a contender died')

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--setting', choices=_SETTINGS, default='char')
    parser.add_argument('--dtypes', nargs='+', default=['float32', 'bfloat16'])
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--steps', type=int, default=2)
    parser.add_argument('--nanogpt', type=pathlib.Path)
    parser.add_argument('--worker', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args)
        return
    argv = [f'--setting={args.setting}'] + ([f'--nanogpt={args.nanogpt}'] if args.nanogpt else [])
    n_tokens = _SETTINGS[args.setting][3] * _SETTINGS[args.setting][5]
    print(f'{args.setting}: median tokens/s of {args.rounds} rounds of {args.steps} steps')
    for dtype in args.dtypes:
        names = [f'gptjax {dtype} unrolled', f'gptjax {dtype} scanned']
        if args.nanogpt:
            names += [f'torch {dtype} eager', f'torch {dtype} compiled']
        contenders = {name: Contender(name, argv) for name in names}
        speeds: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(args.rounds):
            for name, contender in contenders.items():
                speeds[name].append(args.steps * n_tokens / contender.secs(args.steps))
        for name, found in speeds.items():
            middle = statistics.median(found)
            print(f'  {name:28} {middle:9,.0f}  ({min(found):,.0f}-{max(found):,.0f})', flush=True)
        for contender in contenders.values():
            contender.close()
        if args.nanogpt:
            best = [
                max(statistics.median(found) for name, found in speeds.items() if side in name)
                for side in ('gptjax', 'torch')
            ]
            print(f'  gptjax / torch, {dtype}, best of each: {best[0] / best[1]:.2f}', flush=True)


if __name__ == '__main__':
    main()
