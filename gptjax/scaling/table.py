# SPDX-License-Identifier: Apache-2.0
"""Tables of runs, one's own or others': CSV and Parquet files, read as the fits take them."""

import ast
import csv
import operator
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gptjax.configs import errors
from gptjax.scaling import runs as runs_lib

FIELDS = ('name', 'n', 'd', 'c', 'loss')
_CONDITION = re.compile(r'(.+?)(!=|<=|>=|=|<|>)(.*)', re.DOTALL)
_COMPARE = {
    '=': operator.eq,
    '!=': operator.ne,
    '<=': operator.le,
    '>=': operator.ge,
    '<': operator.lt,
    '>': operator.gt,
}
_ARITHMETIC = {ast.Mult: operator.mul, ast.Div: operator.truediv, ast.Pow: operator.pow}
Columns = Mapping[str, Sequence[Any]]


def read(path: pathlib.Path) -> dict[str, list[Any]]:
    """The columns of a file, cells as text or numbers.

    Raises:
      InputError: it is no table, has no rows, rows of other lengths, or a column twice.
    """
    if path.suffix == '.parquet':
        return _read_parquet(path)
    try:
        with path.open(encoding='utf-8-sig', newline='') as f:
            rows = [row for row in csv.reader(f, strict=True) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise errors.InputError(f'{path} cannot be read as a CSV file: {e}') from e
    if len(rows) < 2:
        raise errors.InputError(f'{path} holds no rows under a line of names')
    names, *body = rows
    for number, row in enumerate(body, 2):
        if len(row) != len(names):
            raise errors.InputError(
                f'{path}: row {number} has {len(row)} cells, {len(names)} are named'
            )
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise errors.InputError(f'{path} names the column {repeated[0]!r} twice')
    return {
        name.strip(): list(cells)
        for name, cells in zip(names, zip(*body, strict=True), strict=True)
    }


def runs(
    columns: Columns, named: Mapping[str, str], where: Sequence[str], path: object
) -> runs_lib.Runs:
    """The runs of a table.

    Args:
      named: field of FIELDS -> column, or a product of columns and other fields, as 'c/6/n'.
      where: conditions, as 'dataset=c4', 'loss<5', 'loss!=' (not empty); all of them.
      path: of the table, for errors.

    Raises:
      InputError: a column is missing, a cell is no number, no rows are left; as runs.make().
    """
    unknown = sorted(named.keys() - set(FIELDS))
    errors.require(
        not unknown, f'--columns names {", ".join(unknown)}; there are: {", ".join(FIELDS)}'
    )
    lacking = [name for name in ('n', 'd', 'loss') if name not in named]
    errors.require(
        not lacking,
        f'--columns does not say which column is {", ".join(lacking)}, as '
        '--columns=n=params,d=tokens,loss=valid_loss',
    )
    rows = kept(columns, where, path)
    table = _Table({name: [cells[i] for i in rows] for name, cells in columns.items()}, named, path)
    names = [f'row {i + 2}' for i in rows]
    if 'name' in named:
        names = [str(each) for each in table.cells(named['name'])]
    c = table.numbers('c') if 'c' in named else None
    return runs_lib.make(np.array(names), *(table.numbers(x) for x in ('n', 'd', 'loss')), c)


def kept(columns: Columns, where: Sequence[str], path: object) -> np.ndarray:
    """The rows for which all conditions hold, from 0. Raises InputError where none is left."""
    keep = np.ones(len(next(iter(columns.values()))), bool)
    for condition in where:
        keep &= _holds(columns, condition, path)
    if not keep.any():
        raise errors.InputError(f'{path}: no row is left by --where={",".join(where)}')
    return np.flatnonzero(keep)


def parse_columns(text: str) -> dict[str, str]:
    """'n=params,d=tokens' as a dict. Raises UsageError where a part is not field=column."""
    found = {}
    for part in filter(None, text.split(',')):
        name, equals, column = part.partition('=')
        errors.require(
            bool(equals and column), f'--columns: {part!r} is not field=column, as n=params'
        )
        errors.require(name not in found, f'--columns names {name} twice')
        found[name.strip()] = column.strip()
    return found


class _Table:
    def __init__(self, columns: Columns, named: Mapping[str, str], path: object) -> None:
        self._columns, self._named, self._path = columns, named, path

    def cells(self, name: str) -> Sequence[Any]:
        if name not in self._columns:
            raise errors.InputError(
                f'{self._path} has no column {name!r}; it has: {", ".join(self._columns)}'
            )
        return self._columns[name]

    def numbers(self, field: str, within: tuple[str, ...] = ()) -> np.ndarray:
        """The numbers of a field; nan where a cell is empty."""
        text = self._named[field]
        errors.require(field not in within, f'--columns: {field} is made of itself')
        if text in self._columns:
            return self._parsed(text)
        try:
            tree = ast.parse(text, mode='eval').body
        except SyntaxError:
            tree = None
        if isinstance(tree, ast.BinOp):
            return self._computed(tree, text, (*within, field))
        return self._parsed(text)

    def _computed(self, node: ast.AST, text: str, within: tuple[str, ...]) -> Any:
        if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
            sides = (self._computed(side, text, within) for side in (node.left, node.right))
            return _ARITHMETIC[type(node.op)](*sides)
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return float(node.value)
        if isinstance(node, ast.Name):
            if node.id in self._named and node.id not in self._columns:
                return self.numbers(node.id, within)
            return self._parsed(node.id)
        raise errors.UsageError(
            f'--columns: {text!r} is no column, and no product of columns, as c/6/n'
        )

    def _parsed(self, name: str) -> np.ndarray:
        found = []
        for row, cell in enumerate(self.cells(name), 2):
            number = _number(cell)
            if number is None:
                raise errors.InputError(
                    f'{self._path}: column {name!r}, row {row}: {cell!r} is no number'
                )
            found.append(number)
        return np.array(found)


def _number(cell: Any) -> float | None:
    """nan of an empty cell, None of what is no number."""
    if cell is None or cell == '':
        return float('nan')
    try:
        return float(cell)
    except (TypeError, ValueError):
        return None


def _holds(columns: Columns, condition: str, path: object) -> np.ndarray:
    found = _CONDITION.fullmatch(condition)
    errors.require(
        found is not None, f'--where={condition}: give column=value, or with != < > <= >='
    )
    name, sign, value = (part.strip() for part in found.groups())
    if name not in columns:
        raise errors.InputError(f'{path} has no column {name!r}; it has: {", ".join(columns)}')
    wanted = _number(value) if value else None

    def holds(cell: Any) -> bool:
        number = _number(cell)
        if wanted is not None and number is not None:
            return bool(_COMPARE[sign](number, wanted))
        errors.require(sign in ('=', '!='), f'--where={condition} compares what is no number')
        return bool(_COMPARE[sign]('' if cell is None else str(cell), value))

    return np.array([holds(cell) for cell in columns[name]])


def _read_parquet(path: pathlib.Path) -> dict[str, list[Any]]:
    try:
        from pyarrow import lib, parquet
    except ImportError as e:
        raise errors.InputError("Parquet files need: pip install 'gptjax[parquet]'") from e
    try:
        found = parquet.read_table(path).to_pydict()
    except (OSError, lib.ArrowException) as e:
        raise errors.InputError(f'{path} cannot be read as a Parquet file: {e}') from e
    if not found or not len(next(iter(found.values()))):
        raise errors.InputError(f'{path} holds no rows')
    return found
