# SPDX-License-Identifier: Apache-2.0
"""Beam search, beam sampling and diverse beam search (Vijayakumar et al. 2018), as transformers'.

What a group of beams does in a step stands in beam_group.py. Groups take turns; a token costs
diversity_penalty each time a beam of an earlier group has just taken it, and that stays in the
scores.

The beams of a prompt share one row of a GPT's cache: what they have in common is there once, and no
cache is ever reordered. Each token has a slot of its own, and each beam knows which slots are its
text. Models without such a cache (an RNN) have a row a beam, reordered at every step.

Axes: I prompts, K beams of a group, J those of all groups, C candidates of a group, T tokens. The
beams that a prompt asks for may be fewer than K: one program serves several numbers.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.configs import errors
from gptjax.models import attention
from gptjax.runtime import mesh as mesh_lib
from gptjax.sampling import beam_group, decode, options, processors, texts

_BEAMS = 4  # room for beams comes in 4, 8, 16, ...; products of few rows are fastest then


class _Past(NamedTuple):
    """The cache of all beams, and in a shared one which slots are each beam's text."""

    cache: Any
    seen_IxJxM: Any
    positions_IxM: Any


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
    ends = [*limits, *(1 for _ in spare)]

    def column(values: Sequence[Any], dtype: type) -> np.ndarray:
        return np.array([*values, *(values[0] for _ in spare)], dtype)

    wanted = beam_group.Asked(
        processors.settings(padded, lengths, ends),
        np.array(lengths, np.int32),
        np.array(ends, np.int32),
        column(n_beams, np.int32),
        column(
            [max(2, 1 + len(one.eos_token_id)) * n for one, n in zip(asked, n_beams, strict=True)],
            np.int32,
        ),
        column([one.length_penalty for one in asked], np.float32),
        column([one.diversity_penalty for one in asked], np.float32),
        column([one.early_stopping is True for one in asked], bool),
        column([one.early_stopping == 'never' for one in asked], bool),
        decode.keys([one.seed for one in padded], [*(copies or [0] * len(prompts)), *spare]),
    )
    wide = decode.width(max(lengths), decoder.most_tokens)
    tokens = np.zeros((number, wide), np.int32)
    for i, prompt in enumerate(prompts):
        tokens[i, : len(prompt)] = prompt
    longest = max(limit - len(prompt) for limit, prompt in zip(limits, prompts, strict=True))
    strings = tuple(one.stop_strings for one in padded)
    texts.check_stops(stops, [one for one in strings if one])
    ended = _search(
        decoder,
        params,
        wanted,
        tokens,
        decode.width(max(limits)),
        decode.width(longest),
        n_groups,
        room_for,
        beam_group.Stops(stops, strings) if any(strings) else None,
    )
    ended = mesh_lib.fetched(ended)
    return [
        _texts(ended, i, len(prompt), one)
        for i, (prompt, one) in enumerate(zip(prompts, asked, strict=True))
    ]


def _texts(
    ended: beam_group.Found, i: int, prompt: int, asked: options.Options
) -> list[decode.Text]:
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
            )
        )
    return found


@functools.partial(
    jax.jit, static_argnames=('decoder', 'room', 'n_new', 'n_groups', 'n_beams', 'stops')
)
def _search(
    decoder: decode.Decoder,
    params: Any,
    asked: beam_group.Asked,
    tokens_IxL: jax.Array,
    room: int,
    n_new: int,
    n_groups: int,
    n_beams: int,
    stops: beam_group.Stops | None,
) -> beam_group.Found:
    """The ended sequences of all groups once nothing can change them."""
    each = n_groups * n_beams
    logits_Ix1xV, past = _read(decoder, params, asked, tokens_IxL, room, n_new, each)
    alive_IxK = jnp.arange(n_beams)[None] < asked.beams[:, None]
    choose = functools.partial(_choose, asked, alive_IxK, stops)

    def go_on(carry: tuple) -> jax.Array:
        return jnp.stack([group.active.any() for group in carry[1]]).any()

    def step(carry: tuple) -> tuple:
        past, groups, parent_IxJ, number_of = carry
        running = beam_group.joined([group.running for group in groups])
        last_IxJx1 = running.length[..., None] - 1
        token_IxJ = jnp.take_along_axis(running.tokens, last_IxJx1, axis=2)[..., 0]
        going_IxJ = jnp.concatenate([group.active[:, None] & alive_IxK for group in groups], axis=1)
        position_IxJ = jnp.where(going_IxJ, running.length - 1, -1)
        slot_J = tokens_IxL.shape[1] + number_of * each + jnp.arange(each)
        extended = (decoder, params, past, token_IxJ, position_IxJ, parent_IxJ, slot_J)
        logits_IxJxV, past = _extend(*extended)
        return past, *choose(groups, logits_IxJxV), number_of + 1

    group = beam_group.start(asked, tokens_IxL, room, alive_IxK)
    first = choose((group,) * n_groups, jnp.repeat(logits_Ix1xV, each, axis=1))
    carry = (past, *first, jnp.zeros((), jnp.int32))
    groups = jax.lax.while_loop(go_on, step, carry)[1]
    return beam_group.joined([group.ended for group in groups])


def _read(
    decoder: decode.Decoder,
    params: Any,
    asked: beam_group.Asked,
    tokens_IxL: jax.Array,
    room: int,
    n_new: int,
    each: int,
) -> tuple[jax.Array, _Past]:
    """Reads the prompts: logits (I, 1, V) behind them, and the past of `each` beams of all."""
    number, wide = tokens_IxL.shape
    place_1xL = jnp.arange(wide)[None]
    positions_IxL = jnp.where(place_1xL < asked.prompt[:, None], place_1xL, -1)
    slots = wide + n_new * each if decoder.has_slots else room
    logits_Ix1xV, cache = decoder.extend(
        params, tokens_IxL, positions_IxL, decoder.empty_cache(number, slots)
    )
    if not decoder.has_slots:
        cache = jax.tree.map(lambda x: jnp.repeat(x, each, axis=0), cache)
        return logits_Ix1xV, _Past(cache, None, None)
    positions_IxM = jnp.pad(positions_IxL, ((0, 0), (0, slots - wide)), constant_values=-1)
    seen_IxJxM = jnp.repeat((positions_IxM >= 0)[:, None], each, axis=1)
    return logits_Ix1xV, _Past(cache, seen_IxJxM, positions_IxM)


def _extend(
    decoder: decode.Decoder,
    params: Any,
    past: _Past,
    token_IxJ: jax.Array,
    position_IxJ: jax.Array,
    parent_IxJ: jax.Array,
    slot_J: jax.Array,
) -> tuple[jax.Array, _Past]:
    """(logits of all beams, the past with their last tokens).

    Args:
      position_IxJ: of the tokens; -1 leaves a beam alone.
      parent_IxJ: which beam each goes on from.
      slot_J: where the tokens go in a shared cache.
    """
    number, each = token_IxJ.shape
    if not decoder.has_slots:
        row_B = (jnp.arange(number)[:, None] * each + parent_IxJ).ravel()
        cache = jax.tree.map(lambda x: x[row_B], past.cache)
        logits, cache = decoder.extend(
            params, token_IxJ.reshape(-1, 1), position_IxJ.reshape(-1, 1), cache
        )
        return logits.reshape(number, each, -1), _Past(cache, None, None)
    positions_IxM = past.positions_IxM.at[:, slot_J].set(position_IxJ)
    own_JxM = jnp.arange(positions_IxM.shape[1])[None] == slot_J[:, None]
    seen_IxJxM = jnp.take_along_axis(past.seen_IxJxM, parent_IxJ[..., None], axis=1)
    seen_IxJxM |= own_JxM[None]
    slot_IxJ = jnp.where(position_IxJ >= 0, slot_J[None], -1)
    tree = attention.Tree(slot_IxJ, positions_IxM, seen_IxJxM)
    logits, cache = decoder.extend(params, token_IxJ, position_IxJ, past.cache, True, tree)
    return logits, _Past(cache, seen_IxJxM, positions_IxM)


def _choose(
    asked: beam_group.Asked,
    alive_IxK: jax.Array,
    stops: beam_group.Stops | None,
    groups: Sequence[beam_group.Group],
    logits_IxJxV: jax.Array,
) -> tuple[tuple[beam_group.Group, ...], jax.Array]:
    """Each group's next beams, one group after the other, and all parents (I, J)."""
    number, each, n_vocab = logits_IxJxV.shape
    n_beams = alive_IxK.shape[1]
    log_probs_IxJxV = jax.nn.log_softmax(logits_IxJxV, axis=-1)
    running = beam_group.joined([group.running for group in groups])
    scores_BxV = processors.process(
        log_probs_IxJxV.reshape(-1, n_vocab),
        running.tokens.reshape(-1, running.tokens.shape[2]),
        running.length.ravel(),
        jnp.repeat(asked.prompt, each),
        jax.tree.map(lambda x: jnp.repeat(jnp.asarray(x), each, axis=0), asked.settings),
    )
    scores_IxJxV = scores_BxV.reshape(number, each, n_vocab)
    taken_IxV, chosen = jnp.zeros((number, n_vocab)), []
    for g, group in enumerate(groups):
        mine = slice(g * n_beams, (g + 1) * n_beams)
        scores_IxKxV = scores_IxJxV[:, mine] - (asked.diversity[:, None] * taken_IxV)[:, None]
        keys_I = jax.vmap(
            lambda key, step, g=g: jax.random.fold_in(jax.random.fold_in(key, step), g)
        )(asked.key, group.running.length[:, 0])
        new, parent_IxK, token_IxK = beam_group.advance(
            asked, group, scores_IxKxV, log_probs_IxJxV[:, mine], alive_IxK, keys_I, stops
        )
        counted_IxK = alive_IxK & group.active[:, None]
        taken_IxV = taken_IxV.at[jnp.arange(number)[:, None], token_IxK].add(counted_IxK * 1.0)
        chosen.append((new, parent_IxK + g * n_beams))
    parent_IxJ = jnp.concatenate([parent for _, parent in chosen], axis=1)
    return tuple(new for new, _ in chosen), parent_IxJ
