# SPDX-License-Identifier: Apache-2.0
"""Which host is slow, waits for data, or uses most memory: a few numbers in every row."""

import statistics
from collections.abc import Mapping

from gptjax.runtime import peers

# What is compared between hosts -> how it is called there.
_COMPARED = {
    'perf/step_secs_p90': 'step_secs',
    'perf/step_secs_max': 'longest_step_secs',
    'perf/data_wait': 'data_wait',
    'perf/memory_peak_bytes': 'memory_peak_bytes',
}


def compared(mine: Mapping[str, float]) -> dict[str, float]:
    """Tells others what this host has measured; what all have told last, {} of one host alone.

    Returns:
      of each number the median, the highest, and which host has that: hosts/data_wait,
      hosts/data_wait_max, hosts/data_wait_max_host. Others' may be a few seconds old.
    """
    here = peers.here()
    here.tell({name: mine[name] for name in _COMPARED if name in mine})
    return _summary(here.told())


def _summary(told: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    found: dict[str, float] = {}
    if len(told) < 2:
        return found
    for name, said in _COMPARED.items():
        values = {host: facts[name] for host, facts in told.items() if name in facts}
        if values:
            host = max(values, key=values.__getitem__)
            found |= {
                f'hosts/{said}': statistics.median(values.values()),
                f'hosts/{said}_max': values[host],
                f'hosts/{said}_max_host': host,
            }
    return found
