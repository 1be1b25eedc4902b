# SPDX-License-Identifier: Apache-2.0
"""What signals do to a process, by what it has to lose; conversions that were stopped."""

import json
import signal
import subprocess
import sys
import time

import pytest

from gptjax.configs import checksum, errors
from gptjax.models import pretrained, sources
from gptjax.runtime import program, signals
from gptjax.storage import unfinished
from tests import helpers

LOST = 'stopped at once: the steps are lost; run the same command again\n'
_BEGIN = """
import hashlib, sys, time
from gptjax.runtime import signals
signals.install()
def in_another_language():
    print('ready', flush=True)
    hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)
"""
_GRACEFUL = """
with signals.graceful():
    signals.unsaved('the steps')
    print('ready', flush=True)
    while not signals.stop_requested():
        time.sleep(0.01)
    time.sleep(0.5)
    if sys.argv[1] == 'saves':
        sys.exit(7)
    in_another_language()
"""


@pytest.fixture(autouse=True, scope='module')
def _signals():
    with helpers.signals_heeded():
        yield


def start(code, *argv, shell=()):
    process = subprocess.Popen(
        [*shell, sys.executable, '-c', _BEGIN + code, *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == 'ready\n'
    return process


def end(process):
    said = process.communicate()[1]
    return process.returncode, said


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_where_there_is_nothing_to_save_it_ends_at_once(number):
    for code in ('in_another_language()', 'with signals.graceful(): in_another_language()'):
        process = start(code)
        process.send_signal(number)
        assert end(process) == (75, f'{signals.LINE}\n')


def test_a_repeat_at_once_is_the_same_request():
    process = start(_GRACEFUL, 'saves')
    for number in (signal.SIGTERM, signal.SIGCONT, signal.SIGTERM, signal.SIGHUP):
        process.send_signal(number)
    code, said = end(process)
    assert code == 7
    # Of those that wait at the same time, Linux delivers the lowest number first.
    line = 'finishing this step and saving; once more to stop at once\n'
    assert said in (f'SIGTERM: {line}', f'SIGHUP: {line}')


def test_a_later_one_ends_at_once():
    process = start(_GRACEFUL, 'goes on')
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == 'ready\n'
    time.sleep(signals.SAME_SECS)
    process.send_signal(signal.SIGINT)
    code, said = end(process)
    assert code == 75
    assert said.endswith(LOST)


def test_what_is_ignored_from_the_start_stays_so():
    process = start(_GRACEFUL, 'saves', shell=('sh', '-c', 'trap "" HUP; exec "$@"', 'sh'))
    process.send_signal(signal.SIGHUP)
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert end(process)[0] == 7


def test_a_library_leaves_signals_alone():
    code = 'import gptjax, signal; print(signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)'
    found = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert found.stdout == 'True\n'


def test_a_dying_thread_is_a_line(caplog):
    code = """
import threading
from gptjax.runtime import program
program.set_up_logging()
def die(): raise ValueError('no more')
thread = threading.Thread(target=die, name='writer')
thread.start(); thread.join()
class Bad:
    def __del__(self): raise ValueError('unseen')
Bad()
"""
    found = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert found.stderr[9:] == 'writer ended early: ValueError: no more\n'


@pytest.mark.parametrize('save', [pretrained.save, pretrained.save_workdir])
def test_an_unfinished_conversion_is_refused_and_begun_again(tmp_path, save):
    model = helpers.tiny_model()
    folder = tmp_path / 'x'
    unfinished.writing(folder).__enter__()
    (folder / 'checkpoints' / '00000000').mkdir(parents=True)
    (folder / 'config.json').write_text('{"model_type": "gpt2"}')
    for path in (folder, folder / 'checkpoints' / '00000000', folder / 'average'):
        with pytest.raises(errors.InputError, match='x is an unfinished conversion'):
            sources.open(path)
    with (
        pytest.raises(errors.InputError, match='x is an unfinished conversion'),
        program.only_one(folder),
    ):
        pass
    command = ['python', '-m', 'gptjax.convert', '--workdir=x']
    (folder / '.unfinished').write_text(json.dumps(checksum.sealed({'command': command})))
    with pytest.raises(errors.InputError, match=r'run again: python -m gptjax.convert --workdir=x'):
        sources.open(folder)
    with program.only_one(folder, whole=False):
        save(folder, model, helpers.params_of(model), None)
    assert not (folder / '.unfinished').exists()
    assert pretrained.load(folder).model.config.n_vocab == 64
    with pytest.raises(errors.InputError, match='is not empty'):
        save(folder, model, helpers.params_of(model), None)


def test_a_lock_that_is_a_link_is_refused(tmp_path):
    (tmp_path / '.lock').symlink_to(tmp_path / 'elsewhere')
    with (
        pytest.raises(errors.InputError, match='lock is a symbolic link; remove it'),
        program.only_one(tmp_path),
    ):
        pass
    assert not (tmp_path / 'elsewhere').exists()
