# SPDX-License-Identifier: Apache-2.0
"""The embedded corpus: the documentation of the Python that runs this, about 2 MB of English.

One document a module, its docstrings in source order, and one a topic of `pydoc_data.topics`. A
paragraph that stands in several is kept in the first alone: what is held out is not trained on.
Sources are parsed, never imported: some modules act on import. It differs by Python version.
"""

import ast
import inspect
import itertools
import pathlib
import platform
import sysconfig
import tokenize
from collections.abc import Iterator

from gptjax.data import documents

_SKIPPED = {'site-packages', 'dist-packages', 'test', 'tests', 'idlelib', 'lib2to3', 'topics.py'}
_SHORTEST = 200  # characters; what is shorter is seldom a sentence


def documents_of(path: str, text_field: str) -> Iterator[documents.Document]:
    """Every module's docstrings, then the language topics; takes no path."""
    del path, text_field
    root = pathlib.Path(sysconfig.get_paths()['stdlib'])
    sources = (
        source
        for source in sorted(root.rglob('*.py'))
        if _SKIPPED.isdisjoint(source.relative_to(root).parts)
    )
    texts = itertools.chain(map(_docstrings, sources), _topics(root / 'pydoc_data' / 'topics.py'))
    seen: set[str] = set()
    for text in texts:
        new: dict[str, str] = {}
        for paragraph in text.split('\n\n'):
            if paragraph.strip() and paragraph.strip() not in seen:
                new.setdefault(paragraph.strip(), paragraph)
        text = '\n\n'.join(new.values())
        if len(text) >= _SHORTEST:
            seen.update(new)
            yield documents.Document(text, '')


def identity(path: str) -> str:
    """The Python whose documentation it is, and how it is cut."""
    del path
    return f'{platform.python_version()}, each paragraph once'


def _parse(source: pathlib.Path) -> ast.Module | None:
    try:
        with tokenize.open(source) as f:
            return ast.parse(f.read())
    except (SyntaxError, UnicodeDecodeError, OSError):
        return None  # a few files of the library are broken on purpose


def _docstrings(source: pathlib.Path) -> str:
    tree = _parse(source)
    if tree is None:
        return ''
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    nodes.sort(key=lambda node: getattr(node, 'lineno', 0))
    return '\n\n'.join(filter(None, (ast.get_docstring(node) for node in nodes)))


def _topics(source: pathlib.Path) -> Iterator[str]:
    tree = _parse(source)
    for node in ast.walk(tree) if tree else ():
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for text in ast.literal_eval(node.value).values():
                yield inspect.cleandoc(text)
