# SPDX-License-Identifier: Apache-2.0
"""Our own JSON documents and lines: each carries a checksum, and one reader opens them all.

A document ends with the field `checksum`, of the others; of a file of JSON lines every line does.
What was written before there were checksums has none: it is taken where it has the form wanted.
"""

import contextlib
import io
import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import msgspec

from gptjax.configs import checksum, errors
from gptjax.storage import buckets, files


class Damaged(errors.InputError):
    """A document that is not what was written."""


def write(path: buckets.Anywhere, content: Mapping[str, Any]) -> None:
    """Writes a document with its checksum."""
    files.replace(path, text(content))


def text(content: Mapping[str, Any]) -> str:
    """A document as it stands in its file."""
    return json.dumps(checksum.sealed(content), indent=1) + '\n'


def read(path: buckets.Anywhere, form: Any, remedy: str, needs: Collection[str] = ()) -> Any:
    """The document in a file.

    Args:
      form: dict, or what msgspec can convert to: a Struct with the fields that it must have.
      remedy: what to do where it is damaged, as 'remove it and run python -m gptjax.X again'.
      needs: fields without which a dict is another document.

    Raises:
      Damaged: it is not there, cut, changed, or not of that form; the message names the file.
    """
    try:
        return parse(path.read_bytes(), form, needs)
    except FileNotFoundError as e:
        raise Damaged(f'{path} is missing; {remedy}') from e
    except OSError as e:
        raise Damaged(f'{path} cannot be read ({e.strerror}); {remedy}') from e
    except ValueError as e:
        raise Damaged(f'{path} is damaged ({e}); {remedy}') from e


def parse(content: bytes, form: Any, needs: Collection[str] = ()) -> Any:
    """The document that is a text; arguments as read(). Raises ValueError where it is damaged."""
    try:
        found = checksum.opened(json.loads(content))
        if lacking := [name for name in needs if name not in found]:
            raise ValueError(f'it has no {lacking[0]!r}')
        return found if form is dict else msgspec.convert(found, form)
    except RecursionError as e:
        raise ValueError('it is nested too deeply') from e
    except msgspec.ValidationError as e:
        raise ValueError(str(e)) from e


class Lines(NamedTuple):
    """The rows of a file of JSON lines, and what stands in it that is none."""

    numbered: dict[int, dict[str, Any]]  # by number of the line, from 1
    bad: dict[int, str]
    cut: bool  # the last line was not written to its end

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All that are whole."""
        return list(self.numbered.values())

    @property
    def first(self) -> list[dict[str, Any]]:
        """Those before the first bad line."""
        end = min(self.bad, default=math.inf)
        return [row for number, row in self.numbered.items() if number < end]


def line(row: Mapping[str, Any]) -> str:
    """A row as a line with its checksum."""
    return json.dumps(checksum.sealed(row), ensure_ascii=False) + '\n'


def lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as lines."""
    return ''.join(map(line, rows))


class Line(NamedTuple):
    """A line of a file of JSON lines.

    number: from 1. end: of the file's bytes, those up to and with it. raw: its bytes, the line's
    end among them. row: None = it is bad, or was not written to its end.
    """

    number: int
    end: int
    raw: bytes
    row: dict[str, Any] | None

    @property
    def is_cut(self) -> bool:
        """Whether it was not written to its end."""
        return not self.raw.endswith(b'\n')

    @property
    def text(self) -> str:
        """What stands there, whatever it is."""
        return self.raw.removesuffix(b'\n').decode(errors='replace')


def is_sealed(path: buckets.Anywhere) -> bool:
    """Whether any line of a file has a checksum: then one without is bad."""
    with _opened(path) as file:
        return any(_CHECKSUM in raw and _is_row(raw) for raw in file)


def each_line(path: buckets.Anywhere, needs: Collection[str] = ()) -> Iterator[Line]:
    """The lines of a file that are not blank, one at a time; none where there is no file.

    A line without a checksum is bad where another one has one.

    Args:
      needs: fields without which a line is bad.

    Raises:
      OSError: it cannot be read.
    """
    sealed, end = is_sealed(path), 0
    with _opened(path) as file:
        for number, raw in enumerate(file, 1):
            end, row = end + len(raw), None
            if not raw.strip():
                continue
            with contextlib.suppress(ValueError):
                if raw.endswith(b'\n') and (not sealed or _CHECKSUM in raw):
                    row = parse(raw, dict, needs)
            yield Line(number, end, raw, row)


def read_lines(path: buckets.Anywhere, needs: Collection[str] = ()) -> Lines:
    """The rows of a file, at once; arguments and errors as each_line()."""
    found = Lines({}, {}, False)
    for line_ in each_line(path, needs):
        if line_.row is not None:
            found.numbered[line_.number] = line_.row
        elif line_.is_cut:
            found = found._replace(cut=True)
        else:
            found.bad[line_.number] = line_.text
    return found


def _opened(path: buckets.Anywhere) -> io.BufferedIOBase:
    try:
        return io.BytesIO(path.read_bytes()) if isinstance(path, buckets.Path) else path.open('rb')
    except FileNotFoundError:
        return io.BytesIO()


def _is_row(raw: bytes) -> bool:
    with contextlib.suppress(ValueError):
        return bool(parse(raw, dict))
    return False


_CHECKSUM = json.dumps(checksum.FIELD).encode()
