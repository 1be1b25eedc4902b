# SPDX-License-Identifier: Apache-2.0
"""Rows of a suite: how seeds are summed up, and what makes prompts the same."""

import dataclasses

import pytest

from gptjax.evals import fewshot, suite


def test_over_seeds_what_one_lacks_is_missing():
    def row(seed, **numbers):
        return {'task': 'piqa', 'k': 1, 'metric': 'accuracy', 'seed': seed} | numbers

    whole = [row(s, value=v, stderr=1.0, clean=v) for s, v in ((0, 40.0), (1, 60.0))]
    (found,) = suite.over_seeds(whole)
    assert (found['value'], found['stderr'], found['clean']) == (50.0, 1.0, 50.0)
    assert found['seed_std'] == pytest.approx(200**0.5)
    assert found['seed'] == [0, 1]
    for name in ('value', 'stderr', 'clean'):
        (lacking,) = suite.over_seeds([whole[0], whole[1] | {name: None}])
        assert lacking[name] is None
        assert (lacking['seed_std'] is None) == (name == 'value')
        assert all(
            lacking[other] == found[other]
            for other in ('value', 'stderr', 'clean')
            if other != name
        )
    assert suite.over_seeds(whole[:1]) == whole[:1]


def test_a_prompt_is_known_by_what_it_says():
    """A field that items may have one day changes nothing of those that leave it alone."""
    asked = fewshot.Prompt(3, 'head', ('one', 'two'), fewshot.Item('context', ('a', 'b')))
    known = suite.digest([asked])
    later = dataclasses.make_dataclass(
        'Later', [('colour', str, 'none')], bases=(fewshot.Item,), frozen=True
    )
    same = dataclasses.replace(asked, item=later('context', ('a', 'b')))
    assert suite.digest([same]) == known
    assert (
        suite.digest([dataclasses.replace(same, item=later('context', ('a', 'b'), colour='red'))])
        != known
    )
    others = [
        dataclasses.replace(asked, number=4),
        dataclasses.replace(asked, shots=('two', 'one')),
        *(
            dataclasses.replace(asked, item=fewshot.Item(*given))
            for given in (('contexts', ('a', 'b')), ('context', ('b', 'a')), ('context', ('a',)))
        ),
    ]
    assert len({known, *(suite.digest([other]) for other in others)}) == 1 + len(others)
