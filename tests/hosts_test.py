# SPDX-License-Identifier: Apache-2.0
"""Hosts that decide together, meet, and end together: as threads, over a board of their own."""

import concurrent.futures
import os
import random
import socket
import threading
import time

import jax
import pytest
from absl import flags as flags_lib

from gptjax.configs import errors
from gptjax.runtime import by_host, hosts, joining, peers, program, signals, streams
from tests import helpers


class Board:
    """A dictionary that behaves as JAX's coordination service."""

    def __init__(self, slow_secs: float = 0.0) -> None:
        self._values, self._lock, self._slow = {}, threading.Lock(), slow_secs

    def key_value_set(self, key, value, allow_overwrite=False):
        time.sleep(self._slow * random.random())
        with self._lock:
            if key in self._values and not allow_overwrite:
                raise RuntimeError(f'ALREADY_EXISTS: {key}')
            self._values[key] = value

    def key_value_dir_get(self, key):
        time.sleep(self._slow * random.random())
        with self._lock:
            return [(k, v) for k, v in self._values.items() if k.startswith(key)]

    def key_value_delete(self, key):
        with self._lock:
            self._values.pop(key, None)


def together(count, work):
    """What work(number) gives on so many hosts at once."""
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        return [f.result() for f in [pool.submit(work, number) for number in range(count)]]


def test_who_does_not_come_is_named_and_not_waited_for_for_ever(monkeypatch, caplog):
    monkeypatch.setattr(hosts, 'SAID_SECS', 0.1)
    monkeypatch.setattr(hosts, 'LIMIT_SECS', 0.35)
    board = Board()
    for number in (0, 2, 3):
        board.key_value_set(f'here/{number}', 'x')
    with pytest.raises(errors.InputError, match='host 1, 4 of 5 is waited for .* reading step 5'):
        hosts.awaited(board, 'here/', 5, 'reading step 5')
    assert caplog.text.count('host 1, 4 of 5 is waited for') >= 3


def test_hosts_are_named():
    assert hosts.named([3]) == 'host 3'
    assert hosts.named(range(20)) == 'host 0, 1, 2, 3, 4, 5, 6, 7 and 12 more'


@pytest.mark.parametrize('seed', range(8))
def test_what_any_host_wishes_happens_once_after_a_step_of_all(seed, monkeypatch):
    monkeypatch.setattr(peers, '_LOOK_SECS', 0.002)
    rng, count, steps = random.Random(seed), 4, 120
    board = Board(0.002)
    wishes = {(rng.randrange(count), rng.randrange(60)): what for what in ('save', 'stop', 'end')}
    speeds = [rng.uniform(0.0005, 0.003) for _ in range(count)]
    collective = threading.Barrier(count)  # which hosts run a few steps ahead of

    def host(number):
        mine, found = peers.Peers(board, number, count), {}
        mine.begin(0)
        for step in range(1, steps):
            time.sleep(speeds[number])
            if step % 4 == 0:
                collective.wait(60)
            if (number, step - 1) in wishes:
                mine.want(wishes[number, step - 1])
                mine.want(wishes[number, step - 1])  # a wish is one until it is fulfilled
            if happens := mine.after(step):
                found[step] = happens
        mine.begin(10**9)
        return found

    found = together(count, host)
    assert all(each == found[0] for each in found)
    assert sorted(what for kinds in found[0].values() for what in kinds) == ['end', 'save', 'stop']
    for (_, step), what in wishes.items():
        assert min(s for s, kinds in found[0].items() if what in kinds) > step


def test_alone_a_wish_is_fulfilled_at_once():
    alone = peers.Peers()
    assert alone.after(1) == set()
    alone.want('save')
    assert alone.after(2) == {'save'}
    assert alone.after(3) == set()


@pytest.fixture
def left(monkeypatch):
    found = []
    monkeypatch.setattr(signals, 'leave', lambda code, line: found.append((code, line)))
    monkeypatch.setattr(peers, 'BEAT_SECS', 0.02)
    monkeypatch.setattr(peers, 'GRACE_SECS', 0.05)
    monkeypatch.setattr(peers, '_LOOK_SECS', 0.01)
    monkeypatch.setattr(peers, '_LEAVE_SECS', 0.3)
    return found


def until(what):
    for _ in range(500):
        if what():
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize(
    ('code', 'said'),
    [
        (1, (1, 'error: host 1 has ended: error: no such file')),
        (75, (75, 'host 1 has ended: error: no such file')),
    ],
)
def test_where_one_ends_with_an_error_the_others_end(left, code, said):
    all_ = [peers.Peers(board, number, 3) for board in [Board()] for number in range(3)]
    assert until(lambda: all(len(host._heard) == 3 for host in all_))
    assert left == []
    all_[1].end(code, 'error: no such file')
    assert until(lambda: len(left) == 2)
    assert left == [said, said]


def test_where_one_ends_well_nobody_else_does(left):
    all_ = [peers.Peers(board, number, 3) for board in [Board()] for number in range(3)]
    assert until(lambda: all(len(host._heard) == 3 for host in all_))
    all_[1].end(0)
    time.sleep(0.3)
    assert left == []


def test_a_host_that_is_not_heard_of_is_named(left, monkeypatch):
    monkeypatch.setattr(peers, 'GONE_SECS', 0.5)
    board = Board()
    board.key_value_set('gptjax/alive/1', '{"beat": 3, "ended": null, "facts": {}}')
    peers.Peers(board, 0, 2)
    assert until(lambda: left)
    assert left[0][0] == 1
    assert left[0][1].startswith('error: host 1 has not been heard of for')


def test_numbers_of_hosts(left):
    all_ = [peers.Peers(board, number, 3) for board in [Board()] for number in range(3)]
    for number, host in enumerate(all_):
        host.tell({'wait': number / 10})
    expected = {number: {'wait': number / 10} for number in range(3)}
    assert until(lambda: all(host.told() == expected for host in all_))


def test_who_is_slow_is_named():
    told = {h: {'perf/data_wait': [0.1, 0.7, 0.2][h], 'perf/step_secs_p90': 1.0} for h in range(3)}
    found = by_host._summary(told)
    assert (found['hosts/data_wait_max'], found['hosts/data_wait_max_host']) == (0.7, 1)
    assert found['hosts/data_wait'] == 0.2
    assert by_host._summary({0: told[0]}) == {}


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(('localhost', 0))
        return free.getsockname()[1]


def met(port, places, secs):
    def host(index):
        number, count, late = places[index]
        time.sleep(late)
        try:
            joining.meet(joining.Place(f'localhost:{port}', count, number), secs)
        except errors.InputError as e:
            return str(e)
        return 'met'

    return together(len(places), host)


def test_hosts_meet_whoever_comes_first(port):
    assert met(port, [(0, 4, 0.6), (1, 4, 0.0), (2, 4, 0.3), (3, 4, 0.9)], 20) == ['met'] * 4


def test_a_host_that_does_not_come_is_named_by_all(port):
    found = met(port, [(0, 4, 0.0), (2, 4, 0.0)], 2)
    assert found[0].startswith('host 1, 3 of 4 did not come within 2 s (--join_timeout)')
    assert found[1] == f'host 0 says: {found[0]}'
    assert 'host 0 (localhost:' in met(port, [(1, 2, 0.0)], 1.2)[0]


def test_hosts_that_do_not_agree_on_their_numbers(port):
    found = met(port, [(0, 3, 0.0), (1, 3, 0.1), (1, 3, 0.5)], 20)
    assert all('two hosts were given --process=1' in each for each in found)
    found = met(port, [(0, 2, 0.0), (1, 4, 0.1)], 20)
    assert all('host 1 was given --processes=4, host 0 2' in each for each in found)


def test_strangers_at_the_port_and_hosts_begun_again(port):
    def stranger():
        time.sleep(0.3)
        with socket.create_connection(('localhost', port)) as one:
            one.sendall(b'GET / HTTP/1.1\r\n\r\n')
        with socket.create_connection(('localhost', port)) as one:
            one.sendall(b'gptjax host 1 3\n')  # and is killed

    asking = threading.Thread(target=stranger)
    asking.start()
    assert met(port, [(0, 3, 0.0), (2, 3, 1.0), (1, 3, 1.2)], 20) == ['met'] * 3
    asking.join()


@pytest.mark.parametrize('address', ['localhost', 'localhost:', ':80x', 'host:port'])
def test_an_address_that_is_none(address):
    with pytest.raises(errors.UsageError, match='is no <host>:<port>'):
        joining.meet(joining.Place(address, 2, 1), 1)


@pytest.mark.parametrize(
    ('flags', 'there', 'found'),
    [
        ((), {}, {'XLA_CLIENT_MEM_FRACTION': '0.75'}),
        ((), {'XLA_PYTHON_CLIENT_MEM_FRACTION': '.5'}, {'XLA_PYTHON_CLIENT_MEM_FRACTION': '.5'}),
        ((), {'XLA_CLIENT_MEM_FRACTION': '.5'}, {'XLA_CLIENT_MEM_FRACTION': '.5'}),
        (
            ('--gpu_memory_fraction=0.4',),
            {'XLA_PYTHON_CLIENT_MEM_FRACTION': '.5'},
            {'XLA_CLIENT_MEM_FRACTION': '0.4'},
        ),
    ],
)
def test_memory_of_gpus_is_shared_as_said(monkeypatch, flags, there, found):
    """JAX refuses its old variable and its new one together."""
    values = flags_lib.FlagValues()
    program._define(values, lambda values: None, True)
    values(['program', *flags])
    monkeypatch.setattr(os, 'environ', dict(there))
    program._share_memory(values['gpu_memory_fraction'])
    assert os.environ == found


@pytest.mark.parametrize(
    ('flags', 'said'),
    [
        (('--local_device_ids=0',), 'is for processes that share a machine'),
        (('--coordinator=localhost:1', '--processes=2', '--local_device_ids=a'), 'must be numbers'),
        (('--coordinator=localhost:1', '--processes=2', '--local_device_ids=-1'), 'be numbers'),
        (('--gpu_memory_fraction=2',), 'gpu_memory_fraction'),
    ],
)
def test_devices_of_a_process_that_cannot_be(config_file, tmp_path, flags, said):
    found = helpers.run_program(
        'evaluate', f'--config={config_file}', f'--workdir={tmp_path}', *flags
    )
    assert found.returncode == 2, found.stderr
    assert said in found.stderr.splitlines()[-1]


def test_each_process_is_given_its_devices(monkeypatch):
    """Two of a machine, as a launcher of one process a GPU starts them."""
    given = []
    monkeypatch.setattr(joining, 'meet', lambda place, secs: None)
    monkeypatch.setattr(jax.distributed, 'initialize', lambda *args, **_: given.append(args))
    for name in ('several_hosts', 'install'):
        monkeypatch.setattr(signals, name, lambda: None)
    monkeypatch.setattr(peers, 'join', lambda *args: None)
    monkeypatch.setattr(hosts, 'board', lambda: None)
    monkeypatch.setattr(streams, 'silence', lambda: None)
    for number in range(2):
        joining.join(joining.Place('localhost:1', 2, number), 1.0, [number])
    joining.join(joining.Place('localhost:1', 2, 1), 1.0, [])
    assert given == [
        ('localhost:1', 2, 0, [0]),
        ('localhost:1', 2, 1, [1]),
        ('localhost:1', 2, 1, None),
    ]
