# SPDX-License-Identifier: Apache-2.0
"""The plain loop over batches. Programs that do more between two steps have their own."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from gptjax.configs import errors
from gptjax.training import recipe as recipe_lib
from gptjax.training import run as run_lib
from gptjax.training import step as step_lib

Batch = Mapping[str, jax.Array]  # already on the mesh
TrainStep = Callable[[step_lib.State, Batch], tuple[step_lib.State, dict[str, jax.Array]]]


def train(
    run: run_lib.Run,
    recipe: recipe_lib.Recipe,
    fresh: Callable[[], tuple[step_lib.State, str]],
    batches: Callable[[int], Iterator[Batch]],
    train_step: TrainStep,
) -> None:
    """Trains from where the run stands to its end and its results; again after every rollback.

    Args:
      recipe, fresh: as Run.begin() takes them.
      batches: step -> the batches from it on; asked again after a rollback.

    Raises:
      As Run.begin(), Run.go_back() and fit().
    """
    while True:
        try:
            state = run.begin(recipe, fresh)
            if state is not None:
                run.finish(fit(run, state, batches(int(state.step)), train_step))
            return
        except run_lib.Spike as spike:
            run.go_back(spike)


def fit(
    run: run_lib.Run, state: step_lib.State, batches: Iterator[Batch], train_step: TrainStep
) -> step_lib.State:
    """Trains from the state's step to the end of the run's plan.

    Args:
      run: that has begun with this state.
      batches: of the steps from the state's on; prefetched, if they take time.

    Raises:
      InputError: the batches end too early, or their source died. As Run.after().
    """
    for step in range(int(state.step), run.total_steps):
        with run.fetching(step):
            batch = _next(batches, step)
        state, metrics = train_step(state, batch)
        run.after(step + 1, state, metrics)
    return state


def _next(batches: Iterator[Any], step: int) -> Any:
    try:
        return next(batches)
    except errors.InputError:
        raise
    except Exception as e:
        what = 'has no more batches' if isinstance(e, StopIteration) else f'died: {e}'
        raise errors.InputError(
            f'the data pipeline {what} (step {step}); mend that, and run the same command again'
        ) from e
