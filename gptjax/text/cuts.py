# SPDX-License-Identifier: Apache-2.0
"""Where a long text may be cut, so that its parts have the tokens of the whole.

Most vocabularies cut a text into words first, from left to right, and look at each word alone. Of
the patterns that are known here none goes on behind a run of letters, unless with an apostrophe or
a mark, and none looks back: a text may be cut between a letter and a space, a comma and the like.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

_FORMS = ('NFC', 'NFD', 'NFKC', 'NFKD')  # which leave what begins with ASCII to itself
_CONTRACTED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
_REST = r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
PATTERNS = {
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",  # GPT-2
    _CONTRACTED + '{1,3}' + _REST,  # Llama 3
    _CONTRACTED + _REST,  # Qwen 2
}
AFTER_LETTERS = ' \n,.;:!?，。、！？；：'  # what may follow a letter behind a cut
_NEAR = 256  # characters, within which there mostly is a place
_LETTERS = unicodedata.ucd_3_2_0  # what all tables agree upon since


class OneByOne:
    """A tokenizer that encodes texts one by one, and long ones whole unless it says otherwise."""

    cut_before = ''
    encode: Callable[[str], list[int]]

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""
        return [self.encode(text) for text in texts]


def before(tokenizer_json: bytes) -> str:
    """What may follow a letter where a vocabulary of `tokenizers` lets a text be cut; '' = nothing.

    Args:
      tokenizer_json: as tokenizer.json.
    """
    said = json.loads(tokenizer_json)
    model, kinds = said['model'], _parts(said.get('pre_tokenizer'), 'pretokenizers')
    forms = [each['type'] for each in _parts(said.get('normalizer'), 'normalizers')]
    plain = not any(
        model.get(name) for name in ('dropout', 'continuing_subword_prefix', 'end_of_word_suffix')
    )
    if model.get('type') != 'BPE' or not plain or not set(forms) <= set(_FORMS):
        return ''
    if not all(map(_is_known, kinds)) or not any(map(_is_of_words, kinds)):
        return ''
    # A space would be put before anything else; and a letter that is taken apart ends with a mark,
    # which forms a word with what follows, unless that is a space.
    spaces = forms or any(each.get('add_prefix_space') for each in kinds)
    allowed = ' ' if spaces else AFTER_LETTERS
    for token in said.get('added_tokens', []):
        if not token['special'] and (token['rstrip'] or token['lstrip']):
            return ''
        text = token['content']
        if not token['special'] and _place(text, 1, len(text), re.compile(f'[{allowed}]')):
            return ''
    return allowed


def pieces(parts: Iterable[str], allowed: str, size: int) -> Iterator[str]:
    """A text in pieces of about `size` characters that may be encoded one by one.

    Args:
      parts: of the text, in order.
      allowed: as before() says; '' = it cannot be cut, and is one piece.
    """
    held, known = '', 1  # before which there is no place
    may_follow = re.compile(f'[{re.escape(allowed)}]') if allowed else None
    for part in parts:
        held += part
        while may_follow and len(held) > size:
            near = max(known, size - _NEAR)
            place = _place(held, near, size, may_follow) or _place(held, known, size, may_follow)
            if not place:
                known = len(held)
                break
            yield held[:place]
            held, known = held[place:], 1
    if held:
        yield held


def _place(text: str, begin: int, size: int, may_follow: re.Pattern) -> int:
    """The last place to cut up to a size, else the next; 0 = there is none from `begin` on."""
    found = 0
    for match in may_follow.finditer(text, begin):
        place = match.start()
        if _LETTERS.category(text[place - 1]).startswith('L'):
            if place > size:
                return found or place
            found = place
    return found


def _parts(found: dict[str, Any] | None, several: str) -> list[dict[str, Any]]:
    if found is None:
        return []
    return found[several] if found['type'] == 'Sequence' else [found]


def _is_of_words(kind: dict[str, Any]) -> bool:
    """Whether it cuts a text into words, by a pattern that is known."""
    if kind['type'] == 'ByteLevel':
        return bool(kind.get('use_regex', True))
    return kind['type'] == 'Split' and kind['pattern'].get('Regex') in PATTERNS


def _is_known(kind: dict[str, Any]) -> bool:
    if kind['type'] == 'Split':
        return _is_of_words(kind) and kind['behavior'] == 'Isolated' and not kind.get('invert')
    return kind['type'] in ('ByteLevel', 'Digits')
