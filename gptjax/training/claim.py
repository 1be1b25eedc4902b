# SPDX-License-Identifier: Apache-2.0
"""Whether a workdir is this run's: the same config as far as it makes a run, and the same data."""

import logging
import pathlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.configs import errors, upgrade

_log = logging.getLogger(__name__)
LENGTH = ('train.total_tokens', 'train.total_epochs')
# (total_tokens, total_epochs) -> step -> learning rate
RateOf = Callable[[int, float], Callable[[jax.Array], jax.Array]]
_TOLD = (('model', 'compute_dtype'),)  # that may change, and changes the numbers a little
_DATA = {  # what of the data must be the same, in words
    'sets': 'was trained on other token shards than those in data.sets now',
    'branch': 'branched off another state',
}


def check(
    workdir: pathlib.Path,
    meta: Mapping[str, Any],
    config: Mapping[str, Any],
    reads: Sequence[str],
    data: Mapping[str, Any],
    may_differ: Collection[str] = (),
) -> None:
    """Compares with a checkpoint.

    Args:
      meta: of the checkpoint.
      config: of now, as JSON.
      reads: sections and top-level fields of the config that the program reads.
      data: what must be the same of the data; what the checkpoint does not say came later.
      may_differ: fields that need not be the same.

    Raises:
      InputError: the workdir holds another run, or none; the message says what differs.
    """
    if 'data' not in meta:
        raise errors.InputError(
            f'{workdir} holds converted weights, not a run; start from them in another --workdir, '
            f'with --config.init_from={workdir}'
        )
    wholes = [upgrade.config(each) for each in (meta['config'], config)]
    there, here = (upgrade.identity(each, reads) for each in wholes)
    differing = {
        name: errors.both(name, there.get(name), here.get(name))
        for name in sorted((here.keys() | there.keys()) - set(may_differ))
        if here.get(name) != there.get(name)
    }
    if differing:
        advice = 'use another --workdir, or the config it was begun with'
        if differing.keys() <= set(LENGTH):
            advice = (
                f'its {meta["step"]} steps are not the first of a run so long, which has other '
                f'learning rates, or fewer steps: {advice}; --config.init_from={workdir} starts '
                'from its weights'
            )
        raise errors.InputError(
            f'{workdir} holds a run of another config ({"; ".join(differing.values())}); {advice}'
        )
    for name, value in data.items():
        if meta['data'].get(name, value) != value:
            raise errors.InputError(
                f'{workdir} {_DATA.get(name, f"was trained on other {name}")}; put back what was '
                'there, or use another --workdir'
            )

    for section, name in _TOLD:
        before, now = (each.get(section, {}).get(name) for each in wholes)
        if before != now:
            _log.info('goes on with %s', errors.both(f'{section}.{name}', before, now))


def goes_on(
    meta: Mapping[str, Any], config: Mapping[str, Any], rate_of: RateOf, total_steps: int
) -> bool:
    """Whether a run of this config's length would have come to a checkpoint just so.

    It would where the learning rates up to there do not depend on the length: those of a constant
    rate, of wsd before the cool-down, of a decay of a length of its own.

    Args:
      config: of now, as JSON.
      total_steps: of a run of that length.
    """
    trains = [upgrade.config(each)['train'] for each in (meta['config'], config)]
    there, here = ((t['total_tokens'], t['total_epochs']) for t in trains)
    if meta['step'] > total_steps or there == here:
        return meta['step'] <= total_steps
    steps = jnp.arange(meta['step'])
    return np.array_equal(*(rate_of(*length)(steps) for length in (there, here)))
