# SPDX-License-Identifier: Apache-2.0
"""The hosts of a run: which of them this is, and what they decide together.

They talk through JAX's coordination service, not through their devices: nothing waits behind a step
there, and who is missing is known.
"""

import itertools
import json
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeVar, runtime_checkable

from gptjax.configs import errors

LIMIT_SECS = 3600.0  # so long hosts wait for others: storage has been that slow, and recovered
SAID_SECS = 60.0  # so often it is said who is missing
_PART = 2**18  # letters of a long text that are sent at once
_POLL_SECS = 0.001, 0.1  # between two looks, at first and at most
_log = logging.getLogger(__name__)
T = TypeVar('T')
_numbers = itertools.count()


@runtime_checkable
class Board(Protocol):
    """What hosts write to and read: the client of JAX's coordination service."""

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None: ...
    def key_value_dir_get(self, key: str) -> Sequence[tuple[str, str]]: ...
    def key_value_delete(self, key: str) -> None: ...


def board() -> Board:
    """Raises UsageError where the hosts were not joined."""
    from jax._src import distributed  # jax gives its client out nowhere else

    client = distributed.global_state.client
    errors.require(
        client is not None, 'there are several processes: give all of them --distributed'
    )
    return client


def is_first() -> bool:
    """Whether this is the first of the hosts of a run: the one that writes files."""
    import jax

    return jax.process_index() == 0


def is_alone() -> bool:
    """Whether this is the only host of a run."""
    import jax

    return jax.process_count() == 1


def everybody(text: str, what: str) -> list[str]:
    """The text of every host, in their order; each of them calls this at the same place.

    Args:
      what: they do together, as 'the checkpoint of step 5': said of hosts that do not come.

    Raises:
      InputError: some have not come for an hour; it names them.
    """
    import jax

    if is_alone():
        return [text]
    number, mine, service = next(_numbers), jax.process_index(), board()
    service.key_value_set(f'gptjax/said/{number}/{mine}', text)
    found = awaited(service, f'gptjax/said/{number}/', jax.process_count(), what)
    if number:  # whoever has said this has read all that was said before
        service.key_value_delete(f'gptjax/said/{number - 1}/{mine}')
    return found


def awaited(service: Board, folder: str, count: int, what: str) -> list[str]:
    """What `count` hosts write into a folder of the board, in their order. As everybody()."""
    begun = said = time.monotonic()
    wait, most = _POLL_SECS[0], _POLL_SECS[1] * max(1.0, count / 32)
    while True:
        found = {
            int(key.rpartition('/')[2]): text for key, text in service.key_value_dir_get(folder)
        }
        if len(found) == count:
            return [found[number] for number in range(count)]
        now = time.monotonic()
        if now - said >= SAID_SECS:
            said = now
            missing = named(set(range(count)) - set(found))
            line = f'{missing} of {count} is waited for since {now - begun:.0f} s: {what}'
            _log.warning('%s', line)
            if now - begun >= LIMIT_SECS:
                raise errors.InputError(
                    f'{line}. Look at what it does, and run the same command again on all'
                )
        time.sleep(wait)
        wait = min(1.5 * wait, most)


def named(numbers: Iterable[int]) -> str:
    """Hosts by their numbers, as 'host 3' and 'host 1, 2, 5 and 9 more'."""
    found = sorted(numbers)
    more = f' and {len(found) - 8} more' if len(found) > 8 else ''
    return f'host {", ".join(map(str, found[:8]))}{more}'


def first_says(number: int, what: str = 'the decision of the first host') -> int:
    """The first host's number, on every host."""
    return int(everybody(str(int(number)), what)[0])


def together(work: Callable[[], T], what: str) -> T:
    """work(), which no host goes on from unless all of them can. Raises on all what any raised."""
    try:
        found, error = work(), None
    except Exception as e:
        found, error = None, e
    if agreed(error is not None, what=what)[0]:
        raise error or errors.InputError(f'{what} has failed on another host; see its log')
    return found


def first_text(text: str, what: str) -> str:
    """The first host's text, on every host, however long it is."""
    if is_alone():
        return text
    size = first_says(len(text), what)
    parts = [
        everybody(text[start : start + _PART] if is_first() else '', what)[0]
        for start in range(0, size, _PART)
    ]
    return ''.join(parts)


def agreed(*decisions: bool, what: str = 'a decision of all hosts') -> tuple[bool, ...]:
    """Each decision, true where it is on any host: what one host does alone, others wait for."""
    said = everybody(json.dumps([bool(decision) for decision in decisions]), what)
    return tuple(any(on) for on in zip(*map(json.loads, said), strict=True))
