# SPDX-License-Identifier: Apache-2.0
"""Beam search, beam sampling and diverse beam search (Vijayakumar et al. 2018), as transformers'.

Each step takes the best candidates of all beams of a group: enough that, though all the best end,
there are beams to go on with. Ended ones compete for the results by score / length^length_penalty.
Groups take turns; a token costs diversity_penalty each time a beam of an earlier group has just
taken it, and that stays in the scores.

Axes: I prompts, G groups, K beams of a group, C candidates of a group, T tokens. The beams that a
prompt asks for may be fewer than K: one program serves several numbers.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.configs import errors
from gptjax.sampling import decode, options, processors

_LOW = -1e9  # what transformers takes for "never"
_BEAMS = 4  # room for beams comes in 4, 8, 16, ...


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
    """Sequences: (I, G, K, T) tokens and log-probs, (I, G, K) scores and lengths."""

    tokens: Any
    logprobs: Any
    score: Any
    length: Any
    real: Any


class _State(NamedTuple):
    cache: Any
    running: _Found
    ended: _Found
    improvable: Any  # (I, G): a running beam may still beat an ended one
    active: Any  # (I, G)


@dataclasses.dataclass(frozen=True)
class Stops:
    """Stop strings of every prompt, looked for on the host; programs are compiled for equal ones."""

    look: Any  # (tokens of a text, stop strings) -> how many are left, -1 = all
    strings: tuple[tuple[str, ...], ...]


def search(
    decoder: decode.Decoder,
    params: Any,
    prompts: Sequence[Sequence[int]],
    asked: Sequence[options.Options],
    stops: Any = None,
) -> list[list[decode.Text]]:
    """The num_return_sequences best texts of every prompt, best first.

    Args:
      asked: options of each prompt, with num_beams above 1 and the same num_beam_groups.
      stops: as decode.generate; a text keeps the stop string's tokens, for it was scored with them.

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
        processors.settings(padded, lengths, decoder.n_vocab),
        np.array(lengths, np.int32),
        column(limits, np.int32),
        column(n_beams, np.int32),
        column([max(2, 1 + len(one.eos_token_id)) * n
                for one, n in zip(asked, n_beams, strict=True)], np.int32),
        column([one.length_penalty for one in asked], np.float32),
        column([one.diversity_penalty for one in asked], np.float32),
        column([one.early_stopping is True for one in asked], bool),
        column([one.early_stopping == 'never' for one in asked], bool),
        decode.keys([one.seed for one in padded], [0] * number),
    )  # fmt: skip
    wide = decode.width(max(lengths), decoder.most_tokens)
    tokens = np.zeros((number, wide), np.int32)
    for i, prompt in enumerate(prompts):
        tokens[i, : len(prompt)] = prompt
    strings = tuple(one.stop_strings for one in padded)
    errors.require(not any(strings) or stops is not None, 'stop strings need a tokenizer')
    ended = _search(
        decoder, params, wanted, tokens, decode.width(max(limits)), n_groups, room_for,
        Stops(stops, strings) if any(strings) else None,
    )  # fmt: skip
    ended = jax.device_get(ended)
    return [
        _texts(ended, i, len(prompt), one)
        for i, (prompt, one) in enumerate(zip(prompts, asked, strict=True))
    ]


def _texts(ended: _Found, i: int, prompt: int, asked: options.Options) -> list[decode.Text]:
    score = ended.score[i].ravel()
    texts = []
    for place in np.argsort(-score, kind='stable')[: asked.num_return_sequences]:
        g, k = np.unravel_index(place, ended.score[i].shape)
        length = int(ended.length[i, g, k])
        tokens = ended.tokens[i, g, k, prompt:length].tolist()
        stopped = length < asked.limit(prompt) or tokens[-1] in asked.eos_token_id
        texts.append(
            decode.Text(
                tokens, 'stop' if stopped else 'length',
                ended.logprobs[i, g, k, prompt:length].tolist(), [], [], [], float(score[place]),
            )  # fmt: skip
        )
    return texts


@functools.partial(jax.jit, static_argnames=('decoder', 'room', 'n_groups', 'n_beams', 'stops'))
def _search(
    decoder: decode.Decoder,
    params: Any,
    asked: _Asked,
    tokens_IxL: jax.Array,
    room: int,
    n_groups: int,
    n_beams: int,
    stops: Stops | None,
) -> _Found:
    """The ended sequences of every group once nothing can change them."""
    number, wide = tokens_IxL.shape
    shape = (number, n_groups, n_beams)
    most = decoder.most_tokens
    cache = decoder.empty_cache(number, room if most is None else min(room, most))
    place_1xL = jnp.arange(wide)[None]
    positions_IxL = jnp.where(place_1xL < asked.prompt[:, None], place_1xL, -1)
    logits, cache = decoder.extend(params, tokens_IxL, positions_IxL, cache)
    each = n_groups * n_beams
    cache = jax.tree.map(lambda x: jnp.repeat(x, each, axis=0), cache)
    settings = jax.tree.map(lambda x: jnp.repeat(jnp.asarray(x), each, axis=0), asked.settings)
    prompt_B, limit = jnp.repeat(asked.prompt, each), asked.limit[:, None, None]
    wide = min(wide, room)
    text = jnp.zeros((*shape, room), jnp.int32)
    text = text.at[..., :wide].set(tokens_IxL[:, None, None, :wide])
    alive = jnp.arange(n_beams) < asked.beams[:, None, None]  # I, 1, K

    def nothing(score):
        length = jnp.broadcast_to(asked.prompt[:, None, None], shape)
        score = jnp.broadcast_to(jnp.where(alive, score, -jnp.inf), shape)
        return _Found(text, jnp.zeros((*shape, room)), score, length, jnp.zeros(shape, bool))

    first = jnp.where(jnp.arange(n_beams) == 0, 0.0, _LOW)  # all beams are the same at first
    flags = jnp.ones(shape[:2], bool)
    state = _State(cache, nothing(first), nothing(_LOW), flags, flags)

    def choose(state: _State, logits_BxV) -> tuple[_State, Any]:
        running = state.running
        log_probs_BxV = jax.nn.log_softmax(logits_BxV, axis=-1)
        scores_BxV = processors.process(
            log_probs_BxV, running.tokens.reshape(-1, room), running.length.ravel(), prompt_B,
            settings,
        )  # fmt: skip
        scores, log_probs = (x.reshape(*shape, -1) for x in (scores_BxV, log_probs_BxV))
        taken = jnp.zeros((number, scores.shape[-1]))
        groups = []
        for g in range(n_groups):
            group = jax.tree.map(lambda x, g=g: x[:, g], state._replace(cache=None))
            penalised = scores[:, g] - (asked.diversity[:, None] * taken)[:, None]
            key = jax.vmap(lambda key, step, g=g: jax.random.fold_in(
                jax.random.fold_in(key, step), g))(asked.key, group.running.length[:, 0])
            new, parent = _group_step(
                asked, group, penalised, log_probs[:, g], alive[:, 0], limit[:, 0], key, stops
            )
            latest = jnp.take_along_axis(
                new.running.tokens, group.running.length[..., None], axis=-1)[..., 0]
            counted = alive[:, 0] & group.active[:, None]
            taken = taken.at[jnp.arange(number)[:, None], latest].add(counted * 1.0)
            groups.append((new, parent))
        new, parent = jax.tree.map(lambda *xs: jnp.stack(xs, axis=1), *groups)
        return new._replace(cache=state.cache), parent

    def reorder(cache, parent):
        own = jnp.arange(number * each).reshape(shape)
        rows = (own[..., :1] + parent).ravel()
        moved = lambda cache: jax.tree.map(lambda x: x[rows], cache)  # noqa: E731
        return jax.lax.cond((rows == own.ravel()).all(), lambda cache: cache, moved, cache)

    def step(carry):
        state, parent = carry
        cache, running = reorder(state.cache, parent), state.running
        last = running.length.ravel()[:, None] - 1
        token = jnp.take_along_axis(running.tokens.reshape(-1, room), last, axis=1)
        going = jnp.broadcast_to(state.active[..., None] & alive, shape).reshape(-1, 1)
        logits, cache = decoder.extend(params, token, jnp.where(going, last, -1), cache)
        return choose(state._replace(cache=cache), logits[:, 0])

    carry = choose(state, jnp.repeat(logits[:, 0], each, axis=0))
    return jax.lax.while_loop(lambda carry: carry[0].active.any(), step, carry)[0].ended


def _group_step(asked, state, scores, log_probs, alive, limit, key, stops):
    """One step of one group of every prompt: (I, K, V) scores -> its state, parents (I, K)."""
    number, n_beams, n_vocab = scores.shape
    running, old = state.running, state
    n_candidates = min(asked.settings.end_BxE.shape[1] + 1, n_vocab) * n_beams
    total = (scores + running.score[..., None]).reshape(number, -1)

    def drawn(_):
        noise = jax.vmap(lambda key: jax.random.gumbel(key, total.shape[1:]))(key)
        return jnp.where(asked.settings.sample_B[:, None], total + noise, total)

    ranked = jax.lax.cond(asked.settings.sample_B.any(), drawn, lambda _: total, None)
    _, places = jax.lax.top_k(ranked, n_candidates)
    valid = jnp.arange(n_candidates) < asked.candidates[:, None]
    score = jnp.where(valid, jnp.take_along_axis(total, places, axis=1), -jnp.inf)
    parent, token = places // n_vocab, places % n_vocab

    def take(x, index):
        return jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), axis=1)

    slot = jnp.arange(running.tokens.shape[-1]) == running.length[:, :1, None]
    chosen = jnp.take_along_axis(log_probs.reshape(number, -1), places, axis=1)
    tokens = jnp.where(slot, token[..., None], take(running.tokens, parent))
    candidates = _Found(
        tokens,
        jnp.where(slot, chosen[..., None], take(running.logprobs, parent)),
        score,
        jnp.broadcast_to(running.length[:, :1] + 1, places.shape),
        valid,
    )
    hits = (token[..., None] == asked.settings.end_BxE[:, None]).any(-1)
    hits |= candidates.length >= limit
    if stops is not None:
        hits |= _stopped(stops, candidates, asked.prompt)

    going = jnp.where(valid, score + jnp.where(hits, _LOW, 0), -jnp.inf)
    score, index = jax.lax.top_k(going, n_beams)
    new = jax.tree.map(lambda x: take(x, index), candidates)
    new = new._replace(score=jnp.where(alive, score, -jnp.inf))
    parent = take(parent, index)

    ended = _ended(asked, state, candidates, hits, alive)
    length = (new.length[:, :1] - asked.prompt[:, None]).astype(jnp.float32)
    best_length = jnp.where(asked.never[:, None] & (asked.length_penalty > 0)[:, None],
                            limit - asked.prompt[:, None], length)  # fmt: skip
    best = new.score[:, :1] / best_length ** asked.length_penalty[:, None]
    worst = jnp.where(alive, ended.score, jnp.inf).min(axis=1, keepdims=True)
    worst = jnp.where(alive & ended.real, worst, jnp.where(alive, _LOW, jnp.inf))
    improvable = state.improvable & (best > worst).any(axis=1)
    full = (ended.real | ~alive).all(axis=1) & asked.stop_early
    active = improvable & ~full & ~(hits | ~valid).all(axis=1)

    def kept(new, old):
        """Of prompts whose search has ended before, nothing changes."""
        return jnp.where(old_active.reshape(-1, *(1,) * (new.ndim - 1)), new, old)

    old_active = old.active
    state = _State(None, new, ended, improvable, active)
    state = jax.tree.map(kept, state, old)
    own = jnp.arange(n_beams)[None]
    return state, jnp.where(old_active[:, None], parent, own)


def _ended(asked, state, candidates, hits, alive):
    """The best of those that ended before and those that end now."""
    length = (candidates.length - asked.prompt[:, None]).astype(jnp.float32)
    score = candidates.score / length ** asked.length_penalty[:, None]
    full = (state.ended.real | ~alive).all(axis=1, keepdims=True) & asked.stop_early[:, None]
    among_best = jnp.arange(hits.shape[1]) < asked.beams[:, None]
    now = hits & among_best & candidates.real
    score += jnp.where(full, _LOW, 0) + jnp.where(state.improvable[:, None], 0, _LOW)
    score = jnp.where(candidates.real, score + jnp.where(now, 0, _LOW), -jnp.inf)
    both = jax.tree.map(
        lambda a, b: jnp.concatenate([a, b], axis=1),
        state.ended,
        candidates._replace(score=score, real=now),
    )
    score, index = jax.lax.top_k(both.score, alive.shape[1])

    def take(x):
        return jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), axis=1)

    found = jax.tree.map(take, both)
    return found._replace(score=jnp.where(alive, score, -jnp.inf), real=found.real & alive)


def _stopped(stops: Stops, candidates: _Found, prompt) -> jax.Array:
    """Which candidates contain a stop string now, asked of the host."""

    def look(tokens, length, prompt):
        return np.array([
            [bool(strings) and stops.look(row[first:end].tolist(), strings) >= 0
             for row, end in zip(rows, ends, strict=True)]
            for rows, ends, first, strings in zip(
                np.asarray(tokens), np.asarray(length), np.asarray(prompt), stops.strings,
                strict=True)
        ])  # fmt: skip

    shape = jax.ShapeDtypeStruct(candidates.length.shape, bool)
    return jax.pure_callback(look, shape, candidates.tokens, candidates.length, prompt)
