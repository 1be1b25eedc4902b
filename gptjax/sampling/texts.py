# SPDX-License-Identifier: Apache-2.0
"""Between text and the tokens that are decoded: prompts, continuations, stop strings, streams."""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from gptjax.configs import errors
from gptjax.text import tokenizer as tokenizer_lib

_UNFINISHED = '\ufffd'  # what bytes that are no character yet decode to
_BACK = 8  # tokens before a piece of text that can change how it is spelt


def prompt_ids(
    tokenizer: tokenizer_lib.Tokenizer, text: str, allow_special: bool = False
) -> list[int]:
    """A prompt's ids, behind the ids that the tokenizer puts before every text (Llama's <s>).

    An empty prompt begins with bos, where the tokenizer names one, else with end-of-text, as
    documents do.

    Args:
      allow_special: names of special tokens in the text are these tokens: what a user writes, not
        what a corpus or a task holds.

    Raises:
      InputError: the prompt has no token and the vocabulary none to begin with.
    """
    ids = [*tokenizer.prefix, *tokenizer.encode(text, allow_special)]
    if not ids and tokenizer.beginning < 0:
        raise errors.InputError(
            f'the prompt {text!r} has no token, and the vocabulary no end-of-text to begin with'
        )
    return ids or [tokenizer.beginning]


class Pair(NamedTuple):
    """A context and what follows it, in tokens."""

    context: list[int]
    target: list[int]
    straddles: bool  # a token has characters of both; it counts to the target


def pair(tokenizer: tokenizer_lib.Tokenizer, context: str, target: str) -> Pair:
    """Tokens of a context and its continuation, cut from those of both together.

    Spaces at the end of the context go to the continuation, for tokens begin with theirs. An empty
    context is the tokenizer's prefix, else what an empty prompt begins with.

    Raises:
      InputError: the context has no token, and the vocabulary no end-of-text to begin with.
    """
    bare = context.rstrip(' ')
    before = prompt_ids(tokenizer, bare)
    if not bare:
        return Pair(before, tokenizer.encode(context + target), False)
    whole = [*tokenizer.prefix, *tokenizer.encode(context + target)]
    if whole[: len(before)] == before:
        return Pair(before, whole[len(before) :], False)
    same = next(i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b)
    if not same:
        return Pair(prompt_ids(tokenizer, ''), whole, True)
    return Pair(whole[:same], whole[same:], True)


def continuation(
    tokenizer: tokenizer_lib.Tokenizer,
    before: Sequence[int],
    tokens: Sequence[int],
    spelt: bool = False,
) -> str:
    """The text of what follows other tokens; decoded alone, it could lose its first space.

    Args:
      spelt: special tokens are written by their names, not left out.
    """
    left_out = frozenset() if spelt else tokenizer.special
    before = [i for i in before[-_BACK:] if i not in left_out]
    tokens = [i for i in tokens if i not in left_out]
    head, whole = tokenizer.decode(before), tokenizer.decode([*before, *tokens])
    if head.endswith(_UNFINISHED) or not whole.startswith(head):
        return tokenizer.decode(tokens)
    return whole[len(head) :]


class Stops:
    """Looks for stop strings in the text of tokens, special ones spelt by their names.

    Equal where the tokenizer is the same.
    """

    def __init__(self, tokenizer: tokenizer_lib.Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stops) and other._tokenizer is self._tokenizer

    def __hash__(self) -> int:
        return id(self._tokenizer)

    def __call__(self, before: Sequence[int], tokens: Sequence[int], strings: Sequence[str]) -> int:
        """How many tokens behind others there are up to the end of a stop string; -1 = none."""

        def has_one(count: int) -> bool:
            text = continuation(self._tokenizer, before, tokens[:count], spelt=True)
            return any(string in text for string in strings)

        if not has_one(len(tokens)):
            return -1
        low, high = 1, len(tokens)
        while low < high:  # once there, a stop string stays
            middle = (low + high) // 2
            low, high = (low, middle) if has_one(middle) else (middle + 1, high)
        return low


def check_stops(stops: Stops | None, asked: Collection[Any]) -> None:
    """Raises UsageError where stop strings are asked for and there is no tokenizer to find them."""
    errors.require(not asked or stops is not None, 'stop strings need a tokenizer')


def before_stop(
    tokenizer: tokenizer_lib.Tokenizer,
    before: Sequence[int],
    tokens: Sequence[int],
    strings: Sequence[str],
) -> str:
    """continuation() up to the first stop string, which may be the name of a special token."""
    spelt = continuation(tokenizer, before, tokens, spelt=True)
    return _until(_first(spelt, strings), spelt, tokenizer, before, tokens)


def _until(
    place: int,
    spelt: str,
    tokenizer: tokenizer_lib.Tokenizer,
    before: Sequence[int],
    tokens: Sequence[int],
) -> str:
    """The text without special tokens of what is `place` characters with their names."""
    if tokenizer.special.isdisjoint(tokens):
        return spelt[:place]
    count, whole = len(tokens), spelt  # of the tokens that end there or before
    while count and len(whole) > place:
        count -= 1
        whole = continuation(tokenizer, before, tokens[:count], spelt=True)
    text = continuation(tokenizer, before, tokens[:count])
    special = tokenizer.special.issuperset(tokens[count : count + 1])
    return text if special else text + spelt[len(whole) : place]


def _first(text: str, strings: Sequence[str]) -> int:
    """Where the first of some strings begins; the end where none is there."""
    found = (text.find(string) for string in strings)
    return min((place for place in found if place >= 0), default=len(text))


class Stream:
    """A growing text as pieces that are never taken back."""

    def __init__(
        self, tokenizer: tokenizer_lib.Tokenizer, before: Sequence[int], strings: Sequence[str]
    ) -> None:
        self._tokenizer, self._before, self._strings = tokenizer, list(before), strings
        self._told = 0

    def push(self, tokens: Sequence[int], finished: bool) -> str:
        """What is new in the text of all tokens so far.

        Half a character and what may be the beginning of a stop string wait for the next tokens.
        """
        said = (self._tokenizer, self._before, tokens)
        spelt = continuation(*said, spelt=True)
        place = _first(spelt, self._strings)
        if not finished and place == len(spelt):
            place = len(spelt.rstrip(_UNFINISHED))
            most = max(map(len, self._strings), default=1) - 1
            for held in range(min(most, place), 0, -1):
                if any(string.startswith(spelt[place - held : place]) for string in self._strings):
                    place -= held
                    break
        text = _until(place, spelt, *said)
        piece, self._told = text[self._told :], max(self._told, len(text))
        return piece
