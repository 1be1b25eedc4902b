# SPDX-License-Identifier: Apache-2.0
"""Whether a workdir is this run's: the same config as far as it makes a run, and the same data."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from gptjax.configs import errors, upgrade

_DATA = {'sets': 'token shards'}  # what of the data must be the same, in words


def check(
    workdir: pathlib.Path,
    meta: Mapping[str, Any],
    config: Mapping[str, Any],
    reads: Sequence[str],
    data: Mapping[str, Any],
) -> None:
    """Compares with a checkpoint.

    Args:
      meta: of the checkpoint.
      config: of now, as JSON.
      reads: sections and top-level fields of the config that the program reads.
      data: what must be the same of the data; what the checkpoint does not say came later.

    Raises:
      InputError: the workdir holds another run, or none; the message says what differs.
    """
    if 'data' not in meta:
        raise errors.InputError(
            f'{workdir} holds converted weights, not a run; start from them in another --workdir, '
            f'with --config.init_from={workdir}'
        )
    there, here = (
        upgrade.identity(upgrade.config(each), reads) for each in (meta['config'], config)
    )
    differing = [
        f'{name} = {there.get(name)} there, {here.get(name)} here'
        for name in sorted(here.keys() | there.keys())
        if here.get(name) != there.get(name)
    ]
    if differing:
        raise errors.InputError(
            f'{workdir} holds a run of another config ({"; ".join(differing)}); use another '
            '--workdir, or the config it was begun with'
        )
    for name, value in data.items():
        if meta['data'].get(name, value) != value:
            raise errors.InputError(
                f'{workdir} was trained on other {_DATA.get(name, name)} than those in '
                f'data.{name} now; put the old ones back, or use another --workdir'
            )
