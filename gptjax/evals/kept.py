# SPDX-License-Identifier: Apache-2.0
"""Items of a suite on disk, one a line as they are scored, so that it goes on in the middle."""

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from gptjax.configs import errors
from gptjax.evals import fewshot
from gptjax.storage import files

Row = dict[str, Any]


class Items:
    """Rows of a job on disk: a header, then one a line."""

    def __init__(
        self, path: pathlib.Path | None, header: Row, also: Callable[[Row], Row] = dict
    ) -> None:
        """Args: also: makes the row that is kept of a row."""
        self.path, self.rows, self._file, self._also = path, [], None, also
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
        self.rows = [also(row) for row in self.rows]
        path.parent.mkdir(parents=True, exist_ok=True)
        files.replace(path, _lines([header, *self.rows]))
        self._file = path.open('a', encoding='utf-8')

    def add(self, rows: Sequence[Row]) -> None:
        rows = [self._also(row) for row in rows]
        self.rows += rows
        if self._file is not None:
            self._file.write(_lines(rows))
            self._file.flush()

    def __enter__(self) -> 'Items':
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()


def with_texts(task: fewshot.Task, prompts: Sequence[fewshot.Prompt]) -> Callable[[Row], Row]:
    """Row -> the same with its prompt as text, and the answers that were scored or accepted.

    Of whole texts nothing: what was read is the corpus.
    """
    if task.kind == 'rolling':
        return dict
    known = {prompt.number: prompt for prompt in prompts}

    def also(row: Row) -> Row:
        prompt = known[row['i']]
        before, item = prompt.text(row['dropped']), prompt.item
        found = [before + context for context in item.contexts or (item.context,)]
        return row | {'prompt': found if item.contexts else found[0], 'answers': list(item.answers)}

    return also


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
