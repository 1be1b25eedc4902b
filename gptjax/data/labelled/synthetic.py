# SPDX-License-Identifier: Apache-2.0
"""GPT-3's synthetic tasks, made exactly from a seed (Brown et al. 2020, 3.9.1, 3.9.2, 3.9.5).

Records are {'query', 'answer'}. The split 'train', from which examples are drawn, shares no query
with 'test'. Scrambled words want the 10,000 most frequent English words (wordfreq, extra `eval`).
"""

import functools
import random
from collections.abc import Callable
from typing import Any

from gptjax.configs import errors

Record = dict[str, Any]
_N_WORDS = 10_000  # most frequent ones, longer than 4 letters and shorter than 15 (section 3.9.2)
_ARITHMETIC, _SCRAMBLED = 2000, 10_000  # instances of a task, as in the paper


def records(name: str, split: str, seed: int) -> list[Record]:
    """The items of a task.

    Args:
      name: a key of TASKS.
      split: 'test', or 'train' for examples.

    Raises:
      InputError: scrambled words without the word list.
    """
    made = list(_made(name, seed))
    return made[: len(made) // 2] if split == 'test' else made[len(made) // 2 :]


@functools.lru_cache
def _made(name: str, seed: int) -> tuple[Record, ...]:
    """Twice as many items as the paper has where there are so many, no query twice."""
    make, count = TASKS[name]
    rng = random.Random(f'{name} {seed}')
    found: dict[str, str] = {}
    for _ in range(20 * count):
        if len(found) == 2 * count:
            break
        query, answer = make(rng)
        found.setdefault(query, answer)
    return tuple({'query': query, 'answer': answer} for query, answer in found.items())


def _sum(digits: int, sign: str) -> Callable[[random.Random], tuple[str, str]]:
    """Operands uniform in [0, 10^digits)."""

    def make(rng: random.Random) -> tuple[str, str]:
        a, b = rng.randrange(10**digits), rng.randrange(10**digits)
        answer = {'plus': a + b, 'minus': a - b, 'times': a * b}[sign]
        return f'What is {a} {sign} {b}?', str(answer)

    return make


def _composite(rng: random.Random) -> tuple[str, str]:
    """Three digits, parentheses around the first two, as in OpenAI's published file."""
    a, b, c = (rng.randrange(10) for _ in range(3))
    one, other = rng.choice('+-*'), rng.choice('+-*')
    apply = {'+': int.__add__, '-': int.__sub__, '*': int.__mul__}
    return f'What is ({a} {one} {b}) {other} {c}?', str(apply[other](apply[one](a, b), c))


def _scrambled(
    scramble: Callable[[random.Random, str], str],
) -> Callable[[random.Random], tuple[str, str]]:
    def make(rng: random.Random) -> tuple[str, str]:
        for _ in range(1000):  # some words cannot be scrambled so, some draws do not
            word = rng.choice(words())
            scrambled = scramble(rng, word)
            if scrambled != word:
                break
        return scrambled, word

    return make


def cycled(rng: random.Random, word: str) -> str:
    """CL: letters cycled by a random number of places."""
    by = rng.randrange(1, len(word))
    return word[by:] + word[:by]


def anagram(kept: int) -> Callable[[random.Random, str], str]:
    """A1, A2: all letters but the first and last `kept` in random order."""

    def scramble(rng: random.Random, word: str) -> str:
        middle = list(word[kept:-kept])
        rng.shuffle(middle)
        return word[:kept] + ''.join(middle) + word[-kept:]

    return scramble


def inserted(rng: random.Random, word: str) -> str:
    """RI: a random mark or space between every two letters."""
    return ''.join(letter + rng.choice(' !./') for letter in word[:-1]) + word[-1]


def swapped(rng: random.Random, word: str) -> str:
    """Two neighbouring letters that differ, exchanged."""
    places = [i for i in range(len(word) - 1) if word[i] != word[i + 1]]
    if not places:
        return word
    at = rng.choice(places)
    return word[:at] + word[at + 1] + word[at] + word[at + 2 :]


@functools.lru_cache
def words() -> tuple[str, ...]:
    """The 10,000 most frequent English words of 5 to 14 letters.

    Raises:
      InputError: wordfreq is not installed.
    """
    try:
        import wordfreq
    except ImportError as e:
        raise errors.InputError("scrambled words need: pip install 'gptjax[eval]'") from e
    frequent = wordfreq.top_n_list('en', 40_000)
    fitting = [w for w in frequent if w.isascii() and w.isalpha() and 4 < len(w) < 15]
    return tuple(fitting[:_N_WORDS])


# GPT-3, figure 1.1, as they stand there; in the last one the letters exchanged are no neighbours.
GIVEN = (
    ('gaot', 'goat'),
    ('sakne', 'snake'),
    ('brid', 'bird'),
    ('fsih', 'fish'),
    ('cmihp', 'chimp'),
)


def transposed(split: str, seed: int) -> list[Record]:
    """The paper's five words, then others with two neighbouring letters exchanged.

    The given ones are the first of 'train', whence examples are drawn.
    """
    made = [r for r in records('transposed', split, seed) if r['query'] != r['answer']]
    given = [{'query': wrong, 'answer': right} for wrong, right in GIVEN]
    taken = {right for _, right in GIVEN}
    made = [r for r in made if r['answer'] not in taken]
    return given + made if split == 'train' else made


_BEGINNINGS = 'b d f g k l m n p r s t v w z br dr gl pl sk st tr'
_ONSETS = _BEGINNINGS.split()
_VOWELS = ['a', 'e', 'i', 'o', 'u']
_CODAS = ['', '', 'n', 'm', 'l', 'rt', 'sk', 'mp', 'zle']
_THINGS = (
    'a small, furry animal native to {place}',
    'a kind of boat used by fishermen in {place}',
    'a sweet fruit that grows in {place}',
    'a musical instrument from {place}',
    'a warm coat worn in {place}',
    'a large vehicle used to carry goods in {place}',
    'a board game for two players from {place}',
    'a tall tree found in {place}',
    'a spicy soup cooked in {place}',
    'a tool for cutting stone, invented in {place}',
)
_PLACES = (
    'Tanzania',
    'Peru',
    'Norway',
    'Mongolia',
    'Iceland',
    'Vietnam',
    'Chile',
    'Morocco',
    'Nepal',
    'Portugal',
    'Canada',
    'Kenya',
)
_SENTENCES = (
    'Last summer we saw a {word} for the first time.',
    'She bought a {word} at the market.',
    'My uncle keeps a {word} behind his house.',
    'Nobody in town had ever owned a {word}.',
)


def _novel(rng: random.Random) -> tuple[str, str]:
    """An invented word with what it means; the answer is a sentence that uses it."""
    syllables = [rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(rng.choice((1, 2)))]
    word = ''.join(syllables) + rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS)
    meaning = rng.choice(_THINGS).format(place=rng.choice(_PLACES))
    article = 'An' if word[0] in 'aeiou' else 'A'
    query = (
        f'{article} "{word}" is {meaning}. An example of a sentence that uses the word {word} is:'
    )
    return query, rng.choice(_SENTENCES).format(word=word)


TASKS: dict[str, tuple[Callable[[random.Random], tuple[str, str]], int]] = {
    **{
        f'arithmetic_{digits}d_{sign}': (_sum(digits, sign), _ARITHMETIC)
        for digits in (2, 3, 4, 5)
        for sign in ('plus', 'minus')
    },
    'arithmetic_2d_times': (_sum(2, 'times'), _ARITHMETIC),
    'arithmetic_1dc': (_composite, _ARITHMETIC),
    'cycled_letters': (_scrambled(cycled), _SCRAMBLED),
    'anagrams_1': (_scrambled(anagram(1)), _SCRAMBLED),
    'anagrams_2': (_scrambled(anagram(2)), _SCRAMBLED),
    'random_insertion': (_scrambled(inserted), _SCRAMBLED),
    'transposed': (_scrambled(swapped), _ARITHMETIC),
    'novel_words': (_novel, 500),
}


def reversed_words(split: str, seed: int) -> list[Record]:
    """RW: words spelt backwards."""
    order = list(words())
    random.Random(f'reversed {seed}').shuffle(order)
    half = len(order) // 2
    some = order[:half] if split == 'test' else order[half:]
    return [{'query': word[::-1], 'answer': word} for word in some]


# OpenAI's files of the paper's own items (github.com/openai/gpt-3, data/), by task.
PUBLISHED = {
    'arithmetic_2d_plus': 'two_digit_addition',
    'arithmetic_2d_minus': 'two_digit_subtraction',
    'arithmetic_3d_plus': 'three_digit_addition',
    'arithmetic_3d_minus': 'three_digit_subtraction',
    'arithmetic_4d_plus': 'four_digit_addition',
    'arithmetic_4d_minus': 'four_digit_subtraction',
    'arithmetic_5d_plus': 'five_digit_addition',
    'arithmetic_5d_minus': 'five_digit_subtraction',
    'arithmetic_2d_times': 'two_digit_multiplication',
    'arithmetic_1dc': 'single_digit_three_ops',
    'cycled_letters': 'cycle_letters_in_word',
    'anagrams_1': 'mid_word_1_anagrams',
    'anagrams_2': 'mid_word_2_anagrams',
    'random_insertion': 'random_insertion_in_word',
    'reversed_words': 'reversed_words',
}
