# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding (Leviathan et al. 2023): several tokens a pass, the same distribution.

A draft proposes tokens: a small model of the same vocabulary, or prompt lookup (Saxena 2023), which
copies what followed the last few tokens where they stood before. One pass of the model judges all
proposals: token x is taken with probability min(1, p(x) / q(x)), and the first that is not is drawn
anew from what p has more than q. Both p and q are what is left after the processors, so the options
mean the same as without; where nothing is drawn, p is all on the most likely token.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.configs import errors
from gptjax.runtime import mesh as mesh_lib
from gptjax.sampling import batch, decode, options, processors, texts

_MATCH = 3  # the most tokens that prompt lookup compares


class Draft(NamedTuple):
    """A small model that proposes."""

    decoder: decode.Decoder
    params: Any
    number: int  # of tokens at a time


class Lookup(NamedTuple):
    """The text so far, which proposes what followed its last tokens before."""

    number: int  # of tokens at a time


class Stats(NamedTuple):
    """How much the draft saved."""

    passes: int  # of the model, prompts aside
    proposed: int
    accepted: int


def generate(
    decoder: decode.Decoder,
    params: Any,
    prompts: Sequence[Sequence[int]],
    asked: Sequence[options.Options],
    proposer: Draft | Lookup,
    copies: Sequence[int] = (),
    stops: texts.Stops | None = None,
) -> tuple[list[decode.Text], Stats]:
    """Generates as batch.generate does, with proposals.

    Raises:
      InputError: as check().
    """
    for prompt, one in zip(prompts, asked, strict=True):
        check(decoder, proposer, prompt, one)
    together = batch.Batch(decoder, params, prompts, asked, copies, spare=proposer.number)
    drafter, draft_params, cache = None, None, None
    if isinstance(proposer, Draft):
        drafter, draft_params = proposer.decoder, proposer.params
        cache = _read(drafter, draft_params, together.state, together.context)
    counts = np.zeros(3, np.int32)

    def advance(limit: int) -> None:
        nonlocal cache, counts
        together.state, cache, new = _steps(
            decoder,
            params,
            together.rows,
            together.state,
            drafter,
            draft_params,
            cache,
            proposer.number,
            np.array(limit, np.int32),
        )
        counts = counts + mesh_lib.fetched(new)

    found = batch.finish(together, advance, stops)
    return found, Stats(*counts.tolist())


def check(
    decoder: decode.Decoder,
    proposer: Draft | Lookup,
    prompt: Sequence[int],
    asked: options.Options,
) -> None:
    """Raises InputError where a request cannot be decoded with these proposals.

    As decode.check(); a model keeps no cache by position (an RNN), the vocabularies differ, prompt,
    text and proposals exceed a context, or the prompt's own log-probs or guidance are asked for.
    """
    number = proposer.number
    errors.require(number > 0, f'speculative decoding proposes a token or more, not {number}')
    errors.require(not asked.echo, 'echo goes without speculative decoding')
    errors.require(not asked.guided, 'guidance_scale goes without speculative decoding')
    for one in [decoder, proposer.decoder] if isinstance(proposer, Draft) else [decoder]:
        errors.require(
            one.has_slots,
            f'speculative decoding takes tokens back, which a {one.model.config.family} cannot',
        )
        errors.require(
            one.n_vocab == decoder.n_vocab,
            f'the draft has a vocabulary of {one.n_vocab} ids, the model of {decoder.n_vocab}; use '
            'one of the same tokenizer',
        )
        limit = decode.check(one, prompt, asked)
        errors.require(
            limit + number <= one.most_tokens,
            f'{limit} tokens and {number} proposals do not fit n_ctx = {one.most_tokens}; lower '
            'max_new_tokens or decode without a draft',
        )


@functools.partial(jax.jit, static_argnames=('decoder', 'slots'))
def _read(decoder: decode.Decoder, params: Any, state: decode.State, slots: int) -> Any:
    """The draft's cache with all tokens but the last of each row."""
    slots = min(slots, decoder.most_tokens)
    wide = min(slots, state.tokens_BxT.shape[1])
    place_1xL = jnp.arange(wide)[None]
    positions_BxL = jnp.where(place_1xL < state.length_B[:, None] - 1, place_1xL, -1)
    cache = decoder.empty_cache(len(state.length_B), slots)
    return decoder.extend(params, state.tokens_BxT[:, :wide], positions_BxL, cache)[1]


@functools.partial(
    jax.jit,
    static_argnames=('decoder', 'drafter', 'number'),
    donate_argnames=('state', 'draft_cache'),
)
def _steps(
    decoder: decode.Decoder,
    params: Any,
    rows: decode.Rows,
    state: decode.State,
    drafter: decode.Decoder | None,
    draft_params: Any,
    draft_cache: Any,
    number: int,
    limit: jax.Array,
) -> Any:
    """Passes until every running row has `limit` more tokens or has ended."""
    target_B = state.length_B + limit

    def running(state: decode.State) -> jax.Array:
        return (state.status_B == decode.RUNNING) & (state.length_B < target_B)

    def step(carry: tuple) -> Any:
        state, cache, counts = carry
        active_B = running(state)
        if drafter is None:
            proposed_BxJ, q_BxJxV = _look_up(state, number), None
        else:
            proposed_BxJ, q_BxJxV, cache = _propose(
                drafter, draft_params, rows, state, cache, number, active_B
            )
        state, accepted = _judge(decoder, params, rows, state, proposed_BxJ, q_BxJxV, active_B)
        rows_now = active_B.sum()
        return state, cache, counts + jnp.stack([rows_now, rows_now * number, accepted])

    carry = (state, draft_cache, jnp.zeros(3, jnp.int32))
    return jax.lax.while_loop(lambda carry: running(carry[0]).any(), step, carry)


def _look_up(state: decode.State, number: int) -> jax.Array:
    """What followed the latest place that matches the most of the last tokens."""
    tokens_BxT, length_B = state.tokens_BxT, state.length_B
    place_1xT = jnp.arange(tokens_BxT.shape[1])[None]
    match_BxT = jnp.zeros(tokens_BxT.shape, jnp.int32)
    same_BxT = jnp.ones(tokens_BxT.shape, bool)
    for back in range(_MATCH):
        last_Bx1 = jnp.take_along_axis(
            tokens_BxT, jnp.maximum(length_B - 1 - back, 0)[:, None], axis=1
        )
        at_BxT = jnp.roll(tokens_BxT, back, axis=1) == last_Bx1
        same_BxT &= at_BxT & (place_1xT >= back) & (place_1xT < length_B[:, None] - 1)
        match_BxT += same_BxT
    best_B = jnp.argmax(match_BxT * (tokens_BxT.shape[1] + 1) + place_1xT, axis=1)
    from_BxJ = best_B[:, None] + 1 + jnp.arange(number)[None]
    found_BxJ = jnp.take_along_axis(tokens_BxT, from_BxJ % tokens_BxT.shape[1], axis=1)
    return jnp.where(from_BxJ < length_B[:, None], found_BxJ, 0)


def _propose(
    drafter: decode.Decoder,
    params: Any,
    rows: decode.Rows,
    state: decode.State,
    cache: Any,
    number: int,
    active_B: jax.Array,
) -> Any:
    """(tokens_BxJ, their distributions (B, J, V), cache) of the draft model."""
    tokens_BxT, length_B = state.tokens_BxT, state.length_B
    index_B, found, probs = jnp.arange(len(length_B)), [], []
    # Two tokens at first: the last proposal, where it was accepted, is not in the draft's cache.
    place_Bx2 = length_B[:, None] - 2 + jnp.arange(2)[None]
    feed = jnp.take_along_axis(tokens_BxT, jnp.maximum(place_Bx2, 0), axis=1)
    where = jnp.where(active_B[:, None], place_Bx2, -1)
    for j in range(number):
        logits, cache = drafter.extend(params, feed, where, cache)
        logits_BxV = processors.process(
            logits[:, 0], tokens_BxT, length_B + j, rows.prompt_B, rows.settings
        )
        token_B, q_BxV = _pick(rows, logits_BxV, _noise(rows, length_B + j, 0))
        found.append(token_B)
        probs.append(q_BxV)
        tokens_BxT = tokens_BxT.at[index_B, length_B + j].set(token_B, mode='drop')
        feed = token_B[:, None]
        where = jnp.where(active_B[:, None], length_B[:, None] + j, -1)
    return jnp.stack(found, 1), jnp.stack(probs, 1), cache


def _judge(
    decoder: decode.Decoder,
    params: Any,
    rows: decode.Rows,
    state: decode.State,
    proposed_BxJ: jax.Array,
    q_BxJxV: jax.Array | None,
    active_B: jax.Array,
) -> Any:
    """The rows with what is accepted of the proposals and one token of the model's own."""
    number = proposed_BxJ.shape[1]
    length_B, index_B = state.length_B, jnp.arange(len(state.length_B))
    last_Bx1 = jnp.take_along_axis(state.tokens_BxT, jnp.maximum(length_B - 1, 0)[:, None], axis=1)
    feed_BxL = jnp.concatenate([last_Bx1, proposed_BxJ], axis=1)
    where_BxL = length_B[:, None] - 1 + jnp.arange(number + 1)[None]
    logits_BxLxV, cache = decoder.extend(
        params, feed_BxL, jnp.where(active_B[:, None], where_BxL, -1), state.cache, True
    )
    state = state._replace(cache=cache)
    n_accepted, going_B = jnp.zeros((), jnp.int32), active_B
    for j in range(number + 1):
        processed_BxV = processors.process(
            logits_BxLxV[:, j], state.tokens_BxT, length_B + j, rows.prompt_B, rows.settings
        )
        own_B, p_BxV = _pick(rows, processed_BxV, _noise(rows, length_B + j, 1))
        token_B, agreed_B = own_B, jnp.zeros(own_B.shape, bool)
        if j < number:
            guess_B = proposed_BxJ[:, j]
            q_BxV = jax.nn.one_hot(guess_B, p_BxV.shape[1]) if q_BxJxV is None else q_BxJxV[:, j]
            p_B, q_B = p_BxV[index_B, guess_B], q_BxV[index_B, guess_B]
            chance_B = jax.vmap(jax.random.uniform)(_noise(rows, length_B + j, 2))
            agreed_B = chance_B * q_B < p_B
            rest_BxV = jnp.log(jnp.maximum(p_BxV - q_BxV, 0))
            other_B = _pick(rows, rest_BxV, _noise(rows, length_B + j, 3))[0]
            token_B = jnp.where(agreed_B, guess_B, other_B)
        state = decode.append(decoder, rows, state, token_B, logits_BxLxV[:, j], going_B)
        n_accepted += (going_B & agreed_B).sum()
        going_B &= agreed_B & (state.status_B == decode.RUNNING)
    return state, n_accepted


def _pick(rows: decode.Rows, logits_BxV: jax.Array, keys_B: Any) -> Any:
    """(a token, the distribution it is of): drawn, or the most likely one."""
    best_B = jnp.argmax(logits_BxV, axis=-1)
    drawn_B = jax.vmap(jax.random.categorical)(keys_B, logits_BxV)
    sample_B = rows.settings.sample_B
    sure_BxV = jax.nn.one_hot(best_B, logits_BxV.shape[1])
    probs_BxV = jnp.where(sample_B[:, None], jax.nn.softmax(logits_BxV, axis=-1), sure_BxV)
    return jnp.where(sample_B, drawn_B, best_B).astype(jnp.int32), probs_BxV


def _noise(rows: decode.Rows, length_B: jax.Array, purpose: int) -> Any:
    """Random keys of every row for one place of its text."""
    keys_B = jax.vmap(jax.random.fold_in)(rows.key_B, length_B - rows.prompt_B)
    return jax.vmap(lambda key: jax.random.fold_in(key, purpose))(keys_B)
