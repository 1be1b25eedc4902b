# SPDX-License-Identifier: Apache-2.0
"""What is done to next-token logits before one is chosen, in transformers' order:

biases (sequence_bias, logit_bias, bad_words_ids), repetition_penalty, presence and frequency
penalties (OpenAI's formula; not in transformers), no_repeat_ngram_size, min_length with
min_new_tokens, and where tokens are drawn temperature, top_k, top_p, min_p, typical_p.

Options are arrays, one value a row, so that the rows of a batch may differ without recompiling;
what no row asks for is skipped when the program runs. Text is tokens_BxT, of which each row's first
length_B are real: nothing ever looks at the others.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from gptjax.sampling import options

_BITS = 32  # of a float's rank


class Settings(NamedTuple):
    """The options of B rows: W biased sequences of up to S tokens, right behind -1s; E ends."""

    sample_B: Bool[Array, ' B']
    temperature_B: Float[Array, ' B']
    top_k_B: Int[Array, ' B']
    top_p_B: Float[Array, ' B']
    min_p_B: Float[Array, ' B']
    typical_p_B: Float[Array, ' B']
    keep_B: Int[Array, ' B']  # no filter leaves fewer tokens
    repetition_B: Float[Array, ' B']
    presence_B: Float[Array, ' B']
    frequency_B: Float[Array, ' B']
    ngram_B: Int[Array, ' B']
    min_length_B: Int[Array, ' B']
    end_BxE: Int[Array, 'B E']
    words_BxWxS: Int[Array, 'B W S']
    bias_BxW: Float[Array, 'B W']


def settings(
    asked: Sequence[options.Options],
    prompts: Sequence[int],
    room: tuple[int, int, int] = (0, 0, 0),
) -> Settings:
    """numpy Settings of requests; E, W and S grow in few steps, so that few programs are compiled.

    Args:
      prompts: tokens of each prompt.
      room: at least these E, W and S.
    """
    biases = [one.biases() for one in asked]
    words = [words for found in biases for words, _ in found]
    ends, width, longest = (
        max(least, _bucket(needed, start))
        for least, needed, start in zip(
            room,
            (
                max((len(one.eos_token_id) for one in asked), default=0),
                max(map(len, biases), default=0),
                max(map(len, words), default=0),
            ),
            (4, 8, 8),
            strict=True,
        )
    )
    words_BxWxS = np.full((len(asked), width, longest), -1, np.int32)
    bias_BxW = np.zeros((len(asked), width), np.float32)
    end_BxE = np.full((len(asked), ends), -1, np.int32)
    for b, (one, found) in enumerate(zip(asked, biases, strict=True)):
        end_BxE[b, : len(one.eos_token_id)] = one.eos_token_id
        for w, (ids, bias) in enumerate(found):
            words_BxWxS[b, w, longest - len(ids) :] = ids
            bias_BxW[b, w] = bias

    def column(name: str, dtype: type) -> np.ndarray:
        return np.array([getattr(one, name) for one in asked], dtype)

    least = [
        max(one.min_length, prompt + one.min_new_tokens if one.min_new_tokens else 0)
        for one, prompt in zip(asked, prompts, strict=True)
    ]
    keep = [1 if one.num_beams == 1 else max(2, 1 + len(one.eos_token_id)) for one in asked]
    return Settings(
        column('samples', bool),
        column('temperature', np.float32),
        column('top_k', np.int32),
        column('top_p', np.float32),
        column('min_p', np.float32),
        column('typical_p', np.float32),
        np.array(keep, np.int32),
        column('repetition_penalty', np.float32),
        column('presence_penalty', np.float32),
        column('frequency_penalty', np.float32),
        column('no_repeat_ngram_size', np.int32),
        np.array(least, np.int32),
        end_BxE,
        words_BxWxS,
        bias_BxW,
    )


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
    n_vocab = logits_BxV.shape[1]
    x = logits_BxV

    def given(
        active_B: jax.Array, change: Callable[[jax.Array], jax.Array], x: jax.Array
    ) -> jax.Array:
        """The rows in which it is active changed; skipped where there is none."""
        changed = lambda x: jnp.where(active_B[:, None], change(x), x)  # noqa: E731
        return jax.lax.cond(active_B.any(), changed, lambda x: x, x)

    x = given(
        (rows.words_BxWxS >= 0).any((1, 2)),
        lambda x: x + _biases(tokens_BxT, length_B, rows, n_vocab),
        x,
    )
    x = given(
        rows.repetition_B != 1,
        lambda x: repetition(x, _counts(tokens_BxT, 0, length_B, n_vocab), rows.repetition_B),
        x,
    )
    x = given(
        (rows.presence_B != 0) | (rows.frequency_B != 0),
        lambda x: occurrence(
            x, _counts(tokens_BxT, prompt_B, length_B, n_vocab), rows.presence_B, rows.frequency_B
        ),
        x,
    )
    x = given(
        rows.ngram_B > 0,
        lambda x: jnp.where(_repeats(tokens_BxT, length_B, rows.ngram_B, n_vocab), -jnp.inf, x),
        x,
    )
    x = given(
        length_B < rows.min_length_B,
        lambda x: jnp.where(_ends(rows.end_BxE, n_vocab), -jnp.inf, x),
        x,
    )
    x = given(
        rows.sample_B & (rows.temperature_B != 1), lambda x: x / rows.temperature_B[:, None], x
    )
    x = given(
        rows.sample_B & (rows.top_k_B > 0),
        lambda x: top_k(x, jnp.maximum(rows.top_k_B, rows.keep_B)),
        x,
    )
    x = given(rows.sample_B & (rows.top_p_B < 1), lambda x: top_p(x, rows.top_p_B, rows.keep_B), x)
    x = given(rows.sample_B & (rows.min_p_B > 0), lambda x: min_p(x, rows.min_p_B, rows.keep_B), x)
    return given(
        rows.sample_B & (rows.typical_p_B < 1),
        lambda x: typical_p(x, rows.typical_p_B, rows.keep_B),
        x,
    )


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


def top_k(logits_BxV: Float[Array, 'B V'], k_B: Int[Array, ' B']) -> Float[Array, 'B V']:
    """Keeps the k most likely tokens (Fan et al. 2018), and what ties with the last of them."""
    zero_B = jnp.zeros(k_B.shape)
    return _keep(logits_BxV, logits_BxV, jnp.zeros_like(logits_BxV), zero_B, k_B)


def top_p(
    logits_BxV: Float[Array, 'B V'], p_B: Float[Array, ' B'], keep_B: Int[Array, ' B']
) -> Float[Array, 'B V']:
    """Keeps the fewest tokens whose probabilities reach p (nucleus; Holtzman et al. 2020, 3.1)."""
    probs_BxV = jax.nn.softmax(logits_BxV, axis=-1)
    return _keep(logits_BxV, logits_BxV, probs_BxV, p_B, keep_B)


def min_p(
    logits_BxV: Float[Array, 'B V'], p_B: Float[Array, ' B'], keep_B: Int[Array, ' B']
) -> Float[Array, 'B V']:
    """Keeps the tokens at least p times as likely as the likeliest (Nguyen et al. 2024)."""
    probs_BxV = jax.nn.softmax(logits_BxV, axis=-1)
    likely_BxV = probs_BxV >= p_B[:, None] * probs_BxV.max(axis=-1, keepdims=True)
    few_BxV = jnp.isfinite(top_k(logits_BxV, keep_B))
    return jnp.where(likely_BxV | few_BxV, logits_BxV, -jnp.inf)


def typical_p(
    logits_BxV: Float[Array, 'B V'], p_B: Float[Array, ' B'], keep_B: Int[Array, ' B']
) -> Float[Array, 'B V']:
    """Keeps the fewest tokens, the most typical first, that reach p (Meister et al. 2022)."""
    log_BxV = jax.nn.log_softmax(logits_BxV, axis=-1)
    probs_BxV = jnp.exp(log_BxV)
    entropy_Bx1 = -jnp.sum(jnp.where(probs_BxV > 0, probs_BxV * log_BxV, 0), -1, keepdims=True)
    near_BxV = -jnp.abs(-log_BxV - entropy_Bx1)
    return _keep(logits_BxV, near_BxV, probs_BxV, p_B, keep_B)


def _keep(
    logits_BxV: jax.Array,
    score_BxV: jax.Array,
    weight_BxV: jax.Array,
    mass_B: jax.Array,
    count_B: jax.Array,
) -> jax.Array:
    """Keeps the best by score: the fewest whose weights reach a mass, at least so many.

    The score to keep from is found by halving, bit by bit of its rank among floats: exact, without
    sorting the vocabulary.
    """
    count_B = jnp.minimum(count_B, logits_BxV.shape[1])
    mass_B = jnp.minimum(mass_B, weight_BxV.sum(axis=-1) * (1 - 1e-6))  # p = 1 is reached, too
    rank_BxV = _rank(score_BxV)

    def narrow(i: Any, found_B: jax.Array) -> jax.Array:
        tried_B = found_B | (jnp.uint32(1) << (_BITS - 1 - i).astype(jnp.uint32))
        in_BxV = rank_BxV >= tried_B[:, None]
        enough_B = (jnp.where(in_BxV, weight_BxV, 0).sum(axis=-1) >= mass_B) & (
            in_BxV.sum(axis=-1) >= count_B
        )
        return jnp.where(enough_B, tried_B, found_B)

    first_B = jax.lax.fori_loop(0, _BITS, narrow, jnp.zeros(count_B.shape, jnp.uint32))
    return jnp.where(rank_BxV >= first_B[:, None], logits_BxV, -jnp.inf)


def _rank(x: jax.Array) -> jax.Array:
    """uint32 in the order of float32s."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


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
    tokens_BxT: jax.Array, length_B: jax.Array, size_B: jax.Array, n_vocab: int
) -> jax.Array:
    """Which tokens would complete an n-gram that the text has already."""
    place_T = jnp.arange(tokens_BxT.shape[1])

    def compare(back: jax.Array, same_BxT: jax.Array) -> jax.Array:
        """Whether the token `back + 1` before a place is the one that far back from the end."""
        mine_Bx1 = jnp.take_along_axis(
            tokens_BxT, jnp.maximum(length_B - 1 - back, 0)[:, None], axis=1
        )
        theirs_BxT = tokens_BxT[:, jnp.maximum(place_T - 1 - back, 0)]
        equal_BxT = (theirs_BxT == mine_Bx1) & (place_T - 1 - back >= 0)[None]
        return same_BxT & (equal_BxT | (back >= size_B - 1)[:, None])

    known_BxT = place_T[None] < length_B[:, None]
    known_BxT = jax.lax.fori_loop(0, size_B.max() - 1, compare, known_BxT)
    known_BxT &= (length_B + 1 >= size_B)[:, None]
    rows_Bx1 = jnp.arange(len(tokens_BxT))[:, None]
    zeros_BxV = jnp.zeros((len(tokens_BxT), n_vocab), bool)
    return zeros_BxV.at[rows_Bx1, tokens_BxT].max(known_BxT)


def _ends(end_BxE: jax.Array, n_vocab: int) -> jax.Array:
    """Which tokens end a row; a -1 is none."""
    rows_Bx1 = jnp.arange(len(end_BxE))[:, None]
    place_BxE = jnp.where(end_BxE < 0, n_vocab, end_BxE)
    return jnp.zeros((len(end_BxE), n_vocab), bool).at[rows_Bx1, place_BxE].set(True, mode='drop')
