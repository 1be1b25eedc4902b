# SPDX-License-Identifier: Apache-2.0
"""Hosts of a run say to each other what they run before anything is computed."""

import collections
import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import numpy as np

from gptjax.configs import errors
from gptjax.runtime import hosts, program

_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy', 'grain')
_SKEW_SECS = 10.0  # by which clocks may differ unsaid
_log = logging.getLogger(__name__)


def check_same(**facts: Any) -> None:
    """Compares the commit, the versions of packages, and facts, as JSON, between all hosts.

    Raises:
      InputError: a host differs from most; on every host, with the number of that one.
    """
    if hosts.is_alone():
        return
    mine = {'commit': program.commit(), 'packages': _versions(), **facts}
    text = json.dumps(mine, sort_keys=True)
    if len(set(hosts.everybody(hashlib.sha256(text.encode()).hexdigest(), 'its start'))) > 1:
        said = [json.loads(theirs) for theirs in hosts.everybody(text, 'what it runs')]
        for line in differing(said):
            raise errors.InputError(f'{line}; give all hosts the same, and start them again')
    clocks = hosts.everybody(str(time.time()), 'its clock')  # at one moment, more or less
    if line := skew([float(clock) for clock in clocks]):
        _log.warning('%s', line)


def differing(said: Sequence[Mapping[str, Any]]) -> list[str]:
    """What hosts say differently, a line a thing. Args: said: by each host, in their order."""
    flat = [_flat(facts) for facts in said]
    found = []
    for name in sorted(set().union(*flat)):
        values = [json.dumps(facts.get(name)) for facts in flat]
        usual, number = collections.Counter(values).most_common(1)[0]
        others = [(host, value) for host, value in enumerate(values) if value != usual]
        if others:
            host, value = others[0]
            more = f', as {len(others) - 1} more do' if len(others) > 1 else ''
            found.append(
                f'host {host} has {name} = {value[:80]}{more}, where {number} of {len(said)} have '
                f'{usual[:80]}'
            )
    return found


def skew(times: Sequence[float]) -> str:
    """What is to be said of clocks that differ; '' = nothing."""
    middle = float(np.median(times))
    host = int(np.argmax(np.abs(np.array(times) - middle)))
    if abs(times[host] - middle) <= _SKEW_SECS:
        return ''
    return f'the clock of host {host} is {times[host] - middle:+.0f} s off those of most hosts'


def _flat(said: Mapping[str, Any], above: str = '') -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in said.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f'{above}{name}.')
        else:
            found[above + name] = value
    return found


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = 'none'
    return found
