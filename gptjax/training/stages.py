# SPDX-License-Identifier: Apache-2.0
"""A train step whose programs for batches to come are compiled while the present ones run."""

import concurrent.futures
import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

_log = logging.getLogger(__name__)


class Stages:
    """(state, batch) -> (state, metrics), as the jitted step that it is made of."""

    def __init__(
        self,
        train_step: Callable,
        sizes: Sequence[int],
        scope: Callable[[], contextlib.AbstractContextManager],
    ) -> None:
        """
        Args:
          train_step: of step.make_train_step().
          sizes: rows of the batches, in the order in which they come.
          scope: puts the mesh in force, in another thread.
        """
        self._train_step, self._scope = train_step, scope
        self._next = dict(zip(sizes, sizes[1:], strict=False))
        self._programs: dict[int, Callable] = {}
        self._coming: dict[int, concurrent.futures.Future] = {}
        self._compiler = concurrent.futures.ThreadPoolExecutor(1, 'compiler')

    def __call__(self, state: Any, batch: Mapping[str, jax.Array]) -> tuple[Any, dict]:
        rows = len(jax.tree.leaves(batch)[0])
        if rows not in self._programs:
            self._programs[rows] = self._program(rows)
            coming = self._next.get(rows, rows)
            if coming not in (*self._programs, *self._coming):
                shapes = _shapes(state), _shapes(batch, coming)
                self._coming[coming] = self._compiler.submit(self._compile, *shapes)
        return self._programs[rows](state, batch)

    def _program(self, rows: int) -> Callable:
        if rows not in self._coming:
            return self._train_step
        try:
            return self._coming.pop(rows).result()
        except Exception as e:  # what is wrong with it the step itself will say
            _log.debug('batches of %d were not compiled ahead: %s', rows, e)
            return self._train_step

    def _compile(self, state: Any, batch: Any) -> Callable:
        with self._scope():
            return self._train_step.lower(state, batch).compile()


def _shapes(tree: Any, rows: int = 0) -> Any:
    """Of a tree of arrays, with another number of rows where one is given."""

    def shape(x: jax.Array) -> jax.ShapeDtypeStruct:
        wanted = (rows, *x.shape[1:]) if rows else x.shape
        return jax.ShapeDtypeStruct(wanted, x.dtype, sharding=x.sharding)

    return jax.tree.map(shape, tree)
