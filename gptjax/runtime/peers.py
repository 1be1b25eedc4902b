# SPDX-License-Identifier: Apache-2.0
"""A thread that keeps the hosts of a run together while their main threads train.

It says that this host lives, hears whether others do, and ends the process where one has ended:
what is left would wait for it in a collective. What one host wishes, as a stop, it puts off to a
step that is the same for all. Training itself waits for nobody.
"""

import contextlib
import itertools
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from gptjax.runtime import hosts, signals

BEAT_SECS = 2.0
GONE_SECS = 60.0  # after which a host that is not heard of is taken for dead
GRACE_SECS = 3.0  # for a host to end by itself, for the same reason as another
_LEAVE_SECS = 8.0  # that the first host, with whom the service ends, waits for others to end
_LOOK_SECS = 0.2  # between two looks at what others wish
_log = logging.getLogger(__name__)


class Peers:
    """The other hosts, as this one knows them; of one host alone there is no thread."""

    def __init__(self, board: hosts.Board | None = None, me: int = 0, count: int = 1) -> None:
        """Args: board: of the hosts, where there are several. me: of `count` numbers from 0."""
        self._board, self._me, self._count = board, me, count
        self._lock = threading.Lock()  # of what is decided for which step
        self._step = 0
        self._wanted: set[str] = set()
        self._happens: dict[int, set[str]] = {}
        self._round = 0
        self._mine: dict[str, Any] = {'beat': 0, 'ended': None, 'facts': {}}
        # What each host has said, and when that was new.
        self._heard = {host: (dict(self._mine), time.monotonic()) for host in range(count)}
        self._epoch = 0  # how often steps have begun
        self._beaten = -BEAT_SECS
        self._beating = threading.Lock()
        self._ending = False
        self._wake = threading.Event()
        if board is not None:
            threading.Thread(target=self._run, name='peers', daemon=True).start()

    @property
    def is_first(self) -> bool:
        """Whether others end with this host: the service is its."""
        return self._me == 0

    def begin(self, step: int) -> None:
        """Steps begin behind this one; what was wished before is forgotten."""
        with self._lock:
            self._epoch += 1
            self._step = step
            self._wanted.clear()
            self._happens.clear()

    def want(self, what: str) -> None:
        """Wishes that something happens on all hosts soon; once, until it has."""
        with self._lock:
            if not any(what in kinds for kinds in self._happens.values()):
                self._wanted.add(what)
        self._wake.set()

    def after(self, step: int) -> set[str]:
        """What happens after this step, on every host."""
        with self._lock:
            self._step = step
            if self._board is None:
                found, self._wanted = self._wanted, set()
                return found
            return self._happens.pop(step, set())

    def stops(self, place: int, requested: bool) -> bool:
        """Whether all hosts stop at this place of their work, as is requested of any of them.

        Args: place: rises from one call to the next, as after() counts steps.
        """
        if requested:
            self.want('stop')
        return 'stop' in self.after(place)

    @contextlib.contextmanager
    def behind_step(self) -> Iterator[Callable[[bool], bool]]:
        """Of work that all hosts do behind a step: whether it stops here, as any host requests."""
        step, places = self._step, itertools.count()
        self.begin(0)
        try:
            yield lambda requested: self.stops(next(places), requested)
        finally:
            self.begin(step)

    def tell(self, facts: Mapping[str, float]) -> None:
        """Numbers of this host, for told() of others."""
        self._mine['facts'] = dict(facts)

    def told(self) -> dict[int, dict[str, float]]:
        """The newest numbers of every host that has told some, by host."""
        found = {host: said['facts'] for host, (said, _) in list(self._heard.items())}
        found[self._me] = self._mine['facts']
        return {host: facts for host, facts in sorted(found.items()) if facts}

    def ending(self) -> None:
        """This host is about to end by itself, whatever others do."""
        self._ending = True

    def end(self, code: int, line: str = '') -> None:
        """Tells others that this host ends. The first one waits a while for others to end, too.

        Args:
          code: that it ends with; 0 and those of a stop that was agreed upon bring nobody down.
          line: why.
        """
        self._ending = True
        if self._board is None or self._mine['ended']:
            return
        self._mine['ended'] = [code, line]
        begun = time.monotonic()
        with contextlib.suppress(Exception):  # the service may have ended
            self._beat()
            while code and self._me == 0 and time.monotonic() - begun < _LEAVE_SECS:
                if all(said['ended'] for said, _ in self._heard.values()):
                    break
                time.sleep(0.1)
                self._beat()

    def _run(self) -> None:
        while True:
            self._wake.wait(_LOOK_SECS)
            self._wake.clear()
            try:
                self._decide()
                self._beat_if_due()
            except Exception as e:  # the service has ended, or will not answer for now
                _log.debug('peers: %s', e)
                time.sleep(_LOOK_SECS)

    def _decide(self) -> None:
        """One round: who wishes what, at which steps all are, and so after which it happens."""
        folder = f'gptjax/round/{self._round}/'
        with self._lock:
            wanted = ','.join(sorted(self._wanted))
        if wanted:
            self._set_once(f'{folder}wish/0', wanted)
        wishes = self._board.key_value_dir_get(f'{folder}wish/')
        if not wishes:
            return
        with self._lock:  # steps wait until it is known whether something happens after this one
            at = [place.split(':') for place in self._places(f'{folder}at/')]
            if len({epoch for epoch, _ in at}) == 1:  # else one goes back, and will wish again
                kinds = set(wishes[0][1].split(','))
                when = 1 + max(int(step) for _, step in at)
                self._happens.setdefault(when, set()).update(kinds)
                self._wanted -= kinds
        self._round += 1
        if self._round > 1:  # all are here, so all have read the round before
            before = f'gptjax/round/{self._round - 2}/'
            self._board.key_value_delete(f'{before}at/{self._me}')
            if self._me == 0:
                self._board.key_value_delete(f'{before}wish/0')

    def _places(self, folder: str) -> list[str]:
        """Where every host is; once this one has said so, it must learn what that comes to."""
        mine = f'{self._epoch}:{self._step}'
        while True:
            try:
                self._set_once(f'{folder}{self._me}', mine)
                at = self._board.key_value_dir_get(folder)
                if len(at) == self._count:
                    return [place for _, place in at]
                self._beat_if_due()
            except Exception as e:  # the service does not answer for now
                _log.debug('peers: %s', e)
            time.sleep(0.01)

    def _set_once(self, key: str, value: str) -> None:
        try:
            self._board.key_value_set(key, value)
        except Exception as e:
            if 'ALREADY_EXISTS' not in str(e):
                raise

    def _beat_if_due(self) -> None:
        if time.monotonic() - self._beaten >= BEAT_SECS:
            self._beat()
            if not self._ending:
                self._follow()

    def _beat(self) -> None:
        with self._beating:
            self._beaten = time.monotonic()
            self._mine['beat'] += 1
            key = f'gptjax/alive/{self._me}'
            self._board.key_value_set(key, json.dumps(self._mine), allow_overwrite=True)
            found = self._board.key_value_dir_get('gptjax/alive/')
            now = time.monotonic()  # not of before: the service may have let us wait
            for key, text in found:
                host, said = int(key.rpartition('/')[2]), json.loads(text)
                if self._heard[host][0] != said:
                    self._heard[host] = said, now

    def _follow(self) -> None:
        """Ends this process where another host has ended, or is not heard of any more."""
        if self._why() is not None:
            time.sleep(GRACE_SECS)
            self._beat()  # all may have slept, as on a laptop
            if (found := self._why()) is not None and not self._ending:
                self._ending = True
                code, why = found
                signals.leave(code, why if code == signals.STOPPED else f'error: {why}')

    def _why(self) -> tuple[int, str] | None:
        """The code to end with, and why, where another host is no more."""
        for host, (said, since) in self._heard.items():
            silent = time.monotonic() - since
            if said['ended'] and said['ended'][0]:
                code, line = said['ended']
                return code, f'{hosts.named([host])} has ended: {line}'
            if not said['ended'] and silent > GONE_SECS and host != self._me:
                return 1, (
                    f'{hosts.named([host])} has not been heard of for {silent:.0f} s: killed, or '
                    'cut off; run the same command again'
                )
        return None


_peers = Peers()


def join(board: hosts.Board, me: int, count: int) -> None:
    """Begins to keep this host together with others."""
    global _peers
    _peers = Peers(board, me, count)
    signals.at_end(_at_end)


def here() -> Peers:
    """The hosts of this process."""
    return _peers


def _at_end() -> None:
    """Of a process that signals.leave() ends: others need not wait to notice."""
    code = signals.code()
    why = 'it was stopped' if code == signals.STOPPED else 'see its log'
    ending = threading.Thread(target=_peers.end, args=(code or 0, why), daemon=True)
    ending.start()  # the service may not answer; it ends with the first host
    waits = code != signals.STOPPED or _peers.is_first
    ending.join(_LEAVE_SECS + 2.0 if waits else 2.0)
