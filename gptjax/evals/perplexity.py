# SPDX-License-Identifier: Apache-2.0
"""The held-out measure, the same for every model ever; and others beside it, by name.

Every token of the held-out text is scored exactly once, in windows of n_ctx tokens. End-of-text is
context: it is read, but counts neither in nats nor in bytes. Bytes are those of the original UTF-8,
so that bits per byte compare across tokenizers; words are separated by white space.

A further measure is a module of gptjax.evals.held_out: NAMES of what it tells, and make(apply,
options) -> ((parameters, batch) -> sums with 'weight' among them). Each sum is divided by the
weight, unless the module has values(sums) -> {name: value}.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from gptjax.configs import errors, lookup
from gptjax.data import tokens
from gptjax.runtime import inventory
from gptjax.runtime import mesh as mesh_lib
from gptjax.training.objectives import next_token

_MEASURES = 'gptjax.evals.held_out'
_NAMES = ('nats_per_token', 'bits_per_byte', 'token_perplexity', 'word_perplexity')
_LITTLE, _TOO_LITTLE = 1000, 100  # tokens scored, below which that is said
_log = logging.getLogger(__name__)
SCORE = ''  # the sums of the score itself, beside those of measures by name
# (parameters, batch) -> measure -> its sums
Measure = Callable[[Any, Mapping[str, jax.Array]], dict[str, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class Config:
    """The evaluate section of configs/base.py."""

    n_ctx: int
    stride: int
    batch_windows: int
    max_tokens: int
    measures: tuple[str, ...]

    def __post_init__(self) -> None:
        errors.require_between(self, 1, 2**20, 'batch_windows')
        errors.require_between(self, 0, 2**60, 'n_ctx', 'stride', 'max_tokens')
        names = [*_NAMES, *_further(self.measures)]
        twice = sorted({name for name in names if names.count(name) > 1})
        errors.require(
            not twice, f'evaluate.measures = {self.measures}: {", ".join(twice)} is measured twice'
        )


@dataclasses.dataclass(frozen=True)
class Score:
    """Sums over the scored documents, and what they come to."""

    nats: float
    tokens: int
    text_bytes: int
    words: int
    documents: int
    protocol: str
    more: Mapping[str, float | None]  # of further measures; None is missing

    def metrics(self) -> dict[str, float | None]:
        """nats per token, bits per byte, token and word perplexity, and further measures."""
        return {
            'nats_per_token': self.nats / self.tokens,
            'bits_per_byte': self.nats / math.log(2) / self.text_bytes,
            'token_perplexity': math.exp(min(self.nats / self.tokens, 700.0)),
            'word_perplexity': math.exp(min(self.nats / max(self.words, 1), 700.0)),
            **self.more,
        }

    def report(self) -> dict[str, Any]:
        """What is scored, how, and the metrics: a document for people and programs."""
        counts = {'documents': self.documents, 'tokens': self.tokens}
        counts |= {'bytes': self.text_bytes, 'words': self.words}
        return {'protocol': self.protocol, **counts, **self.metrics()}

    def named(self, label: str) -> dict[str, float | None]:
        """The metrics under the names of a log, as eval/<label>/bits_per_byte."""
        return {f'eval/{label}/{name}': value for name, value in self.metrics().items()}


def names(label: str, config: Config) -> list[str]:
    """The names that Score.named(label) will have."""
    return [f'eval/{label}/{name}' for name in (*_NAMES, *_further(config.measures))]


def measure(apply: Callable[..., Any], config: Config, objective: str = 'next_token') -> Measure:
    """What is measured of a batch: nats, and config.measures.

    Args:
      apply: a model's.
      objective: train.objective of the weights: one that scores held-out text in its own way has a
        function held_out(apply, options), as a module of gptjax.evals.held_out has make().
    """
    found, options = lookup.plug_in('gptjax.training.objectives', objective)
    held_out = getattr(found, 'held_out', next_token.held_out)
    each = {SCORE: held_out(apply, options)}
    for written in config.measures:
        module, options = lookup.plug_in(_MEASURES, written)
        each[written] = module.make(apply, options)
    return lambda params, batch: {name: one(params, batch) for name, one in each.items()}


def check(token_set: tokens.TokenSet, n_ctx: int, config: Config) -> None:
    """Warns of little held-out text.

    Raises:
      InputError: there is none. UsageError: the stride is beyond n_ctx, or a batch beyond memory.
    """
    _require(token_set, n_ctx, config)
    inventory.check_room(
        config.batch_windows * n_ctx * 12,  # inputs, targets, weights
        f'scoring {config.batch_windows} windows of {n_ctx} tokens',
        'Lower --config.evaluate.batch_windows or n_ctx',
    )
    number = _n_scored(token_set, config)
    if number < _LITTLE:
        _log.warning(
            '%s holds out %d tokens: scores of so little text tell little. Prepare with a larger '
            '--config.tokens.valid_fraction, or more text',
            token_set.folder,
            number,
        )


def notes(held_out: Mapping[str, tokens.TokenSet], config: Config) -> dict[str, str]:
    """What must stand beside the scores of sets that hold too little, by label."""
    sizes = {label: _n_scored(token_set, config) for label, token_set in held_out.items()}
    return {
        label: f'only {size} tokens, which is too little to measure a model by'
        for label, size in sizes.items()
        if size < _TOO_LITTLE
    }


def n_tokens(held_out: Mapping[str, tokens.TokenSet], config: Config) -> int:
    """The tokens of several sets that score() reads."""
    found = (_documents(token_set, config.max_tokens) for token_set in held_out.values())
    return sum(int(table[:, 0].sum()) for table in found)


def _n_scored(token_set: tokens.TokenSet, config: Config) -> int:
    """The tokens that count: all but end-of-text, one before each document."""
    table = _documents(token_set, config.max_tokens)
    return int(table[:, 0].sum()) - len(table)


def _require(token_set: tokens.TokenSet, n_ctx: int, config: Config) -> None:
    if len(token_set) < 2:
        raise errors.InputError(
            f'{token_set.folder} holds no held-out text; prepare it again with a larger '
            '--config.tokens.valid_fraction'
        )
    errors.require(
        config.stride <= n_ctx,
        f'evaluate.stride = {config.stride} would leave tokens unscored; use at most {n_ctx}',
    )


def score(
    eval_step: Measure,
    params: Any,
    token_set: tokens.TokenSet,
    n_ctx: int,
    config: Config,
    mesh: mesh_lib.Mesh,
    progress: Callable[[int], None] = lambda windows: None,
) -> Score:
    """Scores held-out text.

    Args:
      eval_step: measure(), jitted by training.step.make_eval_step.
      token_set: a held-out split.
      progress: is told the windows done; what it raises ends this.
    """
    _require(token_set, n_ctx, config)
    table = _documents(token_set, config.max_tokens)
    stop, text_bytes, words = (int(x) for x in table.sum(axis=0))
    sums: dict[str, dict[str, Any]] = {}
    left = n_windows(token_set, n_ctx, config)
    rows, columns = mesh.region(config.batch_windows, n_ctx)
    for batch in _batches(token_set, stop, n_ctx, config):
        local = {name: array[rows, columns] for name, array in batch.items()}
        for name, found in eval_step(params, mesh.put(local)).items():
            total = sums.setdefault(name, dict.fromkeys(found, 0.0))
            sums[name] = {key: total[key] + np.asarray(x, np.float64) for key, x in found.items()}
        progress(min(config.batch_windows, left))
        left -= config.batch_windows
    weight = float(sums[SCORE]['weight'])
    if not weight:
        raise errors.InputError(f'the held-out text of {token_set.folder} has no token to score')
    stride = config.stride or n_ctx
    protocol = (
        f'{len(table)} documents joined by end-of-text, windows of {n_ctx} tokens, '
        f'stride {stride}; end-of-text not scored; bytes of the original UTF-8'
    )
    protocol += ''.join(f'; {said}' for said in notes({SCORE: token_set}, config).values())
    more = {name: x for m in config.measures for name, x in _values(m, sums[m]).items()}
    counts = (round(weight), text_bytes, words, len(table))
    return Score(float(sums[SCORE]['nats']), *counts, protocol, more)


def _further(measures: tuple[str, ...]) -> list[str]:
    """The names of what further measures tell."""
    return [name for m in measures for name in lookup.plug_in(_MEASURES, m)[0].NAMES]


def _values(written: str, sums: dict[str, Any]) -> dict[str, float | None]:
    """What a further measure comes to; None, missing, where that is no number."""
    module = lookup.plug_in(_MEASURES, written)[0]
    if hasattr(module, 'values'):
        found = module.values(sums)
    else:
        found = {name: x / sums['weight'] for name, x in sums.items() if name != 'weight'}
    return {name: float(x) if np.isfinite(x) else None for name, x in found.items()}


def n_windows(token_set: tokens.TokenSet, n_ctx: int, config: Config) -> int:
    """How many windows score() goes through."""
    stop = int(_documents(token_set, config.max_tokens)[:, 0].sum())
    return len(_starts(stop, n_ctx, config.stride or n_ctx))


def _documents(token_set: tokens.TokenSet, max_tokens: int) -> np.ndarray:
    """The table of the first whole documents within max_tokens, at least one."""
    table = token_set.table()
    if max_tokens:
        within = int(np.searchsorted(np.cumsum(table[:, 0]), max_tokens, side='right'))
        table = table[: max(within, 1)]
    return table


def _starts(stop: int, n_ctx: int, stride: int) -> range:
    """First input of every window: the last one reaches the last target, stop - 1."""
    return range(0, max(stop - 1 - n_ctx, 0) + stride, stride)


def _batches(
    token_set: tokens.TokenSet, stop: int, n_ctx: int, config: Config
) -> Iterator[dict[str, np.ndarray]]:
    stride = config.stride or n_ctx
    starts = _starts(stop, n_ctx, stride)
    for first in range(0, len(starts), config.batch_windows):
        read = np.full((config.batch_windows, n_ctx + 1), token_set.end_of_text, np.int32)
        scored = np.zeros((config.batch_windows, n_ctx), np.float32)
        for row, start in enumerate(starts[first : first + config.batch_windows]):
            found = token_set.read(start, min(n_ctx + 1, stop - start))
            read[row, : len(found)] = found
            new = n_ctx - stride if start else 0  # targets before it were scored already
            scored[row, new : len(found) - 1] = found[new + 1 :] != token_set.end_of_text
        yield {'tokens': read[:, :-1], 'targets': read[:, 1:], 'weights': scored}
