# SPDX-License-Identifier: Apache-2.0
"""Seconds from `python -m gptjax.train` to the end of its first step, cold and warm.

  python benchmarks/startup.py --workdir=runs/quickstart     (a prepared quickstart)

Cold is with an empty compilation cache, warm with the one that the cold run left. Each run starts
afresh over the same tokens and is stopped when it says that its first step is done.
"""

import argparse
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time


def one_run(prepared: pathlib.Path, cache: pathlib.Path) -> float:
    """Seconds until the program says that it trained a step."""
    with tempfile.TemporaryDirectory() as name:
        for part in ('tokens', 'tokenizer'):
            pathlib.Path(name, part).symlink_to((prepared / part).resolve())
        command = [sys.executable, '-m', 'gptjax.train', '--config=experiments/quickstart.py']
        began = time.perf_counter()
        process = subprocess.Popen(
            [*command, f'--workdir={name}'],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {'XDG_CACHE_HOME': str(cache)},
        )
        for line in process.stderr:
            if 'first step done' in line:
                seconds = time.perf_counter() - began
                process.kill()
                process.wait()
                return seconds
        raise SystemExit(f'training ended with {process.wait()} before its first step')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--workdir', type=pathlib.Path, default='runs/quickstart')
    parser.add_argument('--rounds', type=int, default=3)
    args = parser.parse_args()
    cold, warm = [], []
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as cache:
            cold.append(one_run(args.workdir, pathlib.Path(cache)))
            warm.append(one_run(args.workdir, pathlib.Path(cache)))
    for name, found in (('cold', cold), ('warm', warm)):
        each = ', '.join(f'{seconds:.1f}' for seconds in found)
        print(f'{name}: median {statistics.median(found):.1f} s of {each}')


if __name__ == '__main__':
    main()
