# SPDX-License-Identifier: Apache-2.0
"""Items of a suite on disk, one a line as they are scored, so that it goes on in the middle."""

import json
import logging
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from gptjax.configs import errors
from gptjax.evals import fewshot
from gptjax.runtime import hosts
from gptjax.storage import documents, files, scratch

Row = dict[str, Any]
_log = logging.getLogger(__name__)


class Items:
    """Rows of a job on disk: a header, then one a line."""

    def __init__(
        self, path: pathlib.Path | None, header: Row, also: Callable[[Row], Row] = dict
    ) -> None:
        """Args: also: makes the row that is kept of a row. The first of several hosts keeps."""
        self.path, self.rows, self._file, self._also = path, [], None, also
        if path is None:
            return
        if hosts.is_first():
            self._open(path, header)
        said = hosts.first_text(json.dumps(self.rows), f'the items of {path}')
        self.rows = json.loads(said)

    def _open(self, path: pathlib.Path, header: Row) -> None:
        scratch.need(path)
        if path.exists():
            old, self.rows = read(path)
            differing = [k for k in header if old.get(k) != header[k]]
            if old and differing:
                raise errors.InputError(
                    f'{path} holds items of another {", ".join(differing)}; use another --workdir, '
                    'or remove that file'
                )
        self.rows = [self._also(row) for row in self.rows]
        path.parent.mkdir(parents=True, exist_ok=True)
        files.replace(path, documents.lines([header, *self.rows]))
        self._file = files.open_(path, 'a')

    def add(self, rows: Sequence[Row]) -> None:
        rows = [self._also(row) for row in rows]
        self.rows += rows
        if self._file is not None:
            files.appended(self._file, documents.lines(rows), self.path)

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


def read(path: pathlib.Path) -> tuple[Row, list[Row]]:
    """Header and rows; a line that is cut off or damaged, and what follows, is left out."""
    found = documents.read_lines(path)
    if found.bad:
        _log.warning('%s: line %d is damaged; what follows is scored anew', path, min(found.bad))
    if not found.first or 'task' not in found.first[0]:
        return {}, []
    header, *rows = found.first
    whole: dict[int, Row] = {}
    for row in rows:
        if type(row.get('i')) is not int or row['i'] in whole:
            _log.warning('%s: the items after %d are of another file', path, len(whole))
            break
        whole[row['i']] = row
    return header, list(whole.values())
