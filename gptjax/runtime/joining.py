# SPDX-License-Identifier: Apache-2.0
"""Hosts come together before JAX joins them: one that does not come is named, by its number.

JAX's own connection ends the process with a trace of C++ where a host is missing. So the hosts meet
at the coordinator's port first: each says its number to the first host, which says when all are
there, and then leaves the port to JAX.
"""

import contextlib
import logging
import os
import select
import socket
import time
from typing import NamedTuple

from gptjax.configs import errors
from gptjax.runtime import hosts, peers, signals, streams

_HEARTBEAT_SECS = 100  # JAX's, whose end of a process is abrupt: peers notice a lost host earlier
_HELLO, _GO = 'gptjax host', 'go'
_SAID_SECS = 30.0  # so often it is said who is missing
_log = logging.getLogger(__name__)


class Place(NamedTuple):
    """coordinator: host:port of host 0; '' = not said. count: of hosts. number: of this one."""

    coordinator: str
    count: int
    number: int


def join(place: Place, timeout_secs: float, local_devices: list[int]) -> None:
    """Joins this process to the other hosts of a run, once all of them are there.

    Args:
      place: among them; without a coordinator as the cluster says (TPU VMs, Slurm, Open MPI).
      timeout_secs: how long hosts wait for each other.
      local_devices: numbers of this machine's GPUs that are this process's; none = all, or as the
        cluster says.

    Raises:
      UsageError: no cluster is recognised, or hosts disagree about their number.
      InputError: a host did not come; it is named.
    """
    import jax

    devices = None
    if not place.coordinator:  # JAX_COORDINATOR_ADDRESS counts, as for JAX
        place, devices = _detected(timeout_secs)
    errors.require(
        0 <= place.number < place.count,
        f'--process={place.number} is none of --processes={place.count}: they count from 0',
    )
    meet(place, timeout_secs)
    jax.distributed.initialize(
        *place, local_devices or devices, heartbeat_timeout_seconds=_HEARTBEAT_SECS
    )
    signals.several_hosts()
    signals.install()  # the connection takes SIGTERM for itself
    if place.count > 1:
        peers.join(hosts.board(), place.number, place.count)
    if place.number:
        streams.silence()  # the first host prints


def part() -> None:
    """Waits for the other hosts to come to their end, too, which all of them have agreed upon."""
    import jax

    with contextlib.suppress(Exception):  # of hosts that are gone
        jax.distributed.shutdown()


def meet(place: Place, timeout_secs: float) -> None:
    """Returns on every host once all are there. As join()."""
    if place.count > 1:
        (_gather if place.number == 0 else _report)(place, timeout_secs)


def _detected(timeout_secs: float) -> tuple[Place, list[int] | None]:
    """What the cluster says, and which devices are this process's (None = all)."""
    from jax._src import clusters  # as jax.distributed.initialize() asks

    try:
        *found, devices = clusters.ClusterEnv.auto_detect_unset_distributed_params(
            os.environ.get('JAX_COORDINATOR_ADDRESS'), None, None, None, None, int(timeout_secs)
        )
    except Exception as e:  # of metadata servers, environment variables
        found, devices, why = [None], None, f': {e}'
    else:
        why = ''
    if None in found:
        raise errors.UsageError(
            f'--distributed could not find other hosts{why}. It finds them by itself on TPU VMs, '
            'under Slurm and under Open MPI; elsewhere give --coordinator=<host>:<port>, '
            '--processes and --process'
        )
    return Place(*found), devices


def _address(place: Place) -> tuple[str, int]:
    host, _, port = place.coordinator.rpartition(':')
    errors.require(
        bool(host) and port.isdigit(),
        f'--coordinator={place.coordinator} is no <host>:<port>, as 10.0.0.2:8476',
    )
    return host.strip('[]'), int(port)


def _gather(place: Place, timeout_secs: float) -> None:
    """Of the first host: waits for the others, and tells them how it ended."""
    _, port = _address(place)
    try:
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        server = socket.create_server(('', port), family=family, dualstack_ipv6=both)
    except OSError as e:
        raise errors.InputError(
            f'the port of --coordinator={place.coordinator} cannot be used ({e.strerror}): end '
            'what uses it, or name another one, the same on all hosts'
        ) from e
    come: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(server)
        said = ''  # they ask again
        try:
            _wait(place, timeout_secs, server, come, stack)
            said = _GO
        except errors.InputError as e:
            said = str(e)
            raise
        finally:
            for host in come.values():
                with contextlib.suppress(OSError):
                    host.sendall(f'{said}\n'.encode())


def _wait(
    place: Place,
    timeout_secs: float,
    server: socket.socket,
    come: dict[int, socket.socket],
    stack: contextlib.ExitStack,
) -> None:
    """Fills `come` with the connection of every other host, by number."""
    patience = _Patience(timeout_secs)
    while True:
        for number in [number for number, host in come.items() if not _is_open(host)]:
            del come[number]  # ended, and may be started again
        if len(come) == place.count - 1:
            return
        missing = hosts.named(set(range(1, place.count)) - set(come))
        left = patience.with_(f'{missing} of {place.count}')
        if not select.select([server], [], [], min(1.0, left))[0]:
            continue
        host = stack.enter_context(server.accept()[0])
        host.settimeout(2.0)
        try:
            number, count = _said_numbers(_line(host))
        except (OSError, ValueError):  # none of ours, or gone again
            host.close()
            continue
        if count != place.count or (number in come and _is_open(come[number])):
            what = (
                f'host {number} was given --processes={count}, host 0 {place.count}'
                if count != place.count
                else f'two hosts were given --process={number}'
            )
            come[-1 - number] = host  # is told, too
            raise errors.UsageError(f'{what}: give each its own number, and all the same count')
        come[number] = host


def _report(place: Place, timeout_secs: float) -> None:
    """Of any other host: says its number, and waits for the first one's word."""
    address, patience = _address(place), _Patience(timeout_secs)
    while True:
        patience.with_(f'host 0 ({place.coordinator})')
        try:
            with socket.create_connection(address, timeout=5.0) as first:
                first.sendall(f'{_HELLO} {place.number} {place.count}\n'.encode())
                first.settimeout(timeout_secs + 5.0)  # it says in time how that ended
                line = _line(first)
        except OSError:  # not there yet, or ended again
            time.sleep(0.5)
            continue
        if line == _GO:
            return
        if line:
            raise errors.InputError(f'host 0 says: {line}')
        time.sleep(0.5)  # it was ended


class _Patience:
    """How long hosts are waited for; now and then it is said which."""

    def __init__(self, secs: float) -> None:
        self._secs, self._begun, self._said = secs, time.monotonic(), time.monotonic()

    def with_(self, who: str) -> float:
        """The seconds that are left. Raises InputError where they are over: it names who."""
        now = time.monotonic()
        if now - self._begun >= self._secs:
            raise errors.InputError(
                f'{who} did not come within {now - self._begun:.0f} s (--join_timeout): look at '
                'its log, and start all hosts again'
            )
        if now - self._said >= _SAID_SECS:
            self._said = now
            _log.info('waiting for %s', who)
        return self._begun + self._secs - now


def _said_numbers(line: str) -> tuple[int, int]:
    """Which host says hello, and of how many. Raises ValueError where none does."""
    if not line.startswith(_HELLO):
        raise ValueError(line)
    number, count = map(int, line.removeprefix(_HELLO).split())
    return number, count


def _line(connection: socket.socket) -> str:
    """The first line that the other end says, '' where it ends without one."""
    with connection.makefile(encoding='utf-8', errors='replace') as file:
        return file.readline(1000).rstrip('\n')


def _is_open(connection: socket.socket) -> bool:
    """Whether the other end still waits: it says nothing more, so what can be read is its end."""
    return not select.select([connection], [], [], 0)[0]
