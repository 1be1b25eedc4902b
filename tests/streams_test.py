# SPDX-License-Identifier: Apache-2.0
"""Text in and out of programs under any locale, in any encoding, with streams that are closed."""

import io
import json
import os
import subprocess
import sys

import pytest

from gptjax import generate
from gptjax.configs import base, checksum, errors
from gptjax.models import pretrained
from gptjax.text import tokenizer as tokenizer_lib
from tests import helpers

PROMPT = '서울은 café 😀'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp('bytes') / 'weights'
    model = helpers.tiny_model(n_vocab=257, n_ctx=64)
    pretrained.save(path, model, helpers.params_of(model), tokenizer_lib.Bytes())
    return path


def run(folder, workdir, *flags, env=(), stdin=None, shell='"$@"'):
    command = ['-m', 'gptjax.generate', f'--config.init_from={folder}', f'--workdir={workdir}']
    command += ['--config.decode.max_new_tokens=3', '--config.decode.do_sample=no', *flags]
    return subprocess.run(
        ['sh', '-c', shell, 'sh', sys.executable, *command],
        capture_output=True,
        input=stdin,
        env={k: v for k, v in os.environ.items() if not k.startswith('LC_')} | dict(env),
    )


LOCALES = [
    {'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'},
    {'LC_ALL': 'C'},
    {'LC_ALL': 'POSIX'},
    {'LC_ALL': 'C.UTF-8'},
    {'PYTHONIOENCODING': 'ascii'},
    {'PYTHONIOENCODING': 'latin-1:strict'},
]
SHELLS = [
    ('{ "$@"; echo $? > code; } | true; exit $(cat code)', 141),
    ('"$@" <&- >&- 2>&-', 0),
    ('"$@" >&-', 0),
    ('"$@" <&-', 0),
    ('"$@" 2>&-', 0),
    ('"$@" > /dev/full', 1),
]


def some(cases, quick):
    """The first ones always, the rest in make test-all: each is a program of its own."""
    more = [pytest.param(case, marks=pytest.mark.slow) for case in cases[quick:]]
    return [*cases[:quick], *more]


@pytest.mark.parametrize('env', some(LOCALES, 1))
def test_every_locale_takes_and_gives_every_character(folder, tmp_path, env):
    """In paths, too."""
    tmp_path /= '서울'
    found = run(folder, tmp_path, f'--prompt={PROMPT}', '--out=jsonl', env=env)
    assert found.returncode == 0, found.stderr
    (line,) = (tmp_path / 'samples.jsonl').read_text(encoding='utf-8').splitlines()
    assert json.loads(line)['prompt'] == PROMPT
    assert json.loads(found.stdout.decode('utf-8')) == checksum.opened(json.loads(line))


@pytest.mark.parametrize('case', some(SHELLS, 2))
def test_closed_streams(folder, tmp_path, case):
    """Files are written whatever is closed; a reader that went away ends the program quietly."""
    shell, code = case
    flags = [f'--prompt={PROMPT}', '--prompt=b']
    here = {'PYTHONPATH': os.getcwd()}
    found = run(folder, tmp_path / 'run', *flags, shell=f'cd {tmp_path}; {shell}', env=here)
    assert found.returncode == code, found.stderr
    helpers.check_no_fault(found.stderr)
    assert b'Exception' not in found.stderr
    lines = (tmp_path / 'run' / 'samples.jsonl').read_text(encoding='utf-8').splitlines()
    assert json.loads(lines[0])['prompt'] == PROMPT
    assert len(lines) == 2 or code
    assert code != 1 or found.stderr.decode().splitlines()[-1].startswith('error: [Errno 28]')


def generated(folder, workdir, *flags):
    flags = (f'--config.init_from={folder}', '--config.decode.max_new_tokens=3', *flags)
    generate.main(helpers.args(base.__file__, workdir, *flags, define=generate.define))
    lines = (workdir / 'samples.jsonl').read_text(encoding='utf-8').splitlines()
    return [json.loads(line)['prompt'] for line in lines]


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16', 'utf-32'])
def test_prompts_in_files_and_on_stdin_with_any_mark(folder, tmp_path, monkeypatch, encoding):
    content = f'{PROMPT}\n{PROMPT}!\n'.encode(encoding)
    (tmp_path / 'prompts.txt').write_bytes(content)
    monkeypatch.setattr('sys.stdin', io.TextIOWrapper(io.BytesIO(content), 'ascii'))
    for flag in (f'--prompts={tmp_path}/prompts.txt', '--prompts=-'):
        assert generated(folder, tmp_path / flag[-1], flag) == [PROMPT, f'{PROMPT}!']


def test_bytes_that_are_no_text_are_an_error(folder, tmp_path):
    (tmp_path / 'bad.txt').write_bytes(b'caf\xe9\n')
    with pytest.raises(errors.InputError, match='bad.txt is no UTF-8 text'):
        generated(folder, tmp_path / 'run', f'--prompts={tmp_path}/bad.txt')
