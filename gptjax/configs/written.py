# SPDX-License-Identifier: Apache-2.0
"""Configs that runs have written: where a run's stands, and what it holds."""

import contextlib
import dataclasses
import json
import logging
import pathlib
import re
import types
from collections.abc import Callable

import ml_collections

from gptjax.configs import base, checksum, errors, mistakes, upgrade

_WEIGHTS = re.compile(r'(/best|/checkpoints/\d+)?(/average)?/*$')  # behind a workdir
_AT_STEP = re.compile(r'@\d+$')  # the same, but for a folder of that very name
_META, _KEPT = 'meta.json', 'checkpoints/[0-9]*/meta.json'  # where a run's config stands, too
_NO_CONFIG = (ValueError, TypeError, AttributeError, KeyError, RecursionError, OSError)
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Where:
    """How folders that a command line names are found, those in buckets, too.

    Attributes:
      workdir: makes a local folder of --workdir, ready to be written.
      other: makes one of any other folder, ready for its config to be read.
    """

    workdir: Callable[[str], str] = str
    other: Callable[[str], str] = str


HERE = Where()  # of folders on a disk of this machine


def find(workdir: str | None, init_from: str | None, where: Where) -> str:
    """The config.json of the run that --workdir or init_from names; '' where neither does.

    Where it is lost or damaged, the newest checkpoint's meta.json, which says the same.
    """
    for folder, local in ((workdir, where.workdir), (init_from, where.other)):
        whole = _WEIGHTS.sub('', folder or '')
        run = pathlib.Path(local(whole))
        if folder == init_from and not run.exists():
            run = pathlib.Path(local(_AT_STEP.sub('', whole)))
        path = run / base.OF_RUN
        # A published folder has one of another kind.
        if not folder or (path.is_file() and b'"model_type"' in path.read_bytes()):
            continue
        kept = sorted(run.glob(_KEPT), reverse=True)
        for each in (path, *kept):
            with contextlib.suppress(*_NO_CONFIG):
                _config_in(each)
                if each != path:
                    _log.warning('%s is missing or damaged; %s says the same', path, each)
                return str(each)
        if path.is_file():
            return str(path)  # and why it is none
    return ''


def load(path: str, colon: str) -> tuple[types.ModuleType, ml_collections.ConfigDict]:
    """A run's config.json as a config file."""
    errors.require(not colon, f'{path!r} takes no argument: it is a config, not a file of code')
    try:
        config = _config_in(pathlib.Path(path))
        wrong = mistakes.in_tree(config)
    except _NO_CONFIG as e:
        wrong = f'{type(e).__name__}: {e}'
    if wrong:
        raise errors.InputError(
            f'{path!r} is no config that a run has written: {wrong}; where it was changed by hand, '
            f'remove its field {checksum.FIELD!r}, else let the run write it again'
        )
    module = types.ModuleType('config_file')
    module.get_config = lambda: config
    return module, config


def _config_in(path: pathlib.Path) -> ml_collections.ConfigDict:
    """The config that a run wrote, alone or in the meta of a checkpoint. Raises _NO_CONFIG."""
    found = checksum.opened(json.loads(path.read_bytes()))
    found = found['config'] if path.name == _META else found
    if 'model' not in found and found.keys() <= {*base.SECTIONS, *base.TOP}:  # all have had one
        raise ValueError('it has no section model')
    return ml_collections.ConfigDict(upgrade.config(found))
