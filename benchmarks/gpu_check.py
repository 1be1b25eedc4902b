# SPDX-License-Identifier: Apache-2.0
"""What a GPU does: whether training is bit-equal with train.deterministic, and what that costs.

  python benchmarks/gpu_check.py --size=gpt2-small --windows=8 --steps=20

Prints the card, what computes attention and loss, whether two runs of the same seed end in the same
bits, with the setting and without, and tokens/s and MFU of both: medians of the steps after the
first two. On a CPU it runs as well, and says what a CPU does.
"""

import argparse
import hashlib
import statistics
import time

import jax
import numpy as np

from gptjax.configs import base, sizes
from gptjax.models import heads
from gptjax.runtime import mesh as mesh_lib
from gptjax.scaling import devices
from gptjax.training import losses, optim
from gptjax.training import plan as plan_lib
from gptjax.training import step as step_lib
from gptjax.training.objectives import next_token


def trained(model: heads.LanguageModel, windows: int, steps: int, options: step_lib.Options):
    """(hash of the parameters, median seconds of a step), from the same seed each time."""
    n_ctx, n_vocab = model.config.n_ctx, model.config.n_vocab
    config = base.get_config()
    config.batch.batch_tokens = windows * n_ctx
    plan = plan_lib.of_tokens(plan_lib.Config(**config.batch), n_ctx, 10**9)
    optimizer = optim.make(optim.configure(config.optim), plan, heads.describe(model))
    loss = losses.with_sown(next_token.make, model.apply, None)
    mesh, drawn, secs = mesh_lib.one_device(), np.random.default_rng(0), []
    with mesh.scope():
        target = step_lib.abstract(model.init_params, optimizer, mesh.shardings, options)
        train_step = step_lib.make_train_step(loss, optimizer, 0, options, target)
        state = step_lib.init(model.init_params, optimizer, 0, target, options)
        for _ in range(steps):
            ids = drawn.integers(0, n_vocab, (windows, n_ctx + 1)).astype(np.int32)
            weights = np.ones((windows, n_ctx), np.float32)
            batch = {'tokens': ids[:, :-1], 'targets': ids[:, 1:], 'weights': weights}
            begun = time.perf_counter()
            state, metrics = train_step(state, mesh.put(batch))
            float(metrics['train/loss'])
            secs.append(time.perf_counter() - begun)
        digest = hashlib.sha256()
        for x in jax.tree.leaves(state.params):
            digest.update(np.asarray(x).tobytes())
    return digest.hexdigest()[:16], statistics.median(secs[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--size', default='gpt2-small')
    parser.add_argument('--windows', type=int, default=8)
    parser.add_argument('--steps', type=int, default=20)
    parser.add_argument('--dtype', default='bfloat16')
    args = parser.parse_args()
    if args.steps < 3:
        parser.error('--steps must be 3 at least: the first two are left out')
    model = heads.build(sizes.model(args.size, compute_dtype=args.dtype, remat='none'))
    device = jax.devices()[0]
    with mesh_lib.one_device().scope():
        print(f'{device.device_kind}: {model.config.kernels(args.windows)}')
    known = devices.of(device.device_kind)
    for deterministic in (True, False):
        options = step_lib.Options(deterministic=deterministic)
        (one, secs), (other, again) = (
            trained(model, args.windows, args.steps, options) for _ in range(2)
        )
        speed = args.windows * model.config.n_ctx / min(secs, again)
        n_params = sum(
            x.size for x in jax.tree.leaves(jax.eval_shape(model.init_params, jax.random.key(0)))
        )
        mfu = model.config.flops_per_token(n_params) * speed / known.peak_flops if known else 0.0
        print(
            f'deterministic={deterministic}: {one} {other}, '
            f'{"bit-equal" if one == other else "DIFFERENT"}; {speed:,.0f} tokens/s, MFU {mfu:.1%}'
        )


if __name__ == '__main__':
    main()
