# SPDX-License-Identifier: Apache-2.0
"""Trains a subword tokenizer on a corpus, or takes over an existing one.

Laptop:
  python -m gptjax.train_tokenizer --config=experiments/quickstart.py --workdir=runs/quickstart
TPU VM, once, on one host; GPT-2's own files instead of training:
  python -m gptjax.train_tokenizer --config=experiments/gpt2/pretrain.py --workdir=/data/wiki \
      --config.tokenizer.kind=file --config.tokenizer.path=gpt2/encoder.json
"""

import logging
import pathlib
from collections.abc import Iterable, Iterator

from gptjax.configs import cli, errors
from gptjax.data import documents, splits, tokens
from gptjax.runtime import program, progress
from gptjax.storage import documents as documents_lib
from gptjax.storage import scratch
from gptjax.text import tokenizer as tokenizer_lib
from gptjax.text import vocabulary

READS = ('corpus', 'tokenizer', 'tokens')
_log = logging.getLogger('gptjax')
_RECIPE = 'recipe.json'


def main(args: cli.Args) -> None:
    """Writes WORKDIR/tokenizer."""
    with program.only_one(pathlib.Path(args.workdir)):
        _main(args)


def _main(args: cli.Args) -> None:
    config = args.section('tokenizer', vocabulary.Config)
    corpus = scratch.within(args.workdir, args.config.corpus.dir)
    folder = pathlib.Path(args.workdir, config.dir)
    recipe = f'{config.kind} {config.path} {config.n_vocab} {config.sample_bytes}\n'
    made = folder / _RECIPE
    if made.exists():
        before = _before(made)
        if before != recipe:
            raise errors.InputError(
                f'{folder} holds a tokenizer made from another config '
                f'({before.strip()}); remove that folder or choose another tokenizer.dir'
            )
        try:
            tokenizer_lib.load(folder)
            _log.info('tokenizer %s is done already', folder)
            return
        except errors.InputError as e:
            _log.warning('tokenizer %s is made again: %s', folder, e)
    total = sum(shard.text_bytes for shard in documents.shards(corpus))
    fraction = args.section('tokens', tokens.Config).held_out(total)
    texts = splits.training_texts(corpus, fraction, config.sample_bytes)
    with progress.Progress('read', min(total, config.sample_bytes), ' bytes') as bar:
        tokenizer = vocabulary.train(config, _told(texts, bar))
    tokenizer_lib.save(tokenizer, folder)
    documents_lib.write(made, {'recipe': recipe})
    _log.info(
        'tokenizer %s: %s, %s ids, fingerprint %s',
        folder,
        config.kind,
        f'{tokenizer.n_vocab:,}',
        tokenizer_lib.fingerprint(tokenizer)[:12],
    )


def _before(made: pathlib.Path) -> str:
    """What a tokenizer was made by; once a line of text. Raises Damaged."""
    content = made.read_bytes()
    text = content.decode(errors='replace')
    if text[:-1].isprintable() and text[-1:] == '\n' and text[:1] != '{' and '\ufffd' not in text:
        return text
    remedy = f'remove {made.parent}, and run this again'
    return str(documents_lib.read(made, dict, remedy).get('recipe'))


def _told(texts: Iterable[str], bar: progress.Progress) -> Iterator[str]:
    for text in texts:
        bar.advance(len(text.encode()))
        yield text


if __name__ == '__main__':
    program.run(main, __doc__, READS, uses_jax=False)
