# SPDX-License-Identifier: Apache-2.0
"""What a program gives a run: how it is made, and how its states are scored."""

import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from gptjax.training import claim
from gptjax.training import plan as plan_lib
from gptjax.training import step as step_lib


class Evaluation(NamedTuple):
    """How a state is scored: the names of the scores there will be, and the scores.

    A score that is None is missing. notes: what must stand beside scores, by what is scored.
    scores() calls its second argument now and then, and ends with what that raises.
    """

    names: Sequence[str]
    scores: Callable[[step_lib.State, Callable[[], None]], Mapping[str, float | None]]
    notes: Mapping[str, str] = types.MappingProxyType({})


class Recipe(NamedTuple):
    """What a run is made by.

    plan: which examples the steps read. target: of step.abstract(). options: of its steps.
    evaluation: how its states are scored. head: of models.heads.HEADS. tokenizer: its fingerprint.
    data: what must be the same whenever the run goes on. flops_per_token: of training. rate_of: the
    learning rates of a run of another length.
    """

    plan: plan_lib.Plan
    target: step_lib.State
    options: step_lib.Options
    evaluation: Evaluation
    head: str
    tokenizer: str
    data: Mapping[str, Any]
    flops_per_token: float
    rate_of: claim.RateOf
