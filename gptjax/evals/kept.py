# SPDX-License-Identifier: Apache-2.0
"""Items of a suite on disk, one a line as they are scored, so that it goes on in the middle."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from gptjax.configs import errors
from gptjax.text import files

Row = dict[str, Any]


class Items:
    """Rows of a job on disk: a header, then one a line."""

    def __init__(self, path: pathlib.Path | None, header: Row) -> None:
        self.path, self.rows, self._file = path, [], None
        if path is None:
            return
        if path.exists():
            old, self.rows = read(path)
            differing = [k for k in header if old.get(k) != header[k]]
            if old and differing:
                raise errors.InputError(
                    f'{path} holds items of another {", ".join(differing)}; use another --workdir, '
                    'or remove that file'
                )
        path.parent.mkdir(parents=True, exist_ok=True)
        files.replace(path, _lines([header, *self.rows]))
        self._file = path.open('a', encoding='utf-8')

    def add(self, rows: Sequence[Row]) -> None:
        self.rows += rows
        if self._file is not None:
            self._file.write(_lines(rows))
            self._file.flush()

    def __enter__(self) -> 'Items':
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()


def _lines(rows: Sequence[Row]) -> str:
    return ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows)


def read(path: pathlib.Path) -> tuple[Row, list[Row]]:
    """Header and rows; a line that was cut off, and what follows, is left out."""
    rows: list[Row] = []
    for line in path.read_text(encoding='utf-8').split('\n'):
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return (rows[0], rows[1:]) if rows else ({}, [])
