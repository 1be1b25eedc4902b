# SPDX-License-Identifier: Apache-2.0
"""Prefill and decode: the two programs that all generation is made of.

A row is a prompt on its way to a text. Rows share nothing but the program: each has its own length,
options, end and random numbers, so that what it becomes does not depend on its neighbours.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from gptjax.configs import errors
from gptjax.models import heads
from gptjax.runtime import inventory
from gptjax.sampling import options, processors

_WIDTH = 32  # prompts and texts are made room for in multiples of it, doubling
RUNNING, STOP, LENGTH, FULL = range(4)  # FULL: the context is, though the text may go on
REASONS = {STOP: 'stop', LENGTH: 'length', FULL: 'length'}


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A language model as decoding uses it; programs are compiled for what is equal here.

    n_vocab: ids from here on are padding of the vocabulary, and never chosen.
    cache_dtype: 'int8' quantises keys and values; '' = the model's dtype.
    """

    model: heads.LanguageModel
    n_vocab: int
    cache_dtype: str = ''

    def __post_init__(self) -> None:
        errors.require_choice(self, 'cache_dtype', ('', 'int8'))
        errors.require(
            not self.cache_dtype or self.has_slots,
            f'a model of family {self.model.config.family!r} has no keys and values to quantise',
        )

    @property
    def most_tokens(self) -> int | None:
        """Tokens that can be read in one go; None = any number."""
        return self.model.config.most_tokens

    @property
    def has_slots(self) -> bool:
        """Whether the past is keys and values in slots, so that tokens can be taken back."""
        return self.model.config.has_slots

    def empty_cache(self, rows: int, slots: int) -> Any:
        """The past of rows that have read nothing."""
        return self.model.config.empty_cache(rows, slots, self.cache_dtype)

    def extend(
        self,
        params: Any,
        tokens_BxL: Any,
        positions_BxL: Any,
        cache: Any,
        every: bool = False,
        tree: Any = None,
    ) -> tuple[Float[Array, 'B _ V'], Any]:
        """(logits, cache) as LanguageModel.extend; of the real vocabulary."""
        logits, cache = self.model.apply(
            {'params': params}, tokens_BxL, positions_BxL, cache, every, tree, method='extend'
        )
        return logits[..., : self.n_vocab], cache


class Rows(NamedTuple):
    """What does not change while rows decode."""

    settings: processors.Settings
    prompt_B: Int[Array, ' B']  # tokens of the prompt
    limit_B: Int[Array, ' B']  # the most tokens, prompt included
    key_B: Any  # random key of each row
    guidance_H: Any = None  # scales of the first half; the second are their texts without prompts


class State(NamedTuple):
    """Rows on their way: T tokens of room each; the last token is not in the cache yet."""

    cache: Any
    tokens_BxT: Int[Array, 'B T']
    length_B: Int[Array, ' B']  # tokens so far
    offset_B: Int[Array, ' B']  # which token is at position 0: above 0 once the context slid
    status_B: Int[Array, ' B']
    logprob_BxT: Float[Array, 'B T']  # of each token given those before, by the model itself
    top_logprob_BxTxN: Float[Array, 'B T N']
    top_token_BxTxN: Int[Array, 'B T N']


class Text(NamedTuple):
    """What became of a row. log-probs are the model's own, in nats, before any processor."""

    tokens: list[int]  # of the text alone, an end token included
    reason: str  # stop (an end token or a stop string) or length
    logprobs: list[float]
    top: list[dict[int, float]]  # of every token the most likely alternatives; [] = not asked for
    prompt_logprobs: list[float]  # of the prompt's tokens but the first; [] = not asked for
    prompt_top: list[dict[int, float]]
    score: float  # the sum of the log-probs; in beam search, what beams were ranked by


def width(tokens: int, most: int | None = None) -> int:
    """Room for so many tokens, of few sizes: 32, 64, 96, 128, 192, 256, 384, 512, ..."""
    size = _WIDTH
    while size < tokens:
        size += max(_WIDTH, (1 << (size.bit_length() - 1)) // 2)
    return size if most is None else min(size, most)


def keys(seeds: Sequence[int], copies: Sequence[int]) -> Any:
    """Random keys of texts, from their requests' seeds and which text of its request each is."""
    return _keys(np.array(seeds, np.uint32), np.array(copies, np.uint32))


@jax.jit
def _keys(seeds_B: jax.Array, copies_B: jax.Array) -> Any:
    return jax.vmap(lambda s, c: jax.random.fold_in(jax.random.key(s), c))(seeds_B, copies_B)


def empty(decoder: Decoder, rows: int, room: int, context: int, n_top: int) -> State:
    """State of rows that do nothing: T = room tokens, of which `context` are seen at a time.

    Raises:
      UsageError: it is larger than the memory.
    """
    made = functools.partial(_empty, decoder, rows, room, context, n_top)
    wanted = jax.tree.leaves(jax.eval_shape(made))
    inventory.check_room(
        sum(x.size * x.dtype.itemsize for x in wanted),
        f'decoding {rows} texts of up to {room} tokens',
        'Lower --config.engine.slots and max_tokens, or the tokens and texts that are asked for',
    )
    return made()


def _empty(decoder: Decoder, rows: int, room: int, context: int, n_top: int) -> State:
    return State(
        decoder.empty_cache(rows, context),
        jnp.zeros((rows, room), jnp.int32),
        jnp.zeros(rows, jnp.int32),
        jnp.zeros(rows, jnp.int32),
        jnp.full(rows, LENGTH, jnp.int32),
        jnp.zeros((rows, room)),
        jnp.zeros((rows, room, n_top)),
        jnp.zeros((rows, room, n_top), jnp.int32),
    )


@functools.partial(jax.jit, static_argnames=('decoder', 'echo'), donate_argnames=('state',))
def prefill(
    decoder: Decoder,
    params: Any,
    rows: Rows,
    state: State,
    tokens_BxL: Int[Array, 'B L'],
    start_B: Int[Array, ' B'],
    count_B: Int[Array, ' B'],
    last_B: Bool[Array, ' B'],
    echo: bool = False,
) -> State:
    """Reads part of the prompts; rows whose last part it was get their first token.

    Args:
      tokens_BxL: tokens of each row, padded on the right.
      start_B: position of the first of them.
      count_B: how many there are; 0 leaves a row alone.
      last_B: whether the prompt ends with them.
      echo: keep their log-probs.
    """
    place_1xL = jnp.arange(tokens_BxL.shape[1])[None]
    real_BxL = place_1xL < count_B[:, None]
    positions_BxL = jnp.where(real_BxL, start_B[:, None] + place_1xL, -1)
    logits, cache = decoder.extend(params, tokens_BxL, positions_BxL, state.cache, echo)
    room = state.tokens_BxT.shape[1]
    into_BxL = jnp.where(real_BxL, positions_BxL + state.offset_B[:, None], room)
    rows_Bx1 = jnp.arange(len(tokens_BxL))[:, None]
    state = state._replace(
        cache=cache,
        tokens_BxT=state.tokens_BxT.at[rows_Bx1, into_BxL].set(tokens_BxL, mode='drop'),
        length_B=jnp.maximum(
            state.length_B, jnp.where(count_B > 0, state.offset_B + start_B + count_B, 0)
        ),
    )
    if echo:
        real = real_BxL[:, 1:]
        into = jnp.where(real, into_BxL[:, 1:], state.tokens_BxT.shape[1])
        state = _record(state, rows_Bx1, into, logits[:, :-1], tokens_BxL[:, 1:])
        last_Bx1x1 = jnp.maximum(count_B - 1, 0)[:, None, None]
        logits = jnp.take_along_axis(logits, last_Bx1x1, axis=1)
    return _choose(decoder, rows, state, logits[:, 0], (count_B > 0) & last_B)


@functools.partial(jax.jit, static_argnames='decoder', donate_argnames=('state',))
def steps(decoder: Decoder, params: Any, rows: Rows, state: State, number: Int[Array, '']) -> State:
    """Up to `number` more tokens in every row that is running."""

    def go_on(carry: tuple) -> jax.Array:
        done, state = carry
        return (done < number) & jnp.any(state.status_B == RUNNING)

    def step(carry: tuple) -> tuple:
        done, state = carry
        running_B = state.status_B == RUNNING
        last_Bx1 = state.length_B[:, None] - 1
        token_Bx1 = jnp.take_along_axis(state.tokens_BxT, jnp.maximum(last_Bx1, 0), axis=1)
        position_Bx1 = jnp.where(running_B[:, None], last_Bx1 - state.offset_B[:, None], -1)
        logits_Bx1xV, cache = decoder.extend(params, token_Bx1, position_Bx1, state.cache)
        state = state._replace(cache=cache)
        return done + 1, _choose(decoder, rows, state, logits_Bx1xV[:, 0], running_B)

    return jax.lax.while_loop(go_on, step, (jnp.zeros((), jnp.int32), state))[1]


def _choose(
    decoder: Decoder, rows: Rows, state: State, logits_BxV: jax.Array, active_B: jax.Array
) -> State:
    """The active rows with one more token each."""
    token_B = draw(rows, state.tokens_BxT, state.length_B, logits_BxV)
    return append(decoder, rows, state, token_B, logits_BxV, active_B)


def draw(
    rows: Rows, tokens_BxT: jax.Array, length_B: jax.Array, logits_BxV: jax.Array
) -> Int[Array, ' B']:
    """The next token of every row: the most likely one, or drawn."""
    if rows.guidance_H is not None:
        logits_BxV = jnp.tile(_guided(logits_BxV, rows.guidance_H), (2, 1))
    logits_BxV = processors.process(logits_BxV, tokens_BxT, length_B, rows.prompt_B, rows.settings)
    best_B = jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)

    def drawn(_: Any) -> jax.Array:
        keys_B = jax.vmap(jax.random.fold_in)(rows.key_B, length_B - rows.prompt_B)
        drawn_B = jax.vmap(jax.random.categorical)(keys_B, logits_BxV).astype(jnp.int32)
        return jnp.where(rows.settings.sample_B, drawn_B, best_B)

    token_B = jax.lax.cond(rows.settings.sample_B.any(), drawn, lambda _: best_B, None)
    return token_B if rows.guidance_H is None else jnp.tile(jnp.split(token_B, 2)[0], 2)


def _guided(logits_BxV: jax.Array, guidance_H: jax.Array) -> Float[Array, 'H V']:
    """Log-probs moved from those without the prompt (Sanchez et al. 2023), as transformers'."""
    log_HxV, free_HxV = jnp.split(jax.nn.log_softmax(logits_BxV, axis=-1), 2)
    scale_Hx1 = guidance_H[:, None]
    guided_HxV = scale_Hx1 * (log_HxV - free_HxV) + free_HxV
    return jnp.where(scale_Hx1 == 1, logits_BxV[: len(guidance_H)], guided_HxV)


def append(
    decoder: Decoder,
    rows: Rows,
    state: State,
    token_B: jax.Array,
    logits_BxV: jax.Array,
    active_B: jax.Array,
) -> State:
    """The active rows with a given next token, its log-prob, and whether it ends them."""
    slot_B = jnp.where(active_B, state.length_B, state.tokens_BxT.shape[1])
    index_B = jnp.arange(len(token_B))
    state = state._replace(
        tokens_BxT=state.tokens_BxT.at[index_B, slot_B].set(token_B, mode='drop')
    )
    state = _record(state, index_B[:, None], slot_B[:, None], logits_BxV[:, None], token_B[:, None])
    length_B = state.length_B + active_B
    ended_B = (token_B[:, None] == rows.settings.end_BxE).any(axis=1)
    status_B = jnp.where(length_B >= rows.limit_B, LENGTH, RUNNING)
    if decoder.most_tokens is not None:
        full_B = length_B - state.offset_B > decoder.most_tokens
        status_B = jnp.where((status_B == RUNNING) & full_B, FULL, status_B)
    status_B = jnp.where(ended_B, STOP, status_B)
    return state._replace(length_B=length_B, status_B=jnp.where(active_B, status_B, state.status_B))


def _record(
    state: State,
    rows_Bx1: jax.Array,
    into_BxL: jax.Array,
    logits_BxLxV: jax.Array,
    tokens_BxL: jax.Array,
) -> State:
    """Log-probs of tokens, and of the most likely ones, written to their places."""
    total_BxL = jax.nn.logsumexp(logits_BxLxV, axis=-1)
    chosen_BxL = jnp.take_along_axis(logits_BxLxV, tokens_BxL[..., None], axis=-1)[..., 0]
    state = state._replace(
        logprob_BxT=state.logprob_BxT.at[rows_Bx1, into_BxL].set(
            chosen_BxL - total_BxL, mode='drop'
        )
    )
    n_top = state.top_token_BxTxN.shape[2]
    if not n_top:
        return state
    best_BxLxN, token_BxLxN = jax.lax.top_k(logits_BxLxV, min(n_top, logits_BxLxV.shape[-1]))
    spare = ((0, 0), (0, 0), (0, n_top - best_BxLxN.shape[2]))
    best_BxLxN = jnp.pad(best_BxLxN - total_BxL[..., None], spare, constant_values=-jnp.inf)
    return state._replace(
        top_logprob_BxTxN=state.top_logprob_BxTxN.at[rows_Bx1, into_BxL].set(
            best_BxLxN, mode='drop'
        ),
        top_token_BxTxN=state.top_token_BxTxN.at[rows_Bx1, into_BxL].set(
            jnp.pad(token_BxLxN, spare), mode='drop'
        ),
    )


def check(decoder: Decoder, prompt: Sequence[int], asked: options.Options) -> int:
    """The most tokens that prompt and text will have.

    Raises:
      InputError: the prompt is empty, it or an option has ids beyond the vocabulary, or it does not
        fit the context.
    """
    if not len(prompt):
        raise errors.InputError('a prompt is empty; begin one with end-of-text instead')
    if min(prompt) < 0 or max(prompt) >= decoder.n_vocab:
        raise errors.InputError(
            f'a prompt has a token outside the vocabulary: ids are from 0 to {decoder.n_vocab - 1}'
        )
    for name, ids in asked.named():
        errors.require(
            max(ids) < decoder.n_vocab,
            f'{name} names token {max(ids)}, not below the vocabulary size {decoder.n_vocab}',
        )
    limit, most = asked.limit(len(prompt)), decoder.most_tokens
    errors.require(
        not asked.echo or most is None or len(prompt) <= most,
        f'echo is for prompts that fit the context; this one has {len(prompt)} tokens, {most} fit',
    )
    if most is not None and limit > most and asked.beyond_context == 'error':
        raise errors.InputError(
            f'a prompt of {len(prompt)} tokens and {limit - len(prompt)} new ones do not fit '
            f'n_ctx = {most}; shorten the prompt, lower max_new_tokens, or set '
            "beyond_context='slide' to go on with the last half of the window"
        )
    return limit


def read_last(tokens: np.ndarray, most: int | None) -> int:
    """How many of the first tokens fall out of a context that has no room for another one."""
    return 0 if most is None or len(tokens) <= most else len(tokens) - max(1, most // 2)


def text_of(state: State, b: int, prompt: int, asked: options.Options) -> Text:
    """Row b of a state that is on the host."""
    end = int(state.length_B[b])

    def most_likely(first: int, last: int) -> list[dict[int, float]]:
        if asked.logprobs <= 0:
            return []
        pairs = zip(
            state.top_token_BxTxN[b, first:last, : asked.logprobs].tolist(),
            state.top_logprob_BxTxN[b, first:last, : asked.logprobs].tolist(),
            strict=True,
        )
        real = [zip(*pair, strict=True) for pair in pairs]  # fewer in a tiny vocabulary
        return [{token: x for token, x in pair if x > -math.inf} for pair in real]

    return Text(
        state.tokens_BxT[b, prompt:end].tolist(),
        REASONS.get(int(state.status_B[b]), ''),
        state.logprob_BxT[b, prompt:end].tolist(),
        most_likely(prompt, end),
        state.logprob_BxT[b, 1:prompt].tolist() if asked.echo else [],
        most_likely(1, prompt) if asked.echo else [],
        float(state.logprob_BxT[b, prompt:end].sum()),
    )


def cut(text: Text, kept: int) -> Text:
    """The first tokens of a text that a stop string ended."""
    return text._replace(
        tokens=text.tokens[:kept],
        logprobs=text.logprobs[:kept],
        top=text.top[:kept],
        reason='stop',
        score=sum(text.logprobs[:kept]),
    )
