# SPDX-License-Identifier: Apache-2.0
"""Storage that fails, and hosts that are killed: a run in a bucket ends as an undisturbed one."""

import pathlib
import random
import re
import signal
import subprocess
import threading

import pytest

from gptjax import train
from gptjax.configs import errors
from gptjax.runtime import checkpoint, program, saver
from gptjax.storage import buckets, mirror, retry
from tests import emulator, helpers, pods


def killed(storage, bucket, config_file, tmp_path, number: int, when: str) -> int:
    """Kills a run at its n-th request to storage, before or after storage has it."""
    begun = len(storage.requests)
    found: list[subprocess.Popen] = []

    def fault(request):
        if len(storage.requests) - begun == number:
            if when == 'after':
                threading.Timer(0.05, found[0].kill).start()
                return emulator.FORWARD
            found[0].kill()
            return emulator.RESET
        return emulator.FORWARD

    with storage.failing(fault):
        env = pods.environment(tmp_path / 'home')
        with subprocess.Popen(
            pods.command(bucket, config_file), env=env, stderr=subprocess.PIPE, text=True
        ) as process:
            found.append(process)
            said = process.stderr.read()
    assert process.returncode in (0, -signal.SIGKILL), said
    assert 'Traceback' not in said
    return process.returncode


def survives(storage, bucket, config_file, local, tmp_path, numbers) -> None:
    """Killed at those requests, one after the other, it ends as the undisturbed run."""
    for number, when in numbers:
        killed(storage, bucket, config_file, tmp_path, number, when)
        lease = bucket / '.lease'
        lease.unlink(missing_ok=True)  # whose minute is not waited for here
    env = pods.environment(tmp_path / 'home')
    done = subprocess.run(
        pods.command(bucket, config_file), env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert pods.outcome(bucket) == pods.outcome(local)


def test_a_run_that_is_killed_goes_on(storage, bucket, config_file, local, tmp_path):
    survives(storage, bucket, config_file, local, tmp_path, [(60, 'before'), (130, 'after')])


@pytest.mark.slow
@pytest.mark.parametrize('seed', range(10))
def test_twenty_kills_at_any_request(storage, bucket, config_file, local, tmp_path, seed):
    rng = random.Random(seed)
    numbers = [(rng.randrange(5, 260), rng.choice(['before', 'after'])) for _ in range(2)]
    survives(storage, bucket, config_file, local, tmp_path, numbers)


@pytest.mark.slow
def test_storage_that_fails_now_and_then_changes_nothing(
    storage, bucket, config_file, local, monkeypatch
):
    monkeypatch.setattr(retry, 'FIRST_SECS', 0.02)
    rng, codes = random.Random(0), (429, 503, 500, 401, emulator.RESET)

    def fault(request):
        return rng.choice(codes) if rng.random() < 0.1 else emulator.FORWARD

    with storage.failing(fault):
        pods.trained(bucket, config_file, '--config.data.read=stream')
    assert pods.outcome(bucket) == pods.outcome(local)


def impatient(monkeypatch) -> None:
    """Waits of seconds, and of minutes, become tenths of a second."""
    for module, name, secs in (
        (retry, 'FIRST_SECS', 0.05),
        (retry, 'LONGEST_SECS', 0.05),
        (retry, 'PATIENCE_SECS', 0.5),
        (checkpoint, '_AT_ONCE_SECS', 0.2),
        (saver, 'FIRST_SECS', 0.05),
        (saver, '_SLOW_SECS', 0.1),
    ):
        monkeypatch.setattr(module, name, secs)


def test_training_goes_on_while_storage_is_down(
    storage, bucket, config_file, local, monkeypatch, caplog
):
    impatient(monkeypatch)
    down = [False]

    def fault(request):
        wrote = request.method == 'POST' and '/checkpoints/' in request.name
        down[0] = down[0] or wrote
        return 503 if down[0] and len(seen) < 7 else emulator.FORWARD

    seen = []
    after = train.run_lib.Run.after

    def counted(self, step, state, found):
        seen.append(step)
        after(self, step, state, found)

    monkeypatch.setattr(train.run_lib.Run, 'after', counted)
    with storage.failing(fault):
        pods.trained(bucket, config_file)
    assert 'training goes on' in caplog.text
    monkeypatch.undo()
    assert pods.outcome(bucket) == pods.outcome(local)


def test_a_run_gives_up_with_a_line(storage, bucket, config_file, monkeypatch):
    impatient(monkeypatch)
    monkeypatch.setattr(saver, 'INSIST_SECS', 0.5)
    monkeypatch.setattr(mirror, '_CLOSE_SECS', 0.3)
    with helpers.stopped_after(4), pytest.raises(program.Preempted):
        pods.trained(bucket, config_file)
    last = checkpoint_steps(bucket)

    def fault(request):
        wrote = request.method == 'POST' and '/checkpoints/' in request.name
        return 503 if wrote else emulator.FORWARD

    said = 'could not save step|what was trained since the last save is lost'
    with storage.failing(fault), pytest.raises(errors.InputError, match=said):
        pods.trained(bucket, config_file, '--config.checkpoint.give_up_minutes=0.001')
    assert checkpoint_steps(bucket) == last


def checkpoint_steps(bucket: buckets.Path) -> list[str]:
    return sorted(n for n in bucket.objects() if re.match('checkpoints/.*/manifest.json', n))


def hosts(count: int, bucket: object, config_file: str, homes: pathlib.Path, *flags: str):
    """Processes that share nothing but storage: each has a home and a folder of its own."""
    joined = (f'--coordinator=localhost:{pods.free_port()}', f'--processes={count}')
    mesh = ('--config.mesh.data=2', '--config.mesh.fsdp=2')
    found = []
    for index in range(count):
        home = homes / f'{count}-{index}'
        (home / 'here').mkdir(parents=True, exist_ok=True)
        env = pods.environment(
            home,
            XLA_FLAGS=f'--xla_force_host_platform_device_count={4 // count}',
            PYTHONPATH=str(pathlib.Path(__file__).resolve().parents[1]),
        )
        told = pods.command(bucket, config_file, *mesh, *joined, f'--process={index}', *flags)
        found.append(
            subprocess.Popen(told, env=env, cwd=home / 'here', stderr=subprocess.PIPE, text=True)
        )
    return found


def ended(processes, code: int = 0) -> list[str]:
    """What they said, who all ended with the code."""
    said = [err for _, err in pods.communicated(processes)]
    assert not any('Traceback' in each for each in said), said
    assert all(process.returncode == code for process in processes), said
    return said


def losses(place) -> list[float]:
    _, scores, rows, _ = pods.outcome(place)
    assert list(rows) == list(range(1, 9))
    return [*rows.values(), *scores.values()]


def test_two_hosts_share_nothing_but_the_bucket(storage, bucket, config_file, local, tmp_path):
    """One of them is told to stop: both save, and both go on."""
    running, told = hosts(2, bucket, config_file, tmp_path), []

    def stop(request):
        if request.method == 'POST' and '/checkpoints/' in request.name and not told:
            told.append(request)
            running[1].send_signal(signal.SIGTERM)
        return emulator.FORWARD

    with storage.failing(stop):
        said = ended(running, 75)
    assert all('stopped; run the same command again' in each for each in said), said
    assert 3 <= int(checkpoint_steps(bucket)[-1].split('/')[-2]) < 8
    ended(hosts(2, bucket, config_file, tmp_path))
    assert losses(bucket) == pytest.approx(losses(local), rel=1e-4)


@pytest.mark.slow
def test_one_host_of_two_is_killed_and_others_go_on(storage, bucket, config_file, local, tmp_path):
    """On two again, then on one, then on four."""
    for count in (2, 1, 4):
        begun, number = len(storage.requests), {2: 150, 1: 60, 4: 10**9}[count]
        running = hosts(count, bucket, config_file, tmp_path)

        def fault(request, begun=begun, number=number, running=running):
            if len(storage.requests) - begun == number:
                running[-1].kill()
            return emulator.FORWARD

        with storage.failing(fault):
            codes = [(p.communicate()[1], p.returncode) for p in running]
        if count < 4:
            assert any(code == -signal.SIGKILL for _, code in codes), codes
            assert all(code != 0 for _, code in codes), codes
        else:
            assert all(code == 0 for _, code in codes), codes
        (bucket / '.lease').unlink(missing_ok=True)
    assert losses(bucket) == pytest.approx(losses(local), rel=1e-4)
