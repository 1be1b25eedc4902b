# SPDX-License-Identifier: Apache-2.0
"""What hosts say to each other."""

import pytest

from gptjax.runtime import alike

SAME = {'commit': 'abc', 'config': {'model': {'d_model': 8}, 'seed': 1}, 'data': {'sets': ['x']}}


@pytest.mark.parametrize(
    ('host', 'facts', 'said'),
    [
        (2, {'commit': 'abd'}, 'host 2 has commit = "abd", where 3 of 4 have "abc"'),
        (
            0,
            {'config': {'model': {'d_model': 9}, 'seed': 1}},
            'host 0 has config.model.d_model = 9',
        ),
        (3, {'config': {'seed': 1}}, 'host 3 has config.model.d_model = null'),
        (1, {'data': {'sets': ['y']}}, 'host 1 has data.sets = ["y"]'),
        (1, {'more': 1}, 'host 1 has more = 1'),
    ],
)
def test_a_host_that_differs_is_named(host, facts, said):
    everybody = [dict(SAME) for _ in range(4)]
    assert alike.differing(everybody) == []
    everybody[host] |= facts
    assert alike.differing(everybody)[0].startswith(said)


def test_clocks():
    assert alike.skew([100.0, 101.0, 99.5, 103.0]) == ''
    assert (
        alike.skew([100.0, 101.0, 160.0]) == 'the clock of host 2 is +59 s off those of most hosts'
    )
    assert 'host 0 is -40 s' in alike.skew([60.0, 100.0, 101.0])
