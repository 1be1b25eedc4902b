# SPDX-License-Identifier: Apache-2.0
"""Converting 500 MB of safetensors, beside copying the file.

  python benchmarks/convert_speed.py

GPT-2 small's shape in float32 with random weights, without a tokenizer. In turns, in one process:
a copy of the file, a Hugging Face folder into a workdir, and that into a Hugging Face folder.
Start-up and imports are left out; the files are in the page cache for all three.
"""

import logging
import pathlib
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable

import jax
from flax import linen as nn

from gptjax import convert
from gptjax.configs import base, cli, sizes
from gptjax.models import heads, pretrained

ROUNDS = 7


def timed(work: Callable[[], None], target: pathlib.Path) -> float:
    shutil.rmtree(target, ignore_errors=True)
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def converting(source: pathlib.Path, target: pathlib.Path, to: str) -> Callable[[], None]:
    argv = ['convert', f'--config={base.__file__}', f'--config.init_from={source}']
    args = cli.parse([*argv, f'--workdir={target}', f'--to={to}'], convert.define)
    return lambda: convert.main(args)


def main() -> None:
    logging.disable()
    model = heads.build(sizes.model('gpt2-small'))
    params = nn.meta.unbox(jax.jit(model.init_params)(jax.random.key(0)))
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        source, copied = folder / 'source', folder / 'copy'
        pretrained.save(source, model, params, None)
        del params
        file = source / 'model.safetensors'
        size = file.stat().st_size

        def copy() -> None:
            copied.mkdir()
            shutil.copyfile(file, copied / 'copy')

        runs = {
            'copy': (copy, copied),
            'to workdir': (converting(source, folder / 'run', 'workdir'), folder / 'run'),
            'to huggingface': (
                converting(folder / 'run', folder / 'out', 'huggingface'),
                folder / 'out',
            ),
        }
        secs: dict[str, list[float]] = {run: [] for run in runs}
        for number in range(ROUNDS + 1):
            for run, (work, target) in runs.items():
                found = timed(work, target)
                if number:  # the first round fills the caches
                    secs[run].append(found)
    base_secs = statistics.median(secs['copy'])
    for run, found in secs.items():
        median = statistics.median(found)
        print(
            f'{run:15} {size / median / 1e6:7,.0f} MB/s, {base_secs / median:.2f} of copying '
            f'({min(found):.2f} to {max(found):.2f} s)'
        )


if __name__ == '__main__':
    main()
