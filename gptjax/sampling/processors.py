# SPDX-License-Identifier: Apache-2.0
"""What is done to next-token logits before one is chosen, in transformers' order:

biases (sequence_bias, logit_bias, bad_words_ids), encoder_repetition_penalty, repetition_penalty,
presence and frequency penalties (OpenAI's formula; not in transformers), no_repeat_ngram_size,
encoder_no_repeat_ngram_size, min_length with min_new_tokens, forced_bos_token_id,
forced_eos_token_id, remove_invalid_values, exponential_decay_length_penalty, suppress_tokens,
begin_suppress_tokens; where tokens are drawn temperature and the filters of filters.py; at last
renormalize_logits. guidance_scale stands before them all, in decode.py: it needs a second text.

Options are arrays, one value a row, so that the rows of a batch may differ without recompiling;
what no row asks for is skipped when the program runs. Text is tokens_BxT, of which each row's first
length_B are real: nothing ever looks at the others. An encoder's text is the prompt.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from gptjax.sampling import filters, options

_COLUMNS = {  # one value a row, as the option has it
    'sample_B': ('samples', bool),
    'temperature_B': ('temperature', np.float32),
    'top_h_B': ('top_h', np.float32),
    'top_k_B': ('top_k', np.int32),
    'top_p_B': ('top_p', np.float32),
    'min_p_B': ('min_p', np.float32),
    'typical_p_B': ('typical_p', np.float32),
    'epsilon_B': ('epsilon_cutoff', np.float32),
    'eta_B': ('eta_cutoff', np.float32),
    'repetition_B': ('repetition_penalty', np.float32),
    'presence_B': ('presence_penalty', np.float32),
    'frequency_B': ('frequency_penalty', np.float32),
    'ngram_B': ('no_repeat_ngram_size', np.int32),
    'encoder_ngram_B': ('encoder_no_repeat_ngram_size', np.int32),
    'bos_B': ('forced_bos_token_id', np.int32),
    'finite_B': ('remove_invalid_values', bool),
    'normalise_B': ('renormalize_logits', bool),
}
_LISTS = {
    'forced_BxI': 'forced_eos_token_id',
    'suppress_BxI': 'suppress_tokens',
    'begin_BxI': 'begin_suppress_tokens',
}
_MOST_POWER = 80.0  # e to it is a float32
_Change = tuple[jax.Array, Callable[[jax.Array], jax.Array]]  # in which rows, and which


class Settings(NamedTuple):
    """The options of B rows: E ends, lists of I tokens, W biased sequences of up to S tokens.

    Ends and lists are followed by -1s, biased sequences stand right behind them.
    """

    sample_B: Bool[Array, ' B']
    temperature_B: Float[Array, ' B']
    top_h_B: Float[Array, ' B']
    top_k_B: Int[Array, ' B']
    top_p_B: Float[Array, ' B']
    min_p_B: Float[Array, ' B']
    typical_p_B: Float[Array, ' B']
    epsilon_B: Float[Array, ' B']
    eta_B: Float[Array, ' B']
    keep_B: Int[Array, ' B']  # no filter but top_h leaves fewer tokens
    encoder_repetition_B: Float[Array, ' B']  # what divides, so the option's inverse
    repetition_B: Float[Array, ' B']
    presence_B: Float[Array, ' B']
    frequency_B: Float[Array, ' B']
    ngram_B: Int[Array, ' B']
    encoder_ngram_B: Int[Array, ' B']
    min_length_B: Int[Array, ' B']
    bos_B: Int[Array, ' B']  # follows a prompt of one token; -1 = none
    last_B: Int[Array, ' B']  # the length at which one of forced_BxI follows
    forced_BxI: Int[Array, 'B I']
    finite_B: Bool[Array, ' B']
    decay_B: Float[Array, ' B']  # the logarithm of the factor
    decay_start_B: Int[Array, ' B']  # the length beyond which it grows
    suppress_BxI: Int[Array, 'B I']
    begin_B: Int[Array, ' B']  # the length at which none of begin_BxI follows
    begin_BxI: Int[Array, 'B I']
    normalise_B: Bool[Array, ' B']
    end_BxE: Int[Array, 'B E']
    words_BxWxS: Int[Array, 'B W S']
    bias_BxW: Float[Array, 'B W']

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """E, I, W and S."""
        return self.end_BxE.shape[1], self.begin_BxI.shape[1], *self.words_BxWxS.shape[1:]


def settings(
    asked: Sequence[options.Options],
    prompts: Sequence[int],
    limits: Sequence[int],
    room: tuple[int, int, int, int] = (0, 0, 0, 0),
) -> Settings:
    """numpy Settings of requests; E, I, W, S grow in few steps, so that few programs are compiled.

    Args:
      prompts: tokens of each prompt.
      limits: the most tokens of each prompt and its text.
      room: at least these E, I, W and S.
    """

    biases = [one.biases() for one in asked]
    needed = (
        _longest(asked, 'eos_token_id'),
        _longest(asked, *_LISTS.values()),
        max(map(len, biases), default=0),
        max((len(words) for found in biases for words, _ in found), default=0),
    )
    n_ends, n_listed, n_words, size = (
        max(least, _bucket(number, start))
        for least, number, start in zip(room, needed, (4, 4, 8, 8), strict=True)
    )
    words_BxWxS = np.full((len(asked), n_words, size), -1, np.int32)
    bias_BxW = np.zeros((len(asked), n_words), np.float32)
    for b, found in enumerate(biases):
        for w, (ids, bias) in enumerate(found):
            words_BxWxS[b, w, size - len(ids) :] = ids
            bias_BxW[b, w] = bias
    pairs = list(zip(asked, prompts, strict=True))
    least = [
        max(one.min_length, prompt + one.min_new_tokens if one.min_new_tokens else 0)
        for one, prompt in pairs
    ]
    begin = [n + (n == 1 and one.forced_bos_token_id >= 0) for one, n in pairs]  # behind a forced
    keep = [1 if one.num_beams == 1 else max(2, 1 + len(one.eos_token_id)) for one in asked]
    decays = [one.exponential_decay_length_penalty or (0, 1.0) for one in asked]
    inverse = [1 / one.encoder_repetition_penalty for one in asked]
    return Settings(
        **{field: _column(asked, *of) for field, of in _COLUMNS.items()},
        **{field: _list(asked, name, n_listed) for field, name in _LISTS.items()},
        keep_B=np.array(keep, np.int32),
        encoder_repetition_B=np.array(inverse, np.float32),
        min_length_B=_int32(least),
        last_B=np.array(limits, np.int32) - 1,
        decay_B=np.array([math.log(factor) for _, factor in decays], np.float32),
        decay_start_B=_int32([n + start for n, (start, _) in zip(prompts, decays, strict=True)]),
        begin_B=np.array(begin, np.int32),
        end_BxE=_list(asked, 'eos_token_id', n_ends),
        words_BxWxS=words_BxWxS,
        bias_BxW=bias_BxW,
    )


def _int32(numbers: Sequence[float]) -> np.ndarray:
    """Lengths, of which the largest stand for those that no text has."""
    return np.array([min(n, 2**31 - 1) for n in numbers], np.int32)


def _column(asked: Sequence[options.Options], name: str, dtype: type) -> np.ndarray:
    """One value a row."""
    return np.array([getattr(one, name) for one in asked], dtype)


def _list(asked: Sequence[options.Options], name: str, width: int) -> np.ndarray:
    """A list a row, filled up with -1s."""
    found = np.full((len(asked), width), -1, np.int32)
    for b, one in enumerate(asked):
        found[b, : len(getattr(one, name))] = getattr(one, name)
    return found


def _longest(asked: Sequence[options.Options], *names: str) -> int:
    return max((len(getattr(one, name)) for one in asked for name in names), default=0)


def _bucket(needed: int, start: int) -> int:
    while start < needed:
        start *= 4
    return start


def process(
    logits_BxV: Float[Array, 'B V'],
    tokens_BxT: Int[Array, 'B T'],
    length_B: Int[Array, ' B'],
    prompt_B: Int[Array, ' B'],
    rows: Settings,
) -> Float[Array, 'B V']:
    """Logits from which to choose the next token; what must not be chosen is minus infinity.

    Args:
      length_B: tokens so far; prompt_B: how many of them are the prompt.
    """
    changes = _changes(tokens_BxT, length_B, prompt_B, rows, logits_BxV.shape[1])
    x = _applied(changes, logits_BxV)
    filtered = functools.partial(_applied, _filters(rows))
    x = jax.lax.cond(rows.sample_B.any(), filtered, lambda x: x, x)
    return _applied([(rows.normalise_B, lambda x: jax.nn.log_softmax(x, axis=-1))], x)


def _applied(changes: Sequence[_Change], x: jax.Array) -> jax.Array:
    """Logits after changes, one after the other; each is skipped where no row asks for it."""
    for active_B, change in changes:

        def changed(x: jax.Array, *, active_B: jax.Array, change: Callable) -> jax.Array:
            return jnp.where(active_B[:, None], change(x), x)

        made = functools.partial(changed, active_B=active_B, change=change)
        x = jax.lax.cond(active_B.any(), made, lambda x: x, x)
    return x


def _changes(
    tokens_BxT: jax.Array, length_B: jax.Array, prompt_B: jax.Array, rows: Settings, n_vocab: int
) -> list[_Change]:
    """Those that are made whether or not tokens are drawn."""

    def count(start_B: jax.Array | int, end_B: jax.Array) -> jax.Array:
        return _counts(tokens_BxT, start_B, end_B, n_vocab)

    def repeats(known_B: jax.Array, size_B: jax.Array) -> jax.Array:
        return _repeats(tokens_BxT, length_B, known_B, size_B, n_vocab)

    def without(x: jax.Array, ids_BxI: jax.Array) -> jax.Array:
        return jnp.where(_among(ids_BxI, n_vocab), -jnp.inf, x)

    def only(x: jax.Array, ids_BxI: jax.Array) -> jax.Array:
        return jnp.where(_among(ids_BxI, n_vocab), jnp.zeros_like(x), -jnp.inf)

    def some(ids_BxI: jax.Array) -> jax.Array:
        return (ids_BxI >= 0).any(axis=1)

    return [
        (
            (rows.words_BxWxS >= 0).any((1, 2)),
            lambda x: x + _biases(tokens_BxT, length_B, rows, n_vocab),
        ),
        (
            rows.encoder_repetition_B != 1,
            lambda x: repetition(x, count(0, prompt_B), rows.encoder_repetition_B),
        ),
        (
            rows.repetition_B != 1,
            lambda x: repetition(x, count(0, length_B), rows.repetition_B),
        ),
        (
            (rows.presence_B != 0) | (rows.frequency_B != 0),
            lambda x: occurrence(x, count(prompt_B, length_B), rows.presence_B, rows.frequency_B),
        ),
        (
            rows.ngram_B > 0,
            lambda x: jnp.where(repeats(length_B, rows.ngram_B), -jnp.inf, x),
        ),
        (
            rows.encoder_ngram_B > 0,
            lambda x: jnp.where(repeats(prompt_B, rows.encoder_ngram_B), -jnp.inf, x),
        ),
        (length_B < rows.min_length_B, lambda x: without(x, rows.end_BxE)),
        ((rows.bos_B >= 0) & (length_B == 1), lambda x: only(x, rows.bos_B[:, None])),
        (some(rows.forced_BxI) & (length_B == rows.last_B), lambda x: only(x, rows.forced_BxI)),
        (rows.finite_B, jnp.nan_to_num),
        (
            (rows.decay_B != 0) & (length_B > rows.decay_start_B),
            lambda x: jnp.where(
                _among(rows.end_BxE, n_vocab),
                decay(x, rows.decay_B, length_B - rows.decay_start_B),
                x,
            ),
        ),
        (some(rows.suppress_BxI), lambda x: without(x, rows.suppress_BxI)),
        (
            some(rows.begin_BxI) & (length_B == rows.begin_B),
            lambda x: without(x, rows.begin_BxI),
        ),
    ]


def _filters(rows: Settings) -> list[_Change]:
    """Those that are made where tokens are drawn."""
    keep_B = rows.keep_B
    changes = [
        (rows.temperature_B != 1, lambda x: x / rows.temperature_B[:, None]),
        (rows.top_h_B > 0, lambda x: filters.top_h(x, rows.top_h_B)),
        (rows.top_k_B > 0, lambda x: filters.top_k(x, jnp.maximum(rows.top_k_B, keep_B))),
        (rows.top_p_B < 1, lambda x: filters.top_p(x, rows.top_p_B, keep_B)),
        (rows.min_p_B > 0, lambda x: filters.min_p(x, rows.min_p_B, keep_B)),
        (rows.typical_p_B < 1, lambda x: filters.typical_p(x, rows.typical_p_B, keep_B)),
        (rows.epsilon_B > 0, lambda x: filters.epsilon(x, rows.epsilon_B, keep_B)),
        (rows.eta_B > 0, lambda x: filters.eta(x, rows.eta_B, keep_B)),
    ]
    return [(rows.sample_B & asked_B, change) for asked_B, change in changes]


def repetition(
    logits_BxV: Float[Array, 'B V'], counts_BxV: Int[Array, 'B V'], penalty_B: Float[Array, ' B']
) -> Float[Array, 'B V']:
    """CTRL's penalty (Keskar et al. 2019, 4.1), as all apply it: negative logits multiply."""
    penalty_Bx1 = penalty_B[:, None]
    less_BxV = jnp.where(logits_BxV < 0, logits_BxV * penalty_Bx1, logits_BxV / penalty_Bx1)
    return jnp.where(counts_BxV > 0, less_BxV, logits_BxV)


def occurrence(
    logits_BxV: Float[Array, 'B V'],
    counts_BxV: Int[Array, 'B V'],
    presence_B: Float[Array, ' B'],
    frequency_B: Float[Array, ' B'],
) -> Float[Array, 'B V']:
    """logit - [count > 0] presence - count frequency (OpenAI's API); counts in the new text."""
    present_BxV = (counts_BxV > 0) * presence_B[:, None]
    return logits_BxV - present_BxV - counts_BxV * frequency_B[:, None]


def decay(
    logits_BxV: Float[Array, 'B V'], log_factor_B: Float[Array, ' B'], beyond_B: Int[Array, ' B']
) -> Float[Array, 'B V']:
    """logit + |logit| (factor^n - 1), n tokens beyond the start; what is infinite stays so."""
    power_B = jnp.minimum(log_factor_B * beyond_B, _MOST_POWER)
    more_BxV = jnp.abs(logits_BxV) * jnp.expm1(power_B)[:, None]
    return jnp.where(jnp.isfinite(logits_BxV), logits_BxV + more_BxV, logits_BxV)


def _counts(
    tokens_BxT: jax.Array, start_B: jax.Array | int, length_B: jax.Array, n_vocab: int
) -> jax.Array:
    """How often each token occurs in the places from start to length."""
    place_1xT = jnp.arange(tokens_BxT.shape[1])[None]
    real_BxT = (place_1xT < length_B[:, None]) & (place_1xT >= jnp.reshape(start_B, (-1, 1)))
    rows_Bx1 = jnp.arange(len(tokens_BxT))[:, None]
    zeros_BxV = jnp.zeros((len(tokens_BxT), n_vocab), jnp.int32)
    return zeros_BxV.at[rows_Bx1, tokens_BxT].add(real_BxT.astype(jnp.int32))


def _biases(tokens_BxT: jax.Array, length_B: jax.Array, rows: Settings, n_vocab: int) -> jax.Array:
    """The sum of the biases of all sequences that one more token would complete."""
    ahead = rows.words_BxWxS.shape[2] - 1
    place_BxS = length_B[:, None] - ahead + jnp.arange(ahead)[None]
    before_BxS = jnp.take_along_axis(tokens_BxT, jnp.maximum(place_BxS, 0), axis=1)
    before_BxS = jnp.where(place_BxS >= 0, before_BxS, -2)  # no text there: nothing matches
    words_BxWxS, last_BxW = rows.words_BxWxS[:, :, :-1], rows.words_BxWxS[:, :, -1]
    match_BxW = ((words_BxWxS < 0) | (words_BxWxS == before_BxS[:, None])).all(axis=2)
    bias_BxW = jnp.where(match_BxW & (last_BxW >= 0), rows.bias_BxW, 0)
    zeros_BxV = jnp.zeros((len(tokens_BxT), n_vocab), jnp.float32)
    return zeros_BxV.at[jnp.arange(len(tokens_BxT))[:, None], last_BxW].add(bias_BxW)


def _repeats(
    tokens_BxT: jax.Array, length_B: jax.Array, known_B: jax.Array, size_B: jax.Array, n_vocab: int
) -> jax.Array:
    """Which tokens would complete an n-gram that the first known_B tokens have already."""
    place_T = jnp.arange(tokens_BxT.shape[1])
    size_B = jnp.minimum(size_B, len(place_T) + 2)  # longer than any text

    def compare(back: jax.Array, same_BxT: jax.Array) -> jax.Array:
        """Whether the token `back + 1` before a place is the one that far back from the end."""
        mine_Bx1 = jnp.take_along_axis(
            tokens_BxT, jnp.maximum(length_B - 1 - back, 0)[:, None], axis=1
        )
        theirs_BxT = tokens_BxT[:, jnp.maximum(place_T - 1 - back, 0)]
        equal_BxT = (theirs_BxT == mine_Bx1) & (place_T - 1 - back >= 0)[None]
        return same_BxT & (equal_BxT | (back >= size_B - 1)[:, None])

    known_BxT = place_T[None] < known_B[:, None]
    known_BxT = jax.lax.fori_loop(0, size_B.max() - 1, compare, known_BxT)
    known_BxT &= (length_B + 1 >= size_B)[:, None]
    rows_Bx1 = jnp.arange(len(tokens_BxT))[:, None]
    zeros_BxV = jnp.zeros((len(tokens_BxT), n_vocab), bool)
    return zeros_BxV.at[rows_Bx1, tokens_BxT].max(known_BxT)


def _among(ids_BxI: jax.Array, n_vocab: int) -> jax.Array:
    """Which tokens are in a row's list; a -1 is none."""
    rows_Bx1 = jnp.arange(len(ids_BxI))[:, None]
    place_BxI = jnp.where(ids_BxI < 0, n_vocab, ids_BxI)
    return jnp.zeros((len(ids_BxI), n_vocab), bool).at[rows_Bx1, place_BxI].set(True, mode='drop')
