# SPDX-License-Identifier: Apache-2.0
"""A run that is started again compiles nothing, on no host; where compiled programs are kept."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from gptjax.runtime import compiled
from gptjax.storage import buckets
from tests import pods

COUNTED = """
import os, pathlib, runpy
from gptjax.runtime import compiled, streams
settle, counts = streams.settle, pathlib.Path(os.environ['COUNTS'])
streams.settle = lambda: (counts.write_text(compiled.said()), settle())  # at the very end
runpy.run_module('gptjax.train', run_name='__main__')
"""
LENGTH = (
    *('--config.train.total_tokens=120000', '--config.train.eval_every_steps=10'),
    *('--config.batch.ramp_from_tokens=256', '--config.batch.ramp_over_tokens=1000'),
    *('--config.batch.ramp_stages=2', '--config.checkpoint.every_steps=10'),
    *('--config.checkpoint.keep=50', '--config.model.d_ff=1024'),  # which is read in parts
)


def started(bucket, config, tmp_path) -> list[subprocess.Popen]:
    """Two hosts with a device each, and nothing in common but the bucket."""
    port, running = pods.free_port(), []
    for host in range(2):
        env = os.environ | {
            'XLA_FLAGS': '--xla_force_host_platform_device_count=1',
            'XDG_CACHE_HOME': str(tmp_path / str(host)),
            'COUNTS': str(tmp_path / f'counts{host}'),
        }
        env.pop('JAX_COMPILATION_CACHE_DIR')
        command = [sys.executable, '-c', COUNTED, f'--config={config}', f'--workdir={bucket}']
        command += [*LENGTH, f'--coordinator=localhost:{port}', '--processes=2']
        running.append(
            subprocess.Popen(
                [*command, f'--process={host}'],
                env=env,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return running


def counted(running, tmp_path) -> list[tuple[int, int]]:
    """(compiled, found compiled) of each host, when both have ended."""
    said, found = pods.communicated(running), []
    for host, (process, (_, errors)) in enumerate(zip(running, said, strict=True)):
        assert process.returncode in (0, 75), errors
        counts = (tmp_path / f'counts{host}').read_text()
        made_and_found = re.fullmatch(r'(\d+) programs compiled, (\d+) found compiled', counts)
        found.append(tuple(map(int, made_and_found.groups())))
    return found


def where(code: str, tmp_path, **env: str) -> str:
    """The folder of compiled programs that another process names, after some code."""
    lines = f'from gptjax.runtime import compiled, hosts; compiled.keep(); {code}; import jax; '
    lines += 'print(jax.config.jax_compilation_cache_dir)'
    home = {'XDG_CACHE_HOME': str(tmp_path / 'home'), 'JAX_COMPILATION_CACHE_DIR': ''}
    done = subprocess.run(
        [sys.executable, '-c', lines], env=os.environ | home | env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_programs_are_kept_where_a_restart_finds_them(tmp_path, storage):
    """A run that trains has them with it, where disks go; all others on this machine."""
    usual, run, bucket = str(tmp_path / 'home/gptjax/xla'), tmp_path / 'run', storage.bucket()
    with_run = f'import pathlib; compiled.keep_with(pathlib.Path({str(run)!r}))'
    several = f'hosts.is_alone = lambda: False; {with_run}'
    there = 'from gptjax.storage import scratch; '
    there += f'compiled.keep_with(scratch.here("gs://{bucket}/run"))'
    assert where('pass', tmp_path) == usual
    assert where(with_run, tmp_path) == usual
    assert where(several, tmp_path) == f'{run}/xla'
    assert where(there, tmp_path) == f'gs://{bucket}/run/xla'
    assert where(there, tmp_path, JAX_COMPILATION_CACHE_DIR='/elsewhere') == '/elsewhere'


def test_programs_that_do_not_train_leave_none_in_a_bucket(prepared_bucket, storage, local):
    """A folder that convert is to write stays empty until it does, and its readers fetch none."""
    env = {k: v for k, v in os.environ.items() if k != 'JAX_COMPILATION_CACHE_DIR'}
    to = f'gs://{storage.bucket()}/converted'
    command = [sys.executable, '-m', 'gptjax.convert', f'--config.init_from={local}']
    done = subprocess.run([*command, f'--workdir={to}'], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (prepared_bucket.parent / 'xla').exists()
    assert {name.partition('/')[0] for name in buckets.of(to).objects()} == {
        '.made_of',
        'checkpoints',
        'config.json',
        'tokenizer',
    }


def test_an_environment_that_says_where_is_heard(tmp_path):
    code = 'from gptjax.runtime import compiled; compiled.keep(); import jax; '
    code += 'jax.jit(lambda x: x + 1)(1); print(compiled.said())'
    assert run(code, tmp_path) == ('1 programs compiled, 0 found compiled', '')
    assert run(code, tmp_path) == ('0 programs compiled, 1 found compiled', '')
    assert len(list(tmp_path.glob('*.program'))) == 1


def test_a_program_that_was_cut_off_is_compiled_anew(tmp_path):
    code = 'from gptjax.runtime import compiled; compiled.keep(); import jax; '
    code += 'jax.jit(lambda x: x + 1)(1); print(compiled.said())'
    run(code, tmp_path)
    (program,) = tmp_path.glob('*.program')
    program.write_bytes(program.read_bytes()[:1000])
    out, err = run(code, tmp_path)
    assert out == '1 programs compiled, 0 found compiled'
    assert f'{program} is damaged' in err
    assert run(code, tmp_path) == ('0 programs compiled, 1 found compiled', '')


def test_no_damage_of_a_program_is_run(tmp_path):
    """Cut before every byte, and with every bit flipped."""
    kept, content = compiled._Programs(tmp_path), bytes(range(64))
    kept.put('key', content)
    assert kept.get('key') == content
    assert kept.get('another') is None
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    flips = (
        bytes(x ^ (b == i) << bit for i, x in enumerate(whole))
        for b in range(len(whole))
        for bit in range(8)
    )
    for damaged in (*(whole[:n] for n in range(len(whole))), *flips):
        file.write_bytes(damaged)
        with pytest.warns(UserWarning, match='is damaged'):
            assert kept.get('key') is None
        assert not file.exists()
    kept.put('key', content)
    assert kept.get('key') == content


def run(code: str, cache) -> tuple[str, str]:
    """What a program prints whose compiled programs are kept in a folder, and what it warns of."""
    env = os.environ | {'JAX_COMPILATION_CACHE_DIR': str(cache)}
    done = subprocess.run(
        [sys.executable, '-c', code], env=env, capture_output=True, text=True, check=True
    )
    return done.stdout.strip(), done.stderr


@pytest.mark.slow  # two hosts that compile
def test_a_second_start_compiles_nothing_on_any_host(bucket, config_file, tmp_path):
    running = started(bucket, config_file, tmp_path)
    while not (bucket / 'checkpoints' / '00000010' / 'meta.json').exists() and all(
        process.poll() is None for process in running
    ):
        time.sleep(0.5)
    running[0].send_signal(signal.SIGTERM)
    first = counted(running, tmp_path)
    assert [process.returncode for process in running] == [75, 75]
    assert all(made > 4 for made, _ in first)
    assert len(list((bucket / 'xla').iterdir())) == sum(made for made, _ in first)
    running = started(bucket, config_file, tmp_path)
    second = counted(running, tmp_path)
    assert [process.returncode for process in running] == [0, 0]
    assert [made for made, _ in second] == [0, 0]
    assert all(found > 4 for _, found in second)
