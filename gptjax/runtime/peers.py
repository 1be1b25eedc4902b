# SPDX-License-Identifier: Apache-2.0
"""A thread that keeps the hosts of a run together while their main threads train.

It says that this host lives, hears whether others do, and ends the process where one has ended:
what is left would wait for it in a collective. What one host wishes, as a stop, it puts off to a
step that is the same for all. Training itself waits for nobody.
"""

import json
import logging
import threading
import time
from collections.abc import Mapping
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
        self._heard: dict[int, tuple[dict[str, Any], float]] = {}  # by host, and when it was new
        self._beaten = -BEAT_SECS
        self._beating = threading.Lock()
        self._ending = False
        self._wake = threading.Event()
        if board is not None:
            threading.Thread(target=self._run, name='peers', daemon=True).start()

    def begin(self, step: int) -> None:
        """Steps begin behind this one; what was wished before is forgotten."""
        with self._lock:
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

    def tell(self, facts: Mapping[str, float]) -> None:
        """Numbers of this host, for told() of others."""
        self._mine['facts'] = dict(facts)
        self._beaten = -BEAT_SECS
        self._wake.set()

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
        if self._board is None:
            return
        self._mine['ended'] = [code, line]
        self._beat()
        begun = time.monotonic()
        while code and self._me == 0 and time.monotonic() - begun < _LEAVE_SECS:
            others = [said for host, (said, _) in list(self._heard.items()) if host != self._me]
            if len(others) == self._count - 1 and all(said['ended'] for said in others):
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
            self._set_once(f'{folder}at/{self._me}', str(self._step))
            while len(at := self._board.key_value_dir_get(f'{folder}at/')) < self._count:
                self._beat_if_due()
                time.sleep(0.01)
            kinds = set(wishes[0][1].split(','))
            when = 1 + max(int(step) for _, step in at)
            self._happens.setdefault(when, set()).update(kinds)
            self._wanted -= kinds
        if self._round:  # all are here, so all have read the round before
            before = f'gptjax/round/{self._round - 1}/'
            self._board.key_value_delete(f'{before}at/{self._me}')
            if self._me == 0:
                self._board.key_value_delete(f'{before}wish/0')
        self._round += 1

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
            self._beaten = now = time.monotonic()
            self._mine['beat'] += 1
            key = f'gptjax/alive/{self._me}'
            self._board.key_value_set(key, json.dumps(self._mine), allow_overwrite=True)
            for key, text in self._board.key_value_dir_get('gptjax/alive/'):
                host, said = int(key.rpartition('/')[2]), json.loads(text)
                if host not in self._heard or self._heard[host][0] != said:
                    self._heard[host] = said, now

    def _follow(self) -> None:
        """Ends this process where another host has ended, or is not heard of any more."""
        now = time.monotonic()
        for host, (said, since) in list(self._heard.items()):
            if host == self._me:
                continue
            if said['ended'] and said['ended'][0]:
                code, line = said['ended']
                self._leave(code, f'{hosts.named([host])} has ended: {line}')
            elif not said['ended'] and now - since > GONE_SECS:
                self._leave(
                    1,
                    f'{hosts.named([host])} has not been heard of for {now - since:.0f} s: killed, '
                    'or cut off; run the same command again',
                )

    def _leave(self, code: int, why: str) -> None:
        time.sleep(GRACE_SECS)
        if not self._ending:
            self._ending = True
            signals.leave(code, why if code == signals.STOPPED else f'error: {why}')


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
    _peers.end(code or 0, 'it was stopped' if code == signals.STOPPED else 'see its log')
