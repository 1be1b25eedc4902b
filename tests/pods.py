# SPDX-License-Identifier: Apache-2.0
"""Runs in buckets, for tests: in this process, or in some of their own."""

import concurrent.futures
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np

from gptjax import prepare_corpus, prepare_tokens, train_tokenizer
from gptjax import train as train_lib
from gptjax.models import pretrained
from gptjax.runtime import checkpoint, metrics, results
from gptjax.storage import buckets, scratch
from tests import emulator

LENGTH = ('--config.train.total_tokens=4096', '--config.checkpoint.every_steps=3')
LENGTH += ('--config.train.log_every_steps=1', '--config.checkpoint.keep=3')


def prepared(workdir: object, config: str, train: bool = False) -> buckets.Anywhere:
    """A workdir, here or in a bucket, with tokens, or with a whole run."""
    for program in (prepare_corpus, train_tokenizer, prepare_tokens):
        emulator.run(program.main, f'--config={config}', f'--workdir={workdir}')
    if train:
        trained(workdir, config)
    return buckets.of(workdir) if isinstance(workdir, str) else workdir


def trained(folder: object, config: str, *flags: str) -> None:
    """Trains to the end, in this process."""
    emulator.run(train_lib.main, f'--config={config}', f'--workdir={folder}', *LENGTH, *flags)


def outcome(place: pathlib.Path | buckets.Path, since: int = 0) -> tuple:
    """The weights, the scores and the losses of a run, of steps behind one, and its last step."""
    with emulator.process():
        workdir = scratch.small(scratch.here(str(place)))
        found = results.read(workdir)
        scores = {name: value for name, value in found.items() if name.startswith('eval/')}
        read = [row for row in metrics.read(workdir) if row['step'] > since]
        rows = {row['step']: row['train/loss'] for row in read}
        loaded = pretrained.load(str(place))
        arrays = [np.asarray(x).tobytes() for x in jax.tree.leaves(loaded.params)]
        return arrays, scores, rows, checkpoint.latest(workdir, put_aside=False)[1]['step']


def command(folder: object, config: str, *flags: str) -> list[str]:
    """Of the same training in another process."""
    said = ['-m', 'gptjax.train', f'--config={config}', f'--workdir={folder}', *LENGTH, *flags]
    return [sys.executable, *said]


def environment(home: pathlib.Path, **more: str) -> dict[str, str]:
    """Of a process with a home of its own."""
    (home / 'gptjax').mkdir(parents=True, exist_ok=True)
    return os.environ | {'XDG_CACHE_HOME': str(home)} | more


def free_port() -> int:
    with socket.socket() as free:
        free.bind(('localhost', 0))
        return free.getsockname()[1]


def communicated(running: list[subprocess.Popen]) -> list[tuple[str, str]]:
    """What all processes printed and said, read side by side: a full pipe stops none of them."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        return list(pool.map(lambda process: process.communicate(), running))
