# SPDX-License-Identifier: Apache-2.0
"""What a run reads: its token sets, and the tokenizer they were made with."""

import logging
import pathlib
from collections.abc import Callable
from typing import NamedTuple

from gptjax.configs import errors
from gptjax.data import loader, staging, tokens
from gptjax.storage import sums
from gptjax.text import tokenizer as tokenizer_lib

_log = logging.getLogger(__name__)


class Inputs(NamedTuple):
    """The training sets of a run, and its held-out sets by label."""

    train: list[tokens.TokenSet]
    held_out: dict[str, tokens.TokenSet]


def open_all(
    config: loader.Config,
    tokenizer_dir: pathlib.Path,
    workdir: pathlib.Path,
    own: pathlib.Path,
    keep: bool,
    staged: Callable[[int], None],
) -> Inputs:
    """Training sets and held-out sets, staged and checked against the tokenizer.

    Args:
      own: where the run keeps its tokenizer, so that it travels with the weights.
      keep: whether this process writes it there.
      staged: is told the tokens copied from elsewhere, and those whose hashes were compared.

    Raises:
      InputError: a set is not finished, or was made with another tokenizer.
    """
    sets = []
    for name in config.sets:
        where = (name, workdir, config.stage_dir, staged, 'train', config.read)
        sets.append(tokens.open_set(staging.locate(*where), 'train', config.verify, staged))
    held_out = open_held_out(config, workdir, staged)
    tokenizer = tokenizer_lib.load(tokenizer_dir)
    print_ = tokenizer_lib.fingerprint(tokenizer)
    for token_set in [*sets, *held_out.values()]:
        if token_set.fingerprint != print_:
            raise errors.InputError(
                f'the tokens in {token_set.folder} were made with another tokenizer '
                f'({token_set.fingerprint[:12]}) than {tokenizer_dir} ({print_[:12]}); '
                'prepare them again, or set --config.tokenizer.dir to the one they were made with'
            )
        token_set.check_ids(tokenizer)
    if keep and not _kept(own, print_):
        tokenizer_lib.save(tokenizer, own)
    return Inputs(sets, held_out)


def _kept(own: pathlib.Path, fingerprint: str) -> bool:
    """Whether a run's tokenizer stands there whole; what is damaged or half written is not.

    Raises:
      InputError: it is another one.
    """
    try:
        found = tokenizer_lib.fingerprint(tokenizer_lib.load(own)) if own.exists() else ''
    except errors.InputError as e:
        _log.warning('%s is written again: %s', own, e)
        return False
    # A copy that was cut short; the runs of the days before there were sums have checkpoints.
    cut = not sums.is_whole(own) and not (own.parent / 'checkpoints').exists()
    if found == '' or cut:
        return False
    if found == fingerprint:
        return True
    raise errors.InputError(
        f'{own} holds another tokenizer than that of the tokens; use another --workdir'
    )


def open_held_out(
    config: loader.Config, workdir: pathlib.Path, staged: Callable[[int], None]
) -> dict[str, tokens.TokenSet]:
    """The held-out sets by label, staged. Raises InputError where one is not finished."""
    found = {}
    for label, name in config.eval_sets:
        folder = staging.locate(name, workdir, config.stage_dir, staged, 'valid')
        found[label] = tokens.open_set(folder, 'valid', config.verify, staged)
    return found


def check_vocabulary(n_vocab: int, sets: list[tokens.TokenSet]) -> None:
    """Raises UsageError where a model of `n_vocab` ids is too small for the sets."""
    needed = max(token_set.n_vocab for token_set in sets)
    errors.require(
        needed <= n_vocab,
        f'model.n_vocab = {n_vocab} is too small for a tokenizer of {needed} ids; set '
        f'--config.model.n_vocab={needed} (a larger one is padding)',
    )
