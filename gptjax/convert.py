# SPDX-License-Identifier: Apache-2.0
"""Published weights <-> our checkpoints, in either direction.

Into a workdir, from a Hugging Face folder or a GGUF file:
  python -m gptjax.convert --config.init_from=gpt2/ --workdir=runs/gpt2
Into a Hugging Face folder, from a workdir of ours or a GGUF file:
  python -m gptjax.convert --config.init_from=runs/quickstart --workdir=exported --to=huggingface
"""

import json
import logging
import pathlib

import jax
from absl import flags

from gptjax.configs import base, cli, errors
from gptjax.models import pretrained
from gptjax.runtime import checkpoint, program, progress
from gptjax.text import files
from gptjax.text import tokenizer as tokenizer_lib

_DTYPES = ('stored', 'float32', 'bfloat16', 'float16')
_log = logging.getLogger('gptjax')


def define(values: flags.FlagValues) -> None:
    """The program's own flags."""
    flags.DEFINE_enum(
        'to', 'workdir', ('workdir', 'huggingface'), 'What to write into --workdir.',
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_enum('dtype', 'stored', _DTYPES, 'Of the weights.', flag_values=values)


def main(args: cli.Args) -> None:
    """Reads config.init_from, writes --workdir."""
    source, target = args.config.init_from, pathlib.Path(args.workdir)
    errors.require(bool(source), 'give --config.init_from=<folder or .gguf file to read>')
    if target.exists() and any(target.iterdir()):
        raise errors.InputError(f'{target} is not empty; choose another --workdir, or remove it')
    dtype = None if args.flags.dtype == 'stored' else args.flags.dtype
    with progress.Progress('read', None, ' parameters') as bar:
        found = pretrained.load(source, dtype, progress=bar.advance)
    n_params = sum(x.size for x in jax.tree.leaves(found.params))
    note = pretrained.provenance(source)
    if args.flags.to == 'huggingface':
        with progress.Progress('write', None, ' bytes') as bar:
            pretrained.save(
                target, *found, note=note, token_ids=pretrained.token_ids(source),
                progress=bar.advance,
            )  # fmt: skip
    else:
        _workdir(target, args, found, note)
    _log.info('wrote %s parameters to %s', f'{n_params:,}', target)


def _workdir(target: pathlib.Path, args: cli.Args, found: pretrained.Pretrained, note: str) -> None:
    """A run's folder whose only checkpoint, of step 0, holds the weights."""
    config = json.loads(args.config.to_json())
    config |= {'model': found.model.config.__dict__}
    tokenizer = found.tokenizer
    if tokenizer is not None:
        tokenizer_lib.save(tokenizer, target / pretrained.TOKENIZER)
    meta = {
        'config': config,
        'tokenizer': '' if tokenizer is None else tokenizer_lib.fingerprint(tokenizer),
        'provenance': note,
        'token_ids': pretrained.token_ids(args.config.init_from),
    }
    checkpoints = checkpoint.Checkpoints(target, keep=2)
    try:
        checkpoints.save(0, {'params': found.params}, meta)
    finally:
        checkpoints.close()
    files.replace(target / 'config.json', json.dumps(config, indent=1) + '\n')


if __name__ == '__main__':
    program.run(main, __doc__, define, default_config=base.__file__)
