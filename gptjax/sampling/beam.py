# SPDX-License-Identifier: Apache-2.0
"""Beam search, beam sampling and diverse beam search (Vijayakumar et al. 2018), as transformers'.

Each step takes the best candidates of all beams of a group: enough that, though all the best end,
there are beams to go on with. Ended ones compete for the results by score / length^length_penalty.
Groups take turns; a token costs diversity_penalty each time a beam of an earlier group has just
taken it, and that stays in the scores.

The beams of a prompt share one row of a GPT's cache: what they have in common is there once, and no
cache is ever reordered. Each token has a slot of its own, and each beam knows which slots are its
text. Models without such a cache (an RNN) have a row a beam, reordered at every step.

Axes: I prompts, K beams of a group, J those of all groups, C candidates of a group, T tokens. The
beams that a prompt asks for may be fewer than K: one program serves several numbers.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.configs import errors
from gptjax.models import attention
from gptjax.sampling import decode, options, processors, texts

_LOW = -1e9  # what transformers takes for "never"
_BEAMS = 4  # room for beams comes in 4, 8, 16, ...; products of few rows are fastest then


class _Asked(NamedTuple):
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


class _Found(NamedTuple):
    """Sequences of a group: (I, K, T) tokens and log-probs, the rest (I, K)."""

    tokens: Any
    logprobs: Any
    score: Any
    length: Any
    real: Any


class _Group(NamedTuple):
    """Beams that are chosen together; what goes on, what ended, and (I,) flags of the search."""

    running: _Found
    ended: _Found
    improvable: Any  # a running beam may still beat an ended one
    active: Any


class _Past(NamedTuple):
    """The cache of all beams, and in a shared one which slots are each beam's text."""

    cache: Any
    seen_IxJxM: Any
    positions_IxM: Any


@dataclasses.dataclass(frozen=True)
class Stops:
    """Stop strings of every prompt, looked for on the host; equal ones share a program."""

    look: texts.Stops
    strings: tuple[tuple[str, ...], ...]


def search(
    decoder: decode.Decoder,
    params: Any,
    prompts: Sequence[Sequence[int]],
    asked: Sequence[options.Options],
    stops: texts.Stops | None = None,
    copies: Sequence[int] = (),
) -> list[list[decode.Text]]:
    """The num_return_sequences best texts of every prompt, best first.

    Args:
      asked: options of each prompt, with num_beams above 1 and the same num_beam_groups.
      copies: as batch.generate.
      stops: as there; a text keeps the stop string's tokens, for it was scored with them.

    Raises:
      InputError: as decode.check().
    """
    limits = [decode.check(decoder, *pair) for pair in zip(prompts, asked, strict=True)]
    groups = {one.num_beam_groups for one in asked}
    errors.require(len(groups) == 1, 'prompts searched together have one num_beam_groups')
    n_groups = groups.pop()
    n_beams = [one.num_beams // n_groups for one in asked]
    room_for = max(_BEAMS, 1 << (max(n_beams) - 1).bit_length())
    number = 1 << (len(prompts) - 1).bit_length()
    spare = [0] * (number - len(prompts))
    padded = [*asked, *(asked[0] for _ in spare)]
    lengths = [*map(len, prompts), *spare]

    def column(values: Sequence[Any], dtype: type) -> np.ndarray:
        return np.array([*values, *(values[0] for _ in spare)], dtype)

    wanted = _Asked(
        processors.settings(padded, lengths),
        np.array(lengths, np.int32),
        np.array([*limits, *(1 for _ in spare)], np.int32),
        column(n_beams, np.int32),
        column([max(2, 1 + len(one.eos_token_id)) * n
                for one, n in zip(asked, n_beams, strict=True)], np.int32),
        column([one.length_penalty for one in asked], np.float32),
        column([one.diversity_penalty for one in asked], np.float32),
        column([one.early_stopping is True for one in asked], bool),
        column([one.early_stopping == 'never' for one in asked], bool),
        decode.keys([one.seed for one in padded], [*(copies or [0] * len(prompts)), *spare]),
    )  # fmt: skip
    wide = decode.width(max(lengths), decoder.most_tokens)
    tokens = np.zeros((number, wide), np.int32)
    for i, prompt in enumerate(prompts):
        tokens[i, : len(prompt)] = prompt
    longest = max(limit - len(prompt) for limit, prompt in zip(limits, prompts, strict=True))
    strings = tuple(one.stop_strings for one in padded)
    errors.require(not any(strings) or stops is not None, 'stop strings need a tokenizer')
    ended = _search(
        decoder, params, wanted, tokens, decode.width(max(limits)),
        decode.width(longest), n_groups, room_for,
        Stops(stops, strings) if any(strings) else None,
    )  # fmt: skip
    ended = jax.device_get(ended)
    return [
        _texts(ended, i, len(prompt), one)
        for i, (prompt, one) in enumerate(zip(prompts, asked, strict=True))
    ]


def _texts(ended: _Found, i: int, prompt: int, asked: options.Options) -> list[decode.Text]:
    score = ended.score[i]
    found = []
    for place in np.argsort(-score, kind='stable')[: asked.num_return_sequences]:
        length = int(ended.length[i, place])
        tokens = ended.tokens[i, place, prompt:length].tolist()
        stopped = length < asked.limit(prompt) or tokens[-1] in asked.eos_token_id
        found.append(
            decode.Text(
                tokens,
                'stop' if stopped else 'length',
                ended.logprobs[i, place, prompt:length].tolist(),
                [],
                [],
                [],
                float(score[place]),
            )  # fmt: skip
        )
    return found


@functools.partial(
    jax.jit, static_argnames=('decoder', 'room', 'n_new', 'n_groups', 'n_beams', 'stops')
)
def _search(
    decoder: decode.Decoder,
    params: Any,
    asked: _Asked,
    tokens_IxL: jax.Array,
    room: int,
    n_new: int,
    n_groups: int,
    n_beams: int,
    stops: Stops | None,
) -> _Found:
    """The ended sequences of all groups once nothing can change them."""
    number, wide = tokens_IxL.shape
    each = n_groups * n_beams
    shared = decoder.has_slots
    place_1xL = jnp.arange(wide)[None]
    positions_IxL = jnp.where(place_1xL < asked.prompt[:, None], place_1xL, -1)
    slots = wide + n_new * each if shared else room
    logits_Ix1xV, cache = decoder.extend(
        params, tokens_IxL, positions_IxL, decoder.empty_cache(number, slots)
    )
    past = _Past(cache, None, None)
    if shared:
        spare = ((0, 0), (0, slots - wide))
        positions_IxM = jnp.pad(positions_IxL, spare, constant_values=-1)
        seen_IxJxM = jnp.repeat((positions_IxM >= 0)[:, None], each, axis=1)
        past = _Past(cache, seen_IxJxM, positions_IxM)
    else:
        past = _Past(jax.tree.map(lambda x: jnp.repeat(x, each, axis=0), cache), None, None)
    settings = jax.tree.map(lambda x: jnp.repeat(jnp.asarray(x), each, axis=0), asked.settings)
    prompt_B = jnp.repeat(asked.prompt, each)
    alive_IxK = jnp.arange(n_beams)[None] < asked.beams[:, None]
    group = _start(asked, tokens_IxL, room, alive_IxK)

    def choose(groups, logits_IxJxV):
        """Each group's next beams, one group after the other, and all parents (I, J)."""
        n_vocab = logits_IxJxV.shape[2]
        log_probs_IxJxV = jax.nn.log_softmax(logits_IxJxV, axis=-1)
        running = _joined([group.running for group in groups])
        scores_BxV = processors.process(
            log_probs_IxJxV.reshape(-1, n_vocab), running.tokens.reshape(-1, room),
            running.length.ravel(), prompt_B, settings,
        )  # fmt: skip
        scores_IxJxV = scores_BxV.reshape(number, each, n_vocab)
        taken_IxV, chosen = jnp.zeros((number, n_vocab)), []
        for g, group in enumerate(groups):
            mine = slice(g * n_beams, (g + 1) * n_beams)
            penalty_IxV = asked.diversity[:, None] * taken_IxV
            step_I = group.running.length[:, 0]
            keys_I = jax.vmap(
                lambda key, step, g=g: jax.random.fold_in(jax.random.fold_in(key, step), g)
            )(asked.key, step_I)
            new, parent_IxK, token_IxK = _advance(
                asked, group, scores_IxJxV[:, mine] - penalty_IxV[:, None],
                log_probs_IxJxV[:, mine], alive_IxK, keys_I, stops,
            )  # fmt: skip
            counted_IxK = alive_IxK & group.active[:, None]
            taken_IxV = taken_IxV.at[jnp.arange(number)[:, None], token_IxK].add(counted_IxK * 1.0)
            chosen.append((new, parent_IxK + g * n_beams))
        parent_IxJ = jnp.concatenate([parent for _, parent in chosen], axis=1)
        return tuple(new for new, _ in chosen), parent_IxJ

    def extend(past, token_IxJ, position_IxJ, parent_IxJ, step):
        """(logits of all beams, the past with their last tokens)."""
        if not shared:
            row_B = (jnp.arange(number)[:, None] * each + parent_IxJ).ravel()
            cache = jax.tree.map(lambda x: x[row_B], past.cache)
            logits, cache = decoder.extend(
                params, token_IxJ.reshape(-1, 1), position_IxJ.reshape(-1, 1), cache
            )
            return logits.reshape(number, each, -1), _Past(cache, None, None)
        slot_J = wide + step * each + jnp.arange(each)
        positions_IxM = past.positions_IxM.at[:, slot_J].set(position_IxJ)
        own_JxM = jnp.arange(slots)[None] == slot_J[:, None]
        seen_IxJxM = jnp.take_along_axis(past.seen_IxJxM, parent_IxJ[..., None], axis=1)
        seen_IxJxM |= own_JxM[None]
        slot_IxJ = jnp.where(position_IxJ >= 0, slot_J[None], -1)
        tree = attention.Tree(slot_IxJ, positions_IxM, seen_IxJxM)
        logits, cache = decoder.extend(params, token_IxJ, position_IxJ, past.cache, True, tree)
        return logits, _Past(cache, seen_IxJxM, positions_IxM)

    def go_on(carry):
        return jnp.stack([group.active.any() for group in carry[1]]).any()

    def step(carry):
        past, groups, parent_IxJ, number_of = carry
        running = _joined([group.running for group in groups])
        last_IxJx1 = running.length[..., None] - 1
        token_IxJ = jnp.take_along_axis(running.tokens, last_IxJx1, axis=2)[..., 0]
        going_IxJ = jnp.concatenate([group.active[:, None] & alive_IxK for group in groups], axis=1)
        position_IxJ = jnp.where(going_IxJ, running.length - 1, -1)
        logits_IxJxV, past = extend(past, token_IxJ, position_IxJ, parent_IxJ, number_of)
        return past, *choose(groups, logits_IxJxV), number_of + 1

    first = choose((group,) * n_groups, jnp.repeat(logits_Ix1xV, each, axis=1))
    carry = (past, *first, jnp.zeros((), jnp.int32))
    groups = jax.lax.while_loop(go_on, step, carry)[1]
    return _joined([group.ended for group in groups])


def _joined(found: Sequence[_Found]) -> _Found:
    return jax.tree.map(lambda *xs: jnp.concatenate(xs, axis=1), *found)


def _start(asked: _Asked, tokens_IxL: jax.Array, room: int, alive_IxK: jax.Array) -> _Group:
    """A group before its first step: all its beams are the prompt, so only the first may go on."""
    number, n_beams = alive_IxK.shape
    wide = min(tokens_IxL.shape[1], room)
    text_IxT = jnp.pad(tokens_IxL[:, :wide], ((0, 0), (0, room - wide)))
    tokens_IxKxT = jnp.repeat(text_IxT[:, None], n_beams, axis=1)
    length_IxK = jnp.repeat(jnp.asarray(asked.prompt)[:, None], n_beams, axis=1)

    def found(score_K) -> _Found:
        score_IxK = jnp.where(alive_IxK, jnp.broadcast_to(score_K[None], alive_IxK.shape), -jnp.inf)
        nothing = jnp.zeros(alive_IxK.shape, bool)
        return _Found(tokens_IxKxT, jnp.zeros(tokens_IxKxT.shape), score_IxK, length_IxK, nothing)

    first_K = jnp.where(jnp.arange(n_beams) == 0, 0.0, _LOW)
    flags_I = jnp.ones(number, bool)
    return _Group(found(first_K), found(jnp.full(n_beams, _LOW)), flags_I, flags_I)


def _advance(asked, old, scores_IxKxV, log_probs_IxKxV, alive_IxK, keys_I, stops):
    """One step of a group: (the group, parents (I, K), tokens (I, K) of the best that go on)."""
    number, n_beams, n_vocab = scores_IxKxV.shape
    running, limit_Ix1 = old.running, asked.limit[:, None]
    n_candidates = min(asked.settings.end_BxE.shape[1] + 1, n_vocab) * n_beams
    total_IxN = (scores_IxKxV + running.score[..., None]).reshape(number, -1)

    def noisy(total_IxN):
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
    candidates = _Found(
        jnp.where(next_Ix1xT, token_IxC[..., None], _take(running.tokens, parent_IxC)),
        jnp.where(next_Ix1xT, log_prob_IxC[..., None], _take(running.logprobs, parent_IxC)),
        score_IxC,
        jnp.broadcast_to(length_Ix1 + 1, place_IxC.shape),
        valid_IxC,
    )
    stop_IxC = (token_IxC[..., None] == asked.settings.end_BxE[:, None]).any(-1)
    if stops is not None:
        stop_IxC |= _stopped(stops, candidates, asked.prompt)
    hits_IxC = stop_IxC | (candidates.length >= limit_Ix1)

    going_IxC = jnp.where(valid_IxC, score_IxC + jnp.where(hits_IxC, _LOW, 0.0), -jnp.inf)
    score_IxK, index_IxK = jax.lax.top_k(going_IxC, n_beams)
    new = jax.tree.map(lambda x: _take(x, index_IxK), candidates)
    new = new._replace(score=jnp.where(alive_IxK, score_IxK, -jnp.inf))

    ended = _end(asked, old, candidates, hits_IxC, alive_IxK)
    prompt_Ix1, penalty_Ix1 = asked.prompt[:, None], asked.length_penalty[:, None]
    hopeful_Ix1 = (asked.never & (asked.length_penalty > 0))[:, None]
    reach_Ix1 = jnp.where(hopeful_Ix1, limit_Ix1, length_Ix1 + 1) - prompt_Ix1
    best_Ix1 = new.score[:, :1] / reach_Ix1.astype(jnp.float32) ** penalty_Ix1
    worst_Ix1 = jnp.where(alive_IxK, ended.score, jnp.inf).min(axis=1, keepdims=True)
    worst_IxK = jnp.where(ended.real, worst_Ix1, _LOW)
    improvable_I = old.improvable & ((best_Ix1 > worst_IxK) & alive_IxK).any(axis=1)
    full_I = (ended.real | ~alive_IxK).all(axis=1) & asked.stop_early
    active_I = improvable_I & ~full_I & ~(hits_IxC | ~valid_IxC).all(axis=1)

    def unless_over(new, old_):
        """Of prompts whose search is over, nothing changes."""
        return jnp.where(old.active.reshape(-1, *(1,) * (new.ndim - 1)), new, old_)

    group = jax.tree.map(unless_over, _Group(new, ended, improvable_I, active_I), old)
    own_IxK = jnp.broadcast_to(jnp.arange(n_beams)[None], alive_IxK.shape)
    parent_IxK = unless_over(_take(parent_IxC, index_IxK), own_IxK)
    _, index_IxK = jax.lax.top_k(jnp.where(valid_IxC & ~stop_IxC, score_IxC, -jnp.inf), n_beams)
    return group, parent_IxK, _take(token_IxC, index_IxK)


def _end(asked, old, candidates, hits_IxC, alive_IxK):
    """The best of those that ended before and those that end now."""
    length_IxC = (candidates.length - asked.prompt[:, None]).astype(jnp.float32)
    score_IxC = candidates.score / length_IxC ** asked.length_penalty[:, None]
    full_I = (old.ended.real | ~alive_IxK).all(axis=1) & asked.stop_early
    closed_I = jnp.where(full_I, _LOW, 0.0) + jnp.where(old.improvable, 0.0, _LOW)
    best_IxC = jnp.arange(hits_IxC.shape[1])[None] < asked.beams[:, None]
    now_IxC = hits_IxC & best_IxC & candidates.real
    score_IxC += closed_I[:, None] + jnp.where(now_IxC, 0.0, _LOW)
    score_IxC = jnp.where(candidates.real, score_IxC, -jnp.inf)
    both = _joined([old.ended, candidates._replace(score=score_IxC, real=now_IxC)])
    score_IxK, index_IxK = jax.lax.top_k(both.score, alive_IxK.shape[1])
    found = jax.tree.map(lambda x: _take(x, index_IxK), both)
    score_IxK = jnp.where(alive_IxK, score_IxK, -jnp.inf)
    return found._replace(score=score_IxK, real=found.real & alive_IxK)


def _take(x: jax.Array, index_IxK: jax.Array) -> jax.Array:
    """Some of the sequences of each prompt."""
    index = index_IxK.reshape(*index_IxK.shape, *(1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1)


def _stopped(stops: Stops, candidates: _Found, prompt) -> jax.Array:
    """Which candidates contain a stop string now, asked of the host."""

    def look(tokens, length, prompt):
        return np.array([
            [bool(strings) and stops.look(row[:first], row[first:end], strings) >= 0
             for row, end in zip(rows, ends, strict=True)]
            for rows, ends, first, strings in zip(
                np.asarray(tokens).tolist(), np.asarray(length), np.asarray(prompt), stops.strings,
                strict=True)
        ])  # fmt: skip

    shape = jax.ShapeDtypeStruct(candidates.length.shape, bool)
    return jax.pure_callback(look, shape, candidates.tokens, candidates.length, prompt)
