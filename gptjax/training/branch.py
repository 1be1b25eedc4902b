# SPDX-License-Identifier: Apache-2.0
"""A run that goes on where another one was, with another config: its first steps are the other's.

What was done before is not done again: parameters, moments and average are those of the other
run's checkpoint; steps and tokens are counted on, so that learning rates are those of a run whose
first steps were the other's; and of every training set the windows come that have not come yet.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from gptjax.configs import errors, upgrade
from gptjax.data import loader
from gptjax.runtime import checkpoint, hosts
from gptjax.training import plan as plan_lib

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

    def plan(self, own: plan_lib.Plan) -> plan_lib.Plan:
        """The plan of a run whose first steps were the other's, and the rest its own.

        Raises:
          UsageError: it ends before it begins.
        """
        return own.after(self.step, self.stages, self.skipped)


def kept(workdir: str | pathlib.Path) -> Branch | None:
    """Where the run in a workdir branched off, by its newest checkpoint; None = nowhere.

    On every host what the first one finds.
    """
    found = checkpoint.peek(workdir).get('data', {}).get(NAME)
    said = hosts.first_text(json.dumps(found), 'the branch that a run is')
    return Branch(**json.loads(said)) if said != 'null' else None


def off(
    run: str,
    meta: Mapping[str, Any],
    here: Mapping[str, Any],
    digests: Sequence[str],
) -> Branch:
    """A new branch.

    Args:
      run: the other one's workdir.
      meta: of its checkpoint.
      here: the config of the new run, as JSON.
      digests: of the training sets here.

    Raises:
      InputError: there is no run to go on from, or its moments are of another kind.
    """
    data = meta.get('data', {})
    if not {'windows', 'sets'} <= data.keys():
        raise errors.InputError(
            f'{run} holds weights, not a run of pre-training to go on from; give '
            '--config.init_state=weights'
        )
    there, step = json.loads(json.dumps(upgrade.config(meta['config']))), meta['step']
    pairs = {f'optim.{name}': [each['optim'][name] for each in (there, here)] for name in _OF_STATE}
    pairs['optim.ema_decay > 0'] = [each['optim']['ema_decay'] > 0 for each in (there, here)]
    pairs['seed'] = [there['seed'], here['seed']]  # by which windows are in another order
    for name, (one, other) in pairs.items():
        if one != other:
            raise errors.InputError(
                f'the state of {run} does not fit: {errors.both(name, one, other)}; make it the '
                'same, or give --config.init_state=weights'
            )
    before = Branch(**data[NAME]) if NAME in data else None
    own = plan_lib.of_tokens(plan_lib.Config(**there['batch']), there['model']['n_ctx'], 2**60)
    plan = own.after(before.step, before.stages, []) if before else own
    order = loader.Order(**before.order) if before else loader.from_start(len(data['sets']))
    mixed = [list(data['sets']), list(there['data']['weights'])]
    if mixed != [list(digests), list(here['data']['weights'])]:
        order = loader.mixed_anew(order, *mixed, data['windows'], digests)
    return Branch(
        origin=[f'{run}@{step}', *(before.origin if before else [])],
        step=step,
        stages=[list(each) for each in plan.stages(step)],
        skipped=[list(each) for each in data['skipped']],
        order=order._asdict(),
    )
