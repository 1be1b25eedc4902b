# SPDX-License-Identifier: Apache-2.0
"""Tokenised corpora back to the text that people write, line by line, and their inverses.

GPT-2 (section 3.1) was scored on text from which the marks of tokenisation were removed by
invertible functions, so that the probability is still that of the data set. Its own were not
published. Here a line is changed only if the inverse gives it back exactly; others stay as they
are, and their number is told.
"""

import re
from collections.abc import Callable, Iterable

_JOINED = (  # before, after: of both WikiText and PTB
    (r' ([,.;:!?%)\]])', r'\1'),
    (r'([(\[$£]) ', r'\1'),
    (r" ('s|'S|'re|'ve|'ll|'d|'m|n't|')(?= |$)", r'\1'),
)


def wikitext(line: str) -> str:
    """A line of WikiText: '@-@' and the like joined, punctuation and quotes set as in print."""
    line = re.sub(r' @([-,.])@ ', r'\1', line)
    return _quoted(_headed(_join(line)))


def wikitext_tokenized(line: str) -> str:
    """wikitext() undone."""
    line = re.sub(r'^ (=+) (.*?) =+ $', lambda m: f' {_spread(m[1])} {m[2]} {_spread(m[1])} ', line)
    line = re.sub(r'(?<=[^\s@])-(?=[^\s@])', ' @-@ ', line)
    line = re.sub(r'(?<=[\d>])([,.])(?=[\d<])', r' @\1@ ', line)
    return _split(line)


def ptb(line: str) -> str:
    """A line of the Penn Treebank as language models know it (Mikolov)."""
    return re.sub(r"(\w) n't(?= |$)", r"\1n't", _join(line))


def ptb_tokenized(line: str) -> str:
    """ptb() undone: its periods are of abbreviations alone."""
    return _split(line, sentences=False)


def lm1b(line: str) -> str:
    """A line of the One Billion Word benchmark."""
    return _quoted(_join(line))


def lm1b_tokenized(line: str) -> str:
    """lm1b() undone."""
    return _split(line)


def cbt(text: str) -> str:
    """Text of the Children's Book Test; Penn Treebank brackets and quotes are written out."""
    for mark, written in (('-LRB-', '('), ('-RRB-', ')'), ('``', '"'), ("''", '"'), ('`', "'")):
        text = re.sub(rf'(?<!\S){re.escape(mark)}(?!\S)', written, text)
    return _quoted(_join(text))


def lines(
    text: str, plain: Callable[[str], str], inverse: Callable[[str], str]
) -> tuple[list[str], int]:
    """The lines of a text made plain, and how many of them stay tokenised."""
    found, kept = [], 0
    for line in text.split('\n'):
        new = plain(line)
        if inverse(new) != line:
            new, kept = line, kept + 1
        found.append(new)
    return found, kept


def articles(text_lines: Iterable[str]) -> list[str]:
    """WikiText's lines as articles; each begins with a line ' = Title = '."""
    found: list[list[str]] = [[]]
    for line in text_lines:
        if re.match(r'^ = [^=].*[^=] = ?$', line) and any(map(str.strip, found[-1])):
            found.append([])
        found[-1].append(line)
    return ['\n'.join(article) for article in found]


def _join(line: str) -> str:
    for pattern, written in _JOINED:
        line = re.sub(pattern, written, line)
    return line


def _split(line: str, sentences: bool = True) -> str:
    """Punctuation apart from words again, as the tokenisers of these corpora have it."""
    line = _unquoted(line)
    line = re.sub(r"(?<=\w)(n't)(?= |$|[,.;:!?%)\]])", r' \1', line)
    line = re.sub(r"(?<=\S)('s|'S|'re|'ve|'ll|'d|'m)(?= |$|[,.;:!?)\]])", r' \1', line)
    line = re.sub(r'(?<=[^\s@])([,;:!?%)\]])(?!@)', r' \1', line)
    if sentences:
        line = re.sub(r'(\S*[^\s@.])\.(?= |$)', _period, line)
    line = re.sub(r"(?<=[\w.,])(')(?= |$)", r' \1', line)
    return re.sub(r'([(\[$£])(?=\S)', r'\1 ', line)


def _unquoted(line: str) -> str:
    """Quotes in pairs, a space on both sides."""
    parts = line.split('"')
    if len(parts) % 2 and len(parts) > 1:
        for i in range(1, len(parts)):
            opening = i % 2
            left, right = parts[i - 1], parts[i]
            if opening and right[:1] not in ('', ' '):
                parts[i] = ' ' + right
            if not opening and left[-1:] not in ('', ' '):
                parts[i - 1] = left + ' '
            if not opening and right[:1] not in ('', ' '):
                parts[i] = ' ' + right
        line = '"'.join(parts)
    return line


def _period(match: re.Match[str]) -> str:
    word = match[1]
    part_of_it = word in _ABBREVIATED or '.' in word or (len(word) == 1 and word.isupper())
    return f'{word}.' if part_of_it else f'{word} .'


_WORDS = (
    'No Nos Mr Mrs Ms Dr St Jr Sr Lt Col Gen Capt Sgt Prof Rev Hon Gov Sen Rep Maj Cmdr Adm Bros '
    'Inc Ltd Co Corp Mt vs Vol pp ca cf al Sept Oct Nov Dec Jan Feb Aug Op feat'
)
_ABBREVIATED = frozenset(_WORDS.split())


def _quoted(line: str) -> str:
    """Quotes in pairs, close to what they enclose."""
    parts = line.split('"')
    if len(parts) % 2 == 0:
        return line
    for i in range(1, len(parts), 2):
        parts[i] = parts[i].removeprefix(' ').removesuffix(' ')
    return '"'.join(parts)


def _headed(line: str) -> str:
    """' = = Title = = ' as ' == Title == '."""
    return re.sub(r'^ ((?:= )+)(.*?) ((?:= ?)+)$', _heading, line)


def _heading(match: re.Match[str]) -> str:
    marks = '=' * match[1].count('=')
    return f' {marks} {match[2]} {marks} '


def _spread(marks: str) -> str:
    return ' '.join(marks)
