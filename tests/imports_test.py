# SPDX-License-Identifier: Apache-2.0
"""Who may import whom: the directions of the house."""

import ast
import subprocess
import sys

import pytest

from tests import conftest

PACKAGE = conftest.ROOT / 'gptjax'
ROOMS = (
    'configs',
    'storage',
    'text',
    'scaling',
    'models',
    'data',
    'runtime',
    'sampling',
    'training',
    'evals',
    'sweeps',
)
# room -> the rooms it may import, besides itself
BELOW = {
    'configs': (),
    'storage': ('configs',),
    'text': ('configs', 'storage'),
    'scaling': ('configs', 'storage'),
    'models': ('configs', 'storage', 'text', 'scaling'),
    'data': ('configs', 'storage', 'text', 'scaling'),
    'runtime': ('configs', 'storage', 'text', 'scaling'),
}
BELOW['sampling'] = tuple(BELOW)
BELOW['training'] = ('configs', 'storage', 'text', 'scaling', 'data', 'runtime')
BELOW['evals'] = (*BELOW['sampling'], 'sampling', 'training')
BELOW['sweeps'] = BELOW['evals']
OURS = ('checkpoint', 'meta')  # read and written by models.workdirs
EXCEPTIONS = {('models/workdirs.py', f'runtime.{name}') for name in OURS}
WITHOUT_JAX = ('prepare_corpus', 'train_tokenizer', 'prepare_tokens', 'quickstart', 'configs.base')


def _imports(path):
    """Dotted names below gptjax that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.ImportFrom) and (node.module or '').split('.')[0] == 'gptjax':
            prefix = node.module.removeprefix('gptjax').removeprefix('.')
            yield from ('.'.join(filter(None, (prefix, alias.name))) for alias in node.names)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split('.')[0] == 'gptjax':
                    yield alias.name.removeprefix('gptjax.')


@pytest.mark.parametrize('room', ROOMS)
def test_rooms_import_only_what_lies_below(room):
    for path in (PACKAGE / room).rglob('*.py'):
        for name in _imports(path):
            target = name.split('.')[0]
            allowed = target == room or target in BELOW[room]
            relative = str(path.relative_to(PACKAGE))
            assert allowed or (relative, name) in EXCEPTIONS, f'{relative} imports {name}'


def test_every_room_is_covered():
    assert {p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name != '__pycache__'} == set(
        ROOMS
    )


def test_nobody_imports_a_program():
    programs = {p.stem for p in PACKAGE.glob('*.py')}
    for path in PACKAGE.rglob('*.py'):
        for name in _imports(path):
            assert name.split('.')[0] not in programs, f'{path} imports the program {name}'


def test_experiments_import_only_configs():
    """And the arithmetic of sizes, by which sweeps reckon."""
    for path in (conftest.ROOT / 'experiments').rglob('*.py'):
        for name in _imports(path):
            assert name.split('.')[0] == 'configs' or name == 'scaling.flops', f'{path}: {name}'


def test_mesh_axis_names_stand_in_one_file():
    for path in PACKAGE.rglob('*.py'):
        if path.name == 'mesh.py' or path.parent.name == 'sections':
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            assert not (isinstance(node, ast.Constant) and node.value == 'fsdp'), path


@pytest.mark.parametrize('name', WITHOUT_JAX)
def test_some_programs_start_without_jax(name):
    code = f'import sys, gptjax.{name}; print("jax" in sys.modules)'
    found = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == 'False'


def test_files_stay_short():
    for path in conftest.ROOT.rglob('*.py'):
        if '.venv' not in path.parts:
            lines = len(path.read_text(encoding='utf-8').splitlines())
            assert lines <= 400, (
                f'{path} has {lines} lines, 400 are allowed: what in it would another reader look '
                'for by another name? Move that to a file of its own, or delete what is dead'
            )


def test_every_file_names_its_licence():
    for folder in ('gptjax', 'experiments', 'tests', 'benchmarks'):
        for path in (conftest.ROOT / folder).rglob('*.py'):
            text = path.read_text(encoding='utf-8')
            assert not text or text.startswith('# SPDX-License-Identifier: Apache-2.0\n'), path


def test_no_default_hides_at_the_point_of_use():
    for path in PACKAGE.rglob('*.py'):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = ast.unparse(node.func.value)
                assert not (node.func.attr == 'get' and 'config' in owner), f'{path}:{node.lineno}'
