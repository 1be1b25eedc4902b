# SPDX-License-Identifier: Apache-2.0
"""What checkpoints scored, in a file inside each, and which of them is the best.

It comes after the manifest, which does not cover it: a score that cannot be read is a missing one.
"""

import logging
import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from gptjax.storage import buckets, documents

NAME = 'scores.json'
OF_AVERAGE = 'eval_average'  # how names of scores begin that are the average's of the weights
_ONCE = 'best.json'  # where the best one stood for a day, beside the checkpoints
_log = logging.getLogger(__name__)


class Rule(NamedTuple):
    """What makes a checkpoint better than another one: a score by name, and which end of it."""

    score: str
    highest: bool

    def worth(self, scores: Mapping[str, float]) -> float:
        """More for a better checkpoint; -inf where the score is missing."""
        value = scores.get(self.score, math.nan)
        return -math.inf if math.isnan(value) else value if self.highest else -value


def write(checkpoint: buckets.Anywhere, scores: Mapping[str, float]) -> None:
    """Keeps what a checkpoint scored, where there is such a checkpoint."""
    try:
        if checkpoint.is_dir():
            said = {'step': int(checkpoint.name), 'scores': dict(scores)}
            documents.write(checkpoint / NAME, said)
    except OSError as e:
        _log.warning('the scores of %s could not be kept: %s', checkpoint, e)


def is_readable(checkpoint: buckets.Anywhere) -> bool:
    """Whether nothing is said of a checkpoint, or what is said can be read."""
    return _read(checkpoint) is not None


def read(checkpoint: buckets.Anywhere) -> dict[str, float]:
    """What a checkpoint scored; empty where that is unknown."""
    return _read(checkpoint) or {}


def _read(checkpoint: buckets.Anywhere) -> dict[str, float] | None:
    """The same; None where it cannot be read."""
    path = checkpoint / NAME
    path = path if path.exists() else checkpoint.parent / _ONCE
    try:
        found = documents.parse(path.read_bytes(), dict)
        if 'scores' in found and found['step'] != int(checkpoint.name):
            raise ValueError(f'they are of step {found["step"]}')
        found = found.get('scores', found)  # once alone
        if path.name == _ONCE:
            found = {found['name']: found['value']} if int(checkpoint.name) == found['step'] else {}
        return {str(name): float(value) for name, value in found.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as e:
        _log.warning('%s, what a checkpoint scored, cannot be read: %s', path, e)
        return None


def best(checkpoints: Iterable[buckets.Anywhere], rule: Rule) -> buckets.Anywhere | None:
    """The best checkpoint, among equals the first; None where none has the score."""
    worth = {checkpoint: rule.worth(read(checkpoint)) for checkpoint in checkpoints}
    found = max(worth, key=worth.__getitem__, default=None)
    return None if found is None or worth[found] == -math.inf else found
