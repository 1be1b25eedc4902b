# SPDX-License-Identifier: Apache-2.0
"""Published weights <-> our checkpoints, in either direction.

Into a workdir, from a Hugging Face folder or a GGUF file:
  python -m gptjax.convert --config.init_from=gpt2/ --workdir=runs/gpt2
Into a Hugging Face folder, from a workdir of ours or a GGUF file:
  python -m gptjax.convert --config.init_from=runs/quickstart --workdir=exported --to=huggingface
Stopped, the same command begins again; done, it says so.
"""

import hashlib
import json
import logging
import pathlib

import jax
from absl import flags

from gptjax.configs import base, cli, errors
from gptjax.models import pretrained, sources, weights
from gptjax.models.published import beside
from gptjax.runtime import program, progress
from gptjax.storage import unfinished

READS = ('init_from',)
_DTYPES = ('stored', 'float32', 'bfloat16', 'float16')
_log = logging.getLogger('gptjax')


def define(values: flags.FlagValues) -> None:
    """The program's own flags."""
    forms = ('workdir', 'huggingface')
    flags.DEFINE_enum('to', 'workdir', forms, 'What to write.', flag_values=values)
    flags.DEFINE_enum('dtype', 'stored', _DTYPES, 'Of the weights.', flag_values=values)


def main(args: cli.Args) -> None:
    """Reads config.init_from, writes --workdir."""
    target = pathlib.Path(args.workdir)
    errors.require(
        bool(args.config.init_from), 'give --config.init_from=<folder or .gguf file to read>'
    )
    if not unfinished.says_of_what(target):
        unfinished.check_free(target)
    source = sources.open(args.config.init_from)
    made_of = _made_of(source, args.flags)
    dtype = None if args.flags.dtype == 'stored' else args.flags.dtype
    with program.only_one(target, whole=False):
        if unfinished.is_made_of(target, made_of):
            _log.info('conversion to %s is done already', target)
            return
        unfinished.check_free(target)
        with progress.Progress('read', None, ' parameters') as bar:
            found = pretrained.load(source, dtype, progress=bar.advance)
        about = {'note': source.provenance, 'kept': source.beside, 'made_of': made_of}
        if args.flags.to == 'huggingface':
            with progress.Progress('write', None, ' bytes') as bar:
                pretrained.save(target, *found, **about, progress=bar.advance)
        else:
            pretrained.save_workdir(target, *found, **about, objective=source.objective)
    left = beside.left_behind(source.path) if isinstance(source, sources.Published) else []
    if left:
        _log.warning('left behind of %s: %s', source.path, ', '.join(left))
    n_params = sum(x.size for x in jax.tree.leaves(found.params))
    _log.info('wrote %s parameters to %s', f'{n_params:,}', target)


def _made_of(source: weights.Source, given: flags.FlagValues) -> str:
    """Changes with all that the result depends on."""
    said = [source.identity(), source.provenance, source.objective, given.to, given.dtype]
    kept = sorted((name, _sha256(content)) for name, content in source.beside.items())
    return _sha256(json.dumps([said, kept]).encode())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


if __name__ == '__main__':
    program.run(main, __doc__, READS, define, default_config=base.OF_RUN)
