# SPDX-License-Identifier: Apache-2.0
"""python -m tests.at_moment MOMENT HOST program flags: a program that gets a SIGTERM at a moment.

Only the process of that number (-1: all) gets it; what happens meanwhile is printed at the end.
"""

import collections
import itertools
import json
import os
import runpy
import signal
import sys
import threading
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from gptjax.runtime import checkpoint, hosts
from gptjax.training import loop, run
from gptjax.training import step as step_lib

STEP, STEPS = 5, 40


def kill() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def soon() -> None:
    """Well within what takes longer."""
    threading.Timer(0.1, kill).start()


def before(owner: object, name: str, do: Callable, when: Callable = lambda *args: True) -> None:
    """Does something before a call of a function; once."""
    function, done = getattr(owner, name), []

    def wrapped(*args, **kwargs):
        if not done and when(*args):
            done.append(True)
            do()
        return function(*args, **kwargs)

    setattr(owner, name, wrapped)


def at_step(this: object, step: int, *rest: object) -> bool:
    return step == STEP


def compiling() -> None:
    """The first call of the step compiles it."""
    make = step_lib.make_train_step

    def making(*args, **kwargs):
        step, begun = make(*args, **kwargs), []

        def first(*args):
            if not begun:
                begun.append(True)
                soon()
            return step(*args)

        return first

    step_lib.make_train_step = making


def overlapping() -> None:
    """What a step finds is there only once the next one is under way."""
    make = step_lib.make_train_step
    under_way = collections.defaultdict(threading.Event)

    def wait(step):
        found = step == STEPS or under_way[int(step)].wait(60)
        return np.float32(0 if found else 1)

    gate = jax.jit(lambda step: jax.pure_callback(wait, jax.ShapeDtypeStruct((), 'float32'), step))

    def making(*args, **kwargs):
        step, number = make(*args, **kwargs), itertools.count()

        def waiting(state, batch):
            under_way[next(number)].set()
            state, metrics = step(state, batch)
            return state, metrics | {'train/late': gate(state.step)}

        return waiting

    step_lib.make_train_step = making


MOMENTS = {
    'beginning': lambda: before(run.Run, 'begin', kill),
    'compiling': compiling,
    'between': lambda: before(run.Run, 'after', kill, at_step),
    'fetching': lambda: before(loop, '_next', kill, lambda batches, step: step == STEP),
    'saving': lambda: before(checkpoint.Checkpoints, 'save', soon),
    'evaluating': lambda: before(run.Run, '_evaluate', soon, at_step),
    'last': lambda: before(run.Run, 'finish', kill),
    'never': lambda: None,
    'overlapping': overlapping,
}


class Heard:
    """A board that counts what the main thread asks of it."""

    asked = 0

    def __init__(self, board: hosts.Board) -> None:
        self._board = board

    def __getattr__(self, name: str) -> object:
        if threading.current_thread() is threading.main_thread():
            Heard.asked += 1
        return getattr(self._board, name)


def count_talk() -> list[tuple[int, int]]:
    """(step, how often hosts talked since the one before), as it goes on."""
    found, board, after = [], hosts.board, run.Run.after

    def stepping(this, step, *args):
        after(this, step, *args)
        found.append((step, Heard.asked))
        Heard.asked = 0

    def counted(function):
        def talking(*args, **kwargs):
            Heard.asked += 1
            return function(*args, **kwargs)

        return talking

    for name in ('process_allgather', 'broadcast_one_to_all', 'sync_global_devices'):
        setattr(multihost_utils, name, counted(getattr(multihost_utils, name)))
    hosts.board, run.Run.after = lambda: Heard(board()), stepping
    return found


if __name__ == '__main__':
    moment, host, program = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    mine = [flag for flag in sys.argv if flag.startswith('--process=')]
    if host < 0 or mine in ([], [f'--process={host}']):
        MOMENTS[moment]()
    found = count_talk() if moment == 'never' else []
    sys.argv = [f'gptjax/{program}.py', *sys.argv[4:]]
    try:
        runpy.run_module(f'gptjax.{program}', run_name='__main__', alter_sys=True)
    finally:
        os.write(2, f'talk {json.dumps(found)}\n'.encode())  # hosts but the first print nothing
