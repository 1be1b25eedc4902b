# SPDX-License-Identifier: Apache-2.0
"""A run that goes on where another one was, with another config: its first steps are the other's.

What was done before is not done again: parameters, moments and average are those of the other
run's checkpoint; steps and tokens are counted on, so that learning rates are those of a run whose
first steps were the other's; and of every training set the windows come that have not come yet.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from gptjax.configs import errors, upgrade
from gptjax.data import loader
from gptjax.runtime import checkpoint
from gptjax.training import plan as plan_lib

_WHICH = re.compile(r'(@\d+|/checkpoints/\d+|/best)?/*$')  # of a run's states, behind its workdir
NAME = 'branch'  # of the entry in a checkpoint's data
# Fields of the optim section by which states differ in their arrays.
_OF_STATE = ('optimizer', 'mu_dtype', 'nu_dtype', 'frozen')


@dataclasses.dataclass(frozen=True)
class Branch:
    """Where a run has branched off.

    Attributes:
      origin: the run and its step, as 'runs/wsd@9000'; then where that one had branched off, if it
        had, and so on.
      step: how many updates were done.
      stages: the (first step, windows a step) of those updates.
      skipped: the windows left out so far, as Plan.skipped.
      order: in which order windows come from there on.
    """

    origin: list[str]
    step: int
    stages: list[list[int]]
    skipped: list[list[int]]
    order: dict[str, Any]  # of loader.Order

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def plan(self, own: plan_lib.Plan) -> plan_lib.Plan:
        """The plan of a run whose first steps were the other's, and the rest its own.

        Raises:
          UsageError: it ends before it begins.
        """
        return own.after(self.step, [tuple(each) for each in self.stages], self.skipped)


def kept(workdir: str | pathlib.Path) -> Branch | None:
    """Where the run in a workdir branched off, by its newest checkpoint; None = nowhere."""
    found = checkpoint.peek(workdir).get('data', {}).get(NAME)
    return Branch(**found) if found else None


def off(
    path: str,
    meta: Mapping[str, Any],
    optim: Mapping[str, Any],
    digests: Sequence[str],
    weights: Sequence[float],
) -> Branch:
    """A new branch.

    Args:
      path: of the other run's weights, as init_from names it.
      meta: of its checkpoint.
      optim: the section here, as JSON.
      digests, weights: of the training sets here.

    Raises:
      InputError: there is no run to go on from, or its moments are of another kind.
    """
    if 'data' not in meta or 'windows' not in meta['data']:
        raise errors.InputError(
            f'{path} holds weights alone: there is no state of training to go on from; give '
            '--config.init_state=weights'
        )
    config = json.loads(json.dumps(upgrade.config(meta['config'])))  # as the section here
    step, data = meta['step'], meta['data']
    for name in (*_OF_STATE, 'ema_decay'):
        there, here = config['optim'][name], optim[name]
        same = bool(there) == bool(here) if name == 'ema_decay' else there == here
        if not same:
            raise errors.InputError(
                f'moments cannot be taken over: {errors.both(f"optim.{name}", there, here)}; make '
                'it the same, or give --config.init_state=weights'
            )
    before = Branch(**data[NAME]) if NAME in data else None
    own = plan_lib.of_tokens(plan_lib.Config(**config['batch']), config['model']['n_ctx'], 2**60)
    plan = own.after(before.step, before.stages, []) if before else own
    order = loader.Order(**before.order) if before else loader.from_start(len(data['sets']))
    there = [list(data['sets']), list(config['data']['weights'])]
    if there != [list(digests), list(weights)]:
        order = loader.mixed_anew(order, *there, data['windows'], digests)
    return Branch(
        origin=[f'{_WHICH.sub("", path)}@{step}', *(before.origin if before else [])],
        step=step,
        stages=[list(each) for each in plan.stages(step)],
        skipped=[list(each) for each in data['skipped']],
        order=order._asdict(),
    )
