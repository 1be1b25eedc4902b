# SPDX-License-Identifier: Apache-2.0
"""How likely given continuations are: log-likelihoods, in batches, of any model of the lineage.

Queries with the same context share it: a row of a batch holds contexts, each followed by all its
continuations side by side, and every token sees its own text alone. What all queries begin with
(few-shot examples) is read once for all rows. Models without attention (RNNs, n-grams) get one
text a row.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num

from gptjax.configs import errors
from gptjax.models import attention
from gptjax.runtime import mesh as mesh_lib
from gptjax.sampling import decode, packing

_SHORTEST_PREFIX = 32  # tokens that all queries must share to be read apart
_PLACES = 128  # whose logits are held at once


class Query(NamedTuple):
    """Token ids of a text that is read, at least one, and of what follows and is scored."""

    context: tuple[int, ...]
    target: tuple[int, ...]


class Score(NamedTuple):
    """The score of one query."""

    log_prob: float  # nats, summed over the target's tokens
    greedy: bool  # every token was the most likely one; among equals the lowest id is
    tokens: int  # of the target
    truncated: bool  # the beginning of the context did not fit


def windows(tokens: Sequence[int], n_ctx: int, stride: int = 0) -> list[Query]:
    """Queries that score every token but the first exactly once.

    Args:
      tokens: of a text, behind the token that conditions its first one.
      n_ctx: tokens read at a time.
      stride: tokens scored at a time but in the first window; 0 = n_ctx: windows do not overlap,
        and the first token of each is conditioned on the one before it alone.

    Raises:
      UsageError: a stride beyond n_ctx.
    """
    stride = stride or n_ctx
    errors.require(0 < stride <= n_ctx, f'a stride of {stride} is not from 1 to n_ctx = {n_ctx}')
    tokens = tuple(tokens)
    found, done = [], 1
    while done < len(tokens):
        end = min(done + (stride if found else n_ctx), len(tokens))
        found.append(Query(tokens[max(end - 1 - n_ctx, 0) : done], tokens[done:end]))
        done = end
    return found


@dataclasses.dataclass(frozen=True)
class Scorer:
    """A model as scoring uses it.

    batch_tokens: tokens read at a time, about. rows: batches have a multiple of so many rows; the
    mesh's data x fsdp. banned: tokens that do not count as more likely than the target.
    n_ctx: tokens of a context and its target, fewer than the model can read; 0 = as many.
    """

    decoder: decode.Decoder
    params: Any
    batch_tokens: int
    rows: int = 1
    banned: frozenset[int] = frozenset()
    n_ctx: int = 0

    def __post_init__(self) -> None:
        errors.require_positive(self, 'batch_tokens', 'rows')

    def score(
        self,
        queries: Sequence[Query],
        progress: Callable[[int], None] = lambda queries: None,
    ) -> Iterator[list[tuple[int, Score]]]:
        """Scores of queries in an order of its own: lists of (number of the query, score).

        Every list is a batch that is done, so that a caller can keep it.

        Args:
          progress: is told the queries done.

        Raises:
          InputError: a context is empty, or an id outside the vocabulary.
        """
        for i, query in enumerate(queries):
            self._check(i, query)
        cut, pieces = self._pieces(queries)
        prefix = self._shared(pieces)
        cache = self._read(prefix)
        left = np.zeros(len(queries), int)
        for piece in pieces:
            np.add.at(left, list(piece.owners), 1)
        sums, greedy = np.zeros(len(queries)), np.ones(len(queries), bool)
        empty = [i for i in range(len(queries)) if not left[i]]
        if empty:
            progress(len(empty))
            yield [(i, Score(0.0, True, 0, False)) for i in empty]
        arguments = (self.batch_tokens, self.rows, len(prefix), self._forks)
        for batch in packing.batches(pieces, *arguments):
            owners, log_probs, best = self._run(batch, prefix, cache)
            np.add.at(sums, owners, log_probs)
            np.logical_and.at(greedy, owners, best)
            left_before = left.copy()
            for piece in batch.pieces:
                np.subtract.at(left, list(piece.owners), 1)
            done = np.flatnonzero((left == 0) & (left_before > 0))
            progress(len(done))
            yield [
                (
                    int(i),
                    Score(float(sums[i]), bool(greedy[i]), len(queries[i].target), cut[i]),
                )
                for i in done
            ]

    def scores(self, queries: Sequence[Query]) -> list[Score]:
        """score() of few queries, in their order."""
        found = dict(pair for batch in self.score(queries) for pair in batch)
        return [found[i] for i in range(len(queries))]

    def _check(self, i: int, query: Query) -> None:
        ids = (*query.context, *query.target)
        if not query.context:
            raise errors.InputError(f'query {i} has no context; begin it with end-of-text')
        if min(ids) < 0 or max(ids) >= self.decoder.n_vocab:
            raise errors.InputError(
                f'query {i} has a token outside the vocabulary of {self.decoder.n_vocab} ids'
            )

    @property
    def _forks(self) -> bool:
        """Whether a row can hold several texts."""
        return self.decoder.has_slots

    def _pieces(self, queries: Sequence[Query]) -> tuple[list[bool], list[packing.Piece]]:
        """Which queries lost the beginning of their context, and what is to be read."""
        most = self.n_ctx or self.decoder.most_tokens
        cut = [False] * len(queries)
        found: dict[Any, list[tuple[tuple[int, ...], int]]] = {}
        for i, (context, target) in enumerate(queries):
            if not target:
                continue
            parts = [Query(tuple(context), tuple(target))]
            if most is not None and len(context) + len(target) - 1 > most:
                cut[i] = True
                parts = [Query(tuple(context[len(target) - 1 - most :]), tuple(target))]
                if len(target) > most:
                    parts = windows((*context[-1:], *target), most)
            for part in parts:
                alone = () if self._forks else (i,)
                found.setdefault((part.context, alone), []).append((part.target, i))
        return cut, [
            piece
            for (context, _), texts in found.items()
            for piece in packing.split(context, texts)
        ]

    def _shared(self, pieces: Sequence[packing.Piece]) -> tuple[int, ...]:
        """What all contexts begin with, if it is worth reading apart; a token is left to each."""
        if len(pieces) < 2:
            return ()
        first, last = (f(piece.context for piece in pieces) for f in (min, max))
        most = min(len(piece.context) for piece in pieces) - 1
        same = next(
            (i for i in range(most) if first[i] != last[i]), most
        )  # of sorted texts, the outer two share what all do
        return first[:same] if same >= _SHORTEST_PREFIX else ()

    def _read(self, prefix: tuple[int, ...]) -> Any:
        """The cache of one row that has read the prefix; None without one."""
        if not prefix:
            return None
        slots = decode.width(len(prefix))
        tokens_1xP = np.zeros((1, slots), np.int32)
        tokens_1xP[0, : len(prefix)] = prefix
        positions_1xP = np.where(np.arange(slots) < len(prefix), np.arange(slots), -1)[None]
        return _prefix(self.decoder, self.params, tokens_1xP, positions_1xP)

    def _run(
        self, batch: packing.Packed, prefix: tuple[int, ...], cache: Any
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(query, log-prob, whether most likely) of every scored token of a batch."""
        hidden_BxLxD = _hidden(
            self.decoder,
            self.params,
            cache,
            np.int32(len(prefix)),
            batch.tokens_BxL,
            batch.positions_BxL,
            batch.text_BxL,
            batch.branch_BxL,
        )
        width = -(-_PLACES // self.rows)
        banned_V = np.zeros(self.decoder.n_vocab, bool)
        banned_V[list(self.banned)] = True
        found = []
        for start in range(0, len(batch.place_P), width * self.rows):
            part = slice(start, start + width * self.rows)
            place_RxC, target_RxC = np.zeros((2, self.rows, width), np.int32)
            number = len(batch.place_P[part])
            place_RxC.flat[:number] = batch.place_P[part]
            target_RxC.flat[:number] = batch.target_P[part]
            picked_RxCxD = _picked(hidden_BxLxD, place_RxC)
            found.append(_judged(self.decoder, self.params, picked_RxCxD, target_RxC, banned_V))
        number = len(batch.place_P)
        log_prob_P, best_P = (
            np.concatenate([np.ravel(x) for x in some])[:number]
            for some in zip(*mesh_lib.fetched(found), strict=True)
        )
        return batch.owner_P, log_prob_P, best_P


@functools.partial(jax.jit, static_argnames='decoder')
def _prefix(
    decoder: decode.Decoder,
    params: Any,
    tokens_1xP: Int[Array, '1 P'],
    positions_1xP: Int[Array, '1 P'],
) -> Any:
    """The cache of one row that has read a prefix."""
    cache = decoder.empty_cache(1, tokens_1xP.shape[1])
    return decoder.extend(params, tokens_1xP, positions_1xP, cache)[1]


@functools.partial(jax.jit, static_argnames='decoder')
def _hidden(
    decoder: decode.Decoder,
    params: Any,
    prefix: Any,
    shared: Int[Array, ''],
    tokens_BxL: Int[Array, 'B L'],
    positions_BxL: Int[Array, 'B L'],
    text_BxL: Int[Array, 'B L'],
    branch_BxL: Int[Array, 'B L'],
) -> Num[Array, 'B L D']:
    """Hidden states of rows, behind what is shared."""
    rows, length = tokens_BxL.shape
    more: tuple = (None,) if prefix is None else (_begin(decoder, prefix, rows, length),)
    if decoder.has_slots:
        more += (_tree(prefix, shared, positions_BxL, text_BxL, branch_BxL),)

    def run(model: Any) -> jax.Array:
        return model.network(tokens_BxL, positions_BxL, *more)[0]

    return decoder.model.apply({'params': params}, method=run)


@jax.jit
def _picked(hidden_BxLxD: Num[Array, 'B L D'], place_RxC: Int[Array, 'R C']) -> Num[Array, 'R C D']:
    rows, length, width = hidden_BxLxD.shape  # a width of 0, where no context counts
    return hidden_BxLxD.reshape(rows * length, width)[place_RxC]


@functools.partial(jax.jit, static_argnames='decoder')
def _judged(
    decoder: decode.Decoder,
    params: Any,
    hidden_RxCxD: Num[Array, 'R C D'],
    target_RxC: Int[Array, 'R C'],
    banned_V: Bool[Array, ' V'],
) -> tuple[Float[Array, 'R C'], Bool[Array, 'R C']]:
    """Log-probs of targets, and whether no other token was more likely."""
    logits_RxCxV = decoder.model.apply({'params': params}, hidden_RxCxD, method='project')
    logits_RxCxV = logits_RxCxV[..., : decoder.n_vocab]
    chosen_RxC = jnp.take_along_axis(logits_RxCxV, target_RxC[..., None], axis=-1)[..., 0]
    total_RxC = jax.nn.logsumexp(logits_RxCxV, axis=-1)
    allowed_RxCxV = jnp.where(banned_V[None, None], -jnp.inf, logits_RxCxV)
    top_RxC = jnp.maximum(allowed_RxCxV.max(axis=-1), chosen_RxC)
    ids_1x1xV = jnp.arange(decoder.n_vocab)[None, None]
    is_top_RxCxV = (allowed_RxCxV == top_RxC[..., None]) | (ids_1x1xV == target_RxC[..., None])
    first_RxC = jnp.where(is_top_RxCxV, ids_1x1xV, decoder.n_vocab).min(axis=-1)
    return chosen_RxC - total_RxC, (chosen_RxC == top_RxC) & (first_RxC == target_RxC)


def _begin(decoder: decode.Decoder, prefix: Any, rows: int, length: int) -> Any:
    """The prefix's cache in every row, with room for `length` more tokens."""

    def widened(one: jax.Array, whole: jax.Array) -> jax.Array:
        one = jnp.broadcast_to(one, (rows, *one.shape[1:]))
        spare = [(0, w - x) for x, w in zip(one.shape, whole.shape, strict=True)]
        return jnp.pad(one, spare)

    slots = _slots(prefix) + length if decoder.has_slots else length
    return jax.tree.map(widened, prefix, decoder.empty_cache(rows, slots))


def _slots(prefix: Any) -> int:
    """How many slots a GPT's cache has."""
    return 0 if prefix is None else prefix[0].value_BxGxMxK.shape[2]


def _tree(
    prefix: Any,
    shared: jax.Array,
    positions_BxL: jax.Array,
    text_BxL: jax.Array,
    branch_BxL: jax.Array,
) -> attention.Tree:
    """Every token sees the prefix, its piece's context, and its own branch of it."""
    rows, length = positions_BxL.shape
    before = _slots(prefix)
    place_M = jnp.arange(before)
    read_BxM = jnp.broadcast_to(jnp.where(place_M < shared, place_M, -1), (rows, before))
    text_BxLx1, branch_BxLx1 = text_BxL[..., None], branch_BxL[..., None]
    text_Bx1xL, branch_Bx1xL = text_BxL[:, None], branch_BxL[:, None]
    own_BxLxL = (text_BxLx1 == text_Bx1xL) & ((branch_Bx1xL == 0) | (branch_BxLx1 == branch_Bx1xL))
    slot_1xL = before + jnp.arange(length)[None]
    return attention.Tree(
        jnp.where(positions_BxL < 0, -1, slot_1xL),
        jnp.concatenate([read_BxM, positions_BxL], axis=1),
        jnp.concatenate([jnp.ones((rows, length, before), bool), own_BxLxL], axis=2),
    )
