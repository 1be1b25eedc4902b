# SPDX-License-Identifier: Apache-2.0
"""Who holds a folder: in a bucket, on a disk, and on one whose file system locks nothing."""

import concurrent.futures
import errno
import fcntl
import multiprocessing
import os
import random
import time

import pytest

from gptjax.configs import errors
from gptjax.data import staging
from gptjax.storage import buckets, lease_file, leases, scratch
from tests import helpers


def without(number):
    """flock() of a system that has none."""

    def flock(file, operation):
        raise OSError(number, os.strerror(number))

    return flock


@pytest.fixture(params=[errno.errorcode[n] for n in leases.NO_LOCKS])
def no_locks(request, monkeypatch):
    """A system that answers as Lustre does where it is mounted without locks."""
    monkeypatch.setattr(fcntl, 'flock', without(getattr(errno, request.param)))


@pytest.fixture(params=['bucket', 'disk'])
def folder(request, tmp_path, monkeypatch):
    """An empty one in which leases are held."""
    if request.param == 'bucket':
        storage = request.getfixturevalue('storage')
        return buckets.of(f'gs://{storage.bucket()}/some/run')
    monkeypatch.setattr(fcntl, 'flock', without(errno.ENOSYS))
    return tmp_path / 'run'


def left(folder) -> set[str]:
    """The names of what is there, but for a lock that nobody holds, and one lease given back."""
    if isinstance(folder, buckets.Path):
        return set(folder.objects())
    found = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != leases.LOCK}
    return set() if list(found.values()) == [b'free'] else set(found)


def lease_of(folder) -> leases._Lease:
    if isinstance(folder, buckets.Path):
        path = folder / leases.LEASE
        return leases._Lease(folder, path, 60.0, lambda: leases._now(path))
    folder.mkdir(exist_ok=True)
    path = lease_file.Path(folder / leases.LEASE)
    return leases._Lease(folder, path, 60.0, path.now)


def test_two_processes_never_hold_a_folder(folder, monkeypatch, caplog):
    monkeypatch.setattr(leases, 'LEASE_SECS', 3.0)
    monkeypatch.setattr(leases, 'RENEW_SECS', 0.2)
    with leases.held(folder):
        said = r'process \d+ on .* is at work in .*/run; stop it or use another'
        with pytest.raises(errors.InputError, match=said), leases.held(folder, 1.0):
            pass
    assert caplog.text.count('waiting up to') == 1
    with leases.held(folder):
        leases.check()
    assert not left(folder)


@pytest.mark.parametrize('locks', [False, True])
def test_who_only_looks_sees_whether_it_is_held(folder, tmp_path, monkeypatch, locks):
    """In a bucket, on a disk without locks, and on one with them."""
    if locks:
        monkeypatch.undo()
        folder = tmp_path / 'locked'
    assert not leases.is_held(folder)
    with leases.held(folder):
        assert leases.is_held(folder)
        monkeypatch.setattr(time, 'time', lambda now=time.time: now() + 2 * leases.LEASE_SECS)
        assert leases.is_held(folder) == locks  # a lease that has run out holds nothing
        monkeypatch.undo()
        if not locks and not isinstance(folder, buckets.Path):
            monkeypatch.setattr(fcntl, 'flock', without(errno.ENOSYS))
    assert not leases.is_held(folder)


def test_a_dead_holder_is_followed(folder, monkeypatch, caplog):
    monkeypatch.setattr(leases, 'LEASE_SECS', 1.0)
    monkeypatch.setattr(leases, 'RENEW_SECS', 60.0)  # it renews no more
    dead = lease_of(folder)
    with leases.held(folder):
        assert 'has run out' in caplog.text
        dead._renew()
        with pytest.raises(leases.Lost, match='has taken .*/run over'):
            dead.check()
        dead.release()
        assert left(folder)  # which is the other's
    assert not left(folder)


def test_a_lease_that_somebody_removed_is_taken_again(folder, monkeypatch):
    monkeypatch.setattr(leases, 'RENEW_SECS', 0.1)
    lease = lease_of(folder)
    for name in left(folder):
        (folder / name).unlink()
    for _ in range(100):
        if left(folder):
            break
        time.sleep(0.05)
    lease.check()
    lease.release()
    assert not left(folder)


def test_without_locks_there_is_a_warning_and_a_lease(tmp_path, no_locks, caplog):
    with leases.held(tmp_path):
        assert 'locks no files: .lease is written every 15 s instead' in caplog.text
        assert 'process' in (tmp_path / f'{leases.LEASE}-1').read_text()
        leases.check()
    assert not left(tmp_path)
    own = scratch.Scratch()
    scratch._clear(own.root.parent)
    own.check()


@pytest.mark.parametrize('seed', range(4))
def test_of_many_that_want_a_file_one_has_it(tmp_path, seed):
    """Some die with it; what they leave is taken over by one, and by no other."""
    path, inside, most = lease_file.Path(tmp_path / 'lease'), [], []
    stale = set()  # of the dead

    def one(number: int) -> int:
        rng, taken = random.Random(f'{seed} {number}'), 0
        for turn in range(100):
            mine = f'{number} {turn}'.encode()
            time.sleep(rng.random() * 0.001)
            found = path.object()
            try:
                if found is None:
                    found = path.put(mine, 0)
                elif path.read_bytes() in stale:
                    found = path.put(mine, found.generation)
                else:
                    continue
            except (FileExistsError, FileNotFoundError):
                continue
            inside.append(number)
            most.append(len(inside))
            time.sleep(rng.random() * 0.001)
            found = path.put(mine, found.generation)
            inside.remove(number)
            taken += 1
            if rng.random() < 0.3:
                stale.add(mine)
            else:
                path.unlink(generation=found.generation)
        return taken

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        taken = sum(pool.map(one, range(8)))
    assert taken > 8
    assert max(most) == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_another_generation_is_left_alone(tmp_path):
    path = lease_file.Path(tmp_path / 'lease')
    first = path.put(b'a', 0)
    for wrong in (0, first.generation + 1):
        with pytest.raises(FileExistsError):
            path.put(b'b', wrong)
    with pytest.raises(FileExistsError):
        path.unlink(generation=first.generation + 1)
    assert path.read_bytes() == b'a'
    path.unlink(generation=first.generation)
    with pytest.raises(FileNotFoundError):
        path.put(b'b', first.generation)
    assert path.object() is None


def _stage(source: str, home: str, barrier, found) -> None:
    os.environ['XDG_CACHE_HOME'] = home
    fetched = []
    fetch = staging._Other.fetch

    def slowly(self, name, target):
        fetched.append(name)
        time.sleep(0.1)
        fetch(self, name, target)

    staging._Other.fetch = slowly
    barrier.wait(60)
    local = staging.locate(source, scratch.here('/nowhere'), '', lambda tokens: None, 'train')
    found.put((str(local), fetched))


def test_of_the_processes_of_a_host_one_stages(tmp_path, corpus_file):
    """Each has a GPU; they share a cache, and what is copied there is copied once."""
    _, workdir = helpers.prepared(tmp_path, corpus_file)
    source = f'file://{workdir}/tokens'
    context = multiprocessing.get_context('spawn')
    barrier, queue = context.Barrier(3), context.Queue()
    args = (source, str(tmp_path / 'home'), barrier, queue)
    running = [context.Process(target=_stage, args=args) for _ in range(3)]
    for process in running:
        process.start()
    found = [queue.get(timeout=120) for _ in running]
    for process in running:
        process.join()
        assert process.exitcode == 0
    assert len({local for local, _ in found}) == 1
    assert sorted(len(names) > 0 for _, names in found) == [False, False, True]
