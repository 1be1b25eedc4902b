# SPDX-License-Identifier: Apache-2.0
"""One step of a group of beams: candidates, those that end, those that go on; as transformers'.

Each step takes the best candidates of all beams of a group: enough that, though all the best end,
there are beams to go on with. Ended ones compete for the results by score / length^length_penalty.
Axes as in beam.py.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.sampling import processors, texts

_LOW = -1e9  # what transformers takes for "never"


class Asked(NamedTuple):
    """What prompts ask of the search; every array is (I,)."""

    settings: processors.Settings
    prompt: Any
    limit: Any
    beams: Any  # of a group
    candidates: Any
    length_penalty: Any
    diversity: Any
    stop_early: Any  # early_stopping = True
    never: Any  # early_stopping = 'never'
    key: Any


class Found(NamedTuple):
    """Sequences of a group: (I, K, T) tokens and log-probs, the rest (I, K)."""

    tokens: Any
    logprobs: Any
    score: Any
    length: Any
    real: Any


class Group(NamedTuple):
    """Beams that are chosen together; what goes on, what ended, and (I,) flags of the search."""

    running: Found
    ended: Found
    improvable: Any  # a running beam may still beat an ended one
    active: Any


@dataclasses.dataclass(frozen=True)
class Stops:
    """Stop strings of every prompt, looked for on the host; equal ones share a program."""

    look: texts.Stops
    strings: tuple[tuple[str, ...], ...]


def joined(found: Sequence[Found]) -> Found:
    """The sequences of several groups beside one another."""
    return jax.tree.map(lambda *xs: jnp.concatenate(xs, axis=1), *found)


def start(asked: Asked, tokens_IxL: jax.Array, room: int, alive_IxK: jax.Array) -> Group:
    """A group before its first step: all its beams are the prompt, so only the first may go on."""
    number, n_beams = alive_IxK.shape
    wide = min(tokens_IxL.shape[1], room)
    text_IxT = jnp.pad(tokens_IxL[:, :wide], ((0, 0), (0, room - wide)))
    tokens_IxKxT = jnp.repeat(text_IxT[:, None], n_beams, axis=1)
    length_IxK = jnp.repeat(jnp.asarray(asked.prompt)[:, None], n_beams, axis=1)

    def found(score_K: jax.Array) -> Found:
        score_IxK = jnp.where(alive_IxK, jnp.broadcast_to(score_K[None], alive_IxK.shape), -jnp.inf)
        nothing = jnp.zeros(alive_IxK.shape, bool)
        return Found(tokens_IxKxT, jnp.zeros(tokens_IxKxT.shape), score_IxK, length_IxK, nothing)

    first_K = jnp.where(jnp.arange(n_beams) == 0, 0.0, _LOW)
    flags_I = jnp.ones(number, bool)
    return Group(found(first_K), found(jnp.full(n_beams, _LOW)), flags_I, flags_I)


def advance(
    asked: Asked,
    old: Group,
    scores_IxKxV: jax.Array,
    log_probs_IxKxV: jax.Array,
    alive_IxK: jax.Array,
    keys_I: jax.Array,
    stops: Stops | None,
) -> tuple[Group, jax.Array, jax.Array]:
    """One step of a group.

    Args:
      scores_IxKxV: of every next token; log_probs_IxKxV: before processors and penalties.
      alive_IxK: which beams the prompts asked for.
      keys_I: random keys of the prompts.

    Returns:
      the group, the parents (I, K) and the tokens (I, K) of the best that go on.
    """
    n_beams = alive_IxK.shape[1]
    candidates, parent_IxC, token_IxC = _candidates(
        asked, old, scores_IxKxV, log_probs_IxKxV, keys_I
    )
    valid_IxC, score_IxC = candidates.real, candidates.score
    stop_IxC = (token_IxC[..., None] == asked.settings.end_BxE[:, None]).any(-1)
    if stops is not None:
        stop_IxC |= _stopped(stops, candidates, asked.prompt)
    hits_IxC = stop_IxC | (candidates.length >= asked.limit[:, None])

    going_IxC = jnp.where(valid_IxC, score_IxC + jnp.where(hits_IxC, _LOW, 0.0), -jnp.inf)
    score_IxK, index_IxK = jax.lax.top_k(going_IxC, n_beams)
    new = jax.tree.map(lambda x: _take(x, index_IxK), candidates)
    new = new._replace(score=jnp.where(alive_IxK, score_IxK, -jnp.inf))
    ended = _end(asked, old, candidates, hits_IxC, alive_IxK)
    improvable_I = old.improvable & _may_improve(asked, old, new, ended, alive_IxK)
    full_I = (ended.real | ~alive_IxK).all(axis=1) & asked.stop_early
    active_I = improvable_I & ~full_I & ~(hits_IxC | ~valid_IxC).all(axis=1)

    def unless_over(new: jax.Array, old_: jax.Array) -> jax.Array:
        """Changes nothing of prompts whose search is over."""
        return jnp.where(old.active.reshape(-1, *(1,) * (new.ndim - 1)), new, old_)

    group = jax.tree.map(unless_over, Group(new, ended, improvable_I, active_I), old)
    own_IxK = jnp.broadcast_to(jnp.arange(n_beams)[None], alive_IxK.shape)
    parent_IxK = unless_over(_take(parent_IxC, index_IxK), own_IxK)
    _, index_IxK = jax.lax.top_k(jnp.where(valid_IxC & ~stop_IxC, score_IxC, -jnp.inf), n_beams)
    return group, parent_IxK, _take(token_IxC, index_IxK)


def _candidates(
    asked: Asked,
    old: Group,
    scores_IxKxV: jax.Array,
    log_probs_IxKxV: jax.Array,
    keys_I: jax.Array,
) -> tuple[Found, jax.Array, jax.Array]:
    """The best continuations of all beams, with the parent and the token of each."""
    number, n_beams, n_vocab = scores_IxKxV.shape
    running = old.running
    n_candidates = min(asked.settings.end_BxE.shape[1] + 1, n_vocab) * n_beams
    total_IxN = (scores_IxKxV + running.score[..., None]).reshape(number, -1)

    def noisy(total_IxN: jax.Array) -> jax.Array:
        noise_IxN = jax.vmap(lambda key: jax.random.gumbel(key, total_IxN.shape[1:]))(keys_I)
        return jnp.where(asked.settings.sample_B[:, None], total_IxN + noise_IxN, total_IxN)

    ranked_IxN = jax.lax.cond(asked.settings.sample_B.any(), noisy, lambda x: x, total_IxN)
    _, place_IxC = jax.lax.top_k(ranked_IxN, n_candidates)
    valid_IxC = jnp.arange(n_candidates)[None] < asked.candidates[:, None]
    score_IxC = jnp.where(valid_IxC, jnp.take_along_axis(total_IxN, place_IxC, axis=1), -jnp.inf)
    parent_IxC, token_IxC = place_IxC // n_vocab, place_IxC % n_vocab
    log_prob_IxC = jnp.take_along_axis(log_probs_IxKxV.reshape(number, -1), place_IxC, axis=1)
    length_Ix1 = running.length[:, :1]
    next_Ix1xT = jnp.arange(running.tokens.shape[2])[None, None] == length_Ix1[..., None]
    candidates = Found(
        jnp.where(next_Ix1xT, token_IxC[..., None], _take(running.tokens, parent_IxC)),
        jnp.where(next_Ix1xT, log_prob_IxC[..., None], _take(running.logprobs, parent_IxC)),
        score_IxC,
        jnp.broadcast_to(length_Ix1 + 1, place_IxC.shape),
        valid_IxC,
    )
    return candidates, parent_IxC, token_IxC


def _may_improve(
    asked: Asked, old: Group, new: Found, ended: Found, alive_IxK: jax.Array
) -> jax.Array:
    """In which prompts a beam that goes on may still beat one that has ended."""
    prompt_Ix1, penalty_Ix1 = asked.prompt[:, None], asked.length_penalty[:, None]
    hopeful_Ix1 = (asked.never & (asked.length_penalty > 0))[:, None]
    next_Ix1 = old.running.length[:, :1] + 1
    reach_Ix1 = jnp.where(hopeful_Ix1, asked.limit[:, None], next_Ix1) - prompt_Ix1
    best_Ix1 = new.score[:, :1] / reach_Ix1.astype(jnp.float32) ** penalty_Ix1
    worst_Ix1 = jnp.where(alive_IxK, ended.score, jnp.inf).min(axis=1, keepdims=True)
    worst_IxK = jnp.where(ended.real, worst_Ix1, _LOW)
    return ((best_Ix1 > worst_IxK) & alive_IxK).any(axis=1)


def _end(
    asked: Asked, old: Group, candidates: Found, hits_IxC: jax.Array, alive_IxK: jax.Array
) -> Found:
    """The best of those that ended before and those that end now."""
    length_IxC = (candidates.length - asked.prompt[:, None]).astype(jnp.float32)
    score_IxC = candidates.score / length_IxC ** asked.length_penalty[:, None]
    full_I = (old.ended.real | ~alive_IxK).all(axis=1) & asked.stop_early
    closed_I = jnp.where(full_I, _LOW, 0.0) + jnp.where(old.improvable, 0.0, _LOW)
    best_IxC = jnp.arange(hits_IxC.shape[1])[None] < asked.beams[:, None]
    now_IxC = hits_IxC & best_IxC & candidates.real
    score_IxC += closed_I[:, None] + jnp.where(now_IxC, 0.0, _LOW)
    score_IxC = jnp.where(candidates.real, score_IxC, -jnp.inf)
    both = joined([old.ended, candidates._replace(score=score_IxC, real=now_IxC)])
    score_IxK, index_IxK = jax.lax.top_k(both.score, alive_IxK.shape[1])
    found = jax.tree.map(lambda x: _take(x, index_IxK), both)
    score_IxK = jnp.where(alive_IxK, score_IxK, -jnp.inf)
    return found._replace(score=score_IxK, real=found.real & alive_IxK)


def _take(x: jax.Array, index_IxK: jax.Array) -> jax.Array:
    """Some of the sequences of each prompt."""
    index = index_IxK.reshape(*index_IxK.shape, *(1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1)


def _stopped(stops: Stops, candidates: Found, prompt_I: jax.Array) -> jax.Array:
    """Which candidates contain a stop string now, asked of the host."""

    def one(row: list[int], first: int, end: int, strings: tuple[str, ...]) -> bool:
        return bool(strings) and stops.look(row[:first], row[first:end], strings) >= 0

    def look(tokens: Any, length: Any, prompt: Any) -> np.ndarray:
        prompts = zip(
            np.asarray(tokens).tolist(),
            np.asarray(length),
            np.asarray(prompt),
            stops.strings,
            strict=True,
        )
        found = [
            [one(row, int(first), int(end), strings) for row, end in zip(rows, ends, strict=True)]
            for rows, ends, first, strings in prompts
        ]
        return np.array(found)

    shape = jax.ShapeDtypeStruct(candidates.length.shape, bool)
    return jax.pure_callback(look, shape, candidates.tokens, candidates.length, prompt_I)
