# SPDX-License-Identifier: Apache-2.0
"""What a run reads: its token sets, and the tokenizer they were made with."""

import pathlib
from collections.abc import Callable

from gptjax.configs import errors
from gptjax.data import loader, tokens
from gptjax.text import tokenizer as tokenizer_lib


def open_all(
    config: loader.Config,
    tokenizer_dir: pathlib.Path,
    workdir: pathlib.Path,
    own: pathlib.Path,
    keep: bool,
    staged: Callable[[int], None],
) -> tuple[list[tokens.TokenSet], tokens.TokenSet]:
    """Training sets and held-out set, staged and checked against the tokenizer.

    Args:
      own: where the run keeps its tokenizer, so that it travels with the weights.
      keep: whether this process writes it there.
      staged: is told the tokens copied from elsewhere.

    Raises:
      InputError: a set is not finished, or was made with another tokenizer.
    """

    def open_set(name: str, split: str) -> tokens.TokenSet:
        return tokens.open_set(tokens.locate(name, workdir, config.stage_dir, staged), split)

    sets = [open_set(name, 'train') for name in config.sets]
    held_out = open_set(config.eval_set, 'valid')
    tokenizer = tokenizer_lib.load(tokenizer_dir)
    print_ = tokenizer_lib.fingerprint(tokenizer)
    for token_set in [*sets, held_out]:
        if token_set.fingerprint != print_:
            raise errors.InputError(
                f'the tokens in {token_set.folder} were made with another tokenizer '
                f'({token_set.fingerprint[:12]}) than {tokenizer_dir} ({print_[:12]}); '
                'prepare them again, or set --config.tokenizer.dir to the one they were made with'
            )
    if not own.exists() and keep:
        tokenizer_lib.save(tokenizer, own)
    elif own.exists() and tokenizer_lib.fingerprint(tokenizer_lib.load(own)) != print_:
        raise errors.InputError(
            f'{own} holds another tokenizer than {tokenizer_dir}; use another --workdir'
        )
    return sets, held_out


def check_vocabulary(n_vocab: int, sets: list[tokens.TokenSet]) -> None:
    """Raises UsageError where a model of `n_vocab` ids is too small for the sets."""
    needed = max(token_set.n_vocab for token_set in sets)
    errors.require(
        needed <= n_vocab,
        f'model.n_vocab = {n_vocab} is too small for a tokenizer of {needed} ids; set '
        f'--config.model.n_vocab={needed} (a larger one is padding)',
    )
