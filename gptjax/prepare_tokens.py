# SPDX-License-Identifier: Apache-2.0
"""Tokenises a corpus into token shards with a manifest, on all cores.

Laptop:
  python -m gptjax.prepare_tokens --config=experiments/quickstart.py --workdir=runs/quickstart
TPU VM, once, on one host; then copy the folder to a bucket and train with
--config.data.sets="('gs://bucket/tokens',)" --config.data.eval_sets.tokens=gs://bucket/tokens:
  python -m gptjax.prepare_tokens --config=experiments/gpt2/pretrain.py --workdir=/data/wiki
"""

import dataclasses
import functools
import logging
import math
import os
import pathlib
from collections.abc import Callable

from gptjax.configs import cli, errors
from gptjax.data import documents, encoding, splits, tokens
from gptjax.runtime import program, progress, workers
from gptjax.storage import scratch
from gptjax.text import tokenizer as tokenizer_lib

READS = ('corpus', 'tokenizer', 'tokens')
_log = logging.getLogger('gptjax')


@functools.lru_cache(1)  # in each process, for all its shards
def _loaded(folder: pathlib.Path, fingerprint: str) -> tokenizer_lib.Tokenizer:
    found = tokenizer_lib.load(folder)
    if tokenizer_lib.fingerprint(found) != fingerprint:
        raise errors.InputError(f'{folder} was changed meanwhile; run the same command again')
    return found


@dataclasses.dataclass(frozen=True)
class _Job:
    corpus: pathlib.Path
    tokenizer: pathlib.Path
    fingerprint: str
    folder: pathlib.Path
    index: int
    shard: documents.Shard
    valid_fraction: float

    def run(self, advance: Callable[[int], None]) -> None:
        """Tokenises the shard."""
        tokenizer = _loaded(self.tokenizer, self.fingerprint)
        texts = splits.split(self.corpus, self.shard, self.valid_fraction)
        encoding.write_shard(self.folder, self.index, texts, tokenizer, advance)


def main(args: cli.Args) -> None:
    """Writes WORKDIR/tokens; shards that an interrupted run finished are kept."""
    with program.only_one(pathlib.Path(args.workdir)):
        _main(args)


def _main(args: cli.Args) -> None:
    config = args.section('tokens', tokens.Config)
    corpus = scratch.within(args.workdir, args.config.corpus.dir)
    tokenizer_dir = scratch.within(args.workdir, args.config.tokenizer.dir)
    folder = pathlib.Path(args.workdir, config.dir)
    shards = documents.shards(corpus)
    tokenizer = tokenizer_lib.load(tokenizer_dir)
    if tokenizer.end_of_text < 0:
        raise errors.InputError(
            f'the tokenizer in {tokenizer_dir} has no end-of-text token to separate documents; '
            'use one that has'
        )
    whole = sum(shard.text_bytes for shard in shards)
    fraction = config.held_out(whole)
    source = {
        'tokenizer': tokenizer_lib.fingerprint(tokenizer),
        'valid_fraction': fraction,
        'corpus': [shard.sha256 for shard in shards],
    }
    if tokens.is_finished(folder, source):
        _log.info('tokens %s are done already', folder)
        return
    jobs = [
        _Job(corpus, tokenizer_dir, source['tokenizer'], folder, index, shard, fraction)
        for index, shard in enumerate(shards)
    ]
    with progress.Progress('tokenise', whole, ' bytes') as bar:
        _run(jobs, config.processes or os.cpu_count() or 1, bar)
    records = [tokens.records(folder, job.index) for job in jobs]
    if None in records:
        raise errors.InputError(
            f'shard {records.index(None)} of {folder} is not what was just written; look at that '
            'disk, and run the same command again'
        )
    for split, found in tokens.write_manifest(folder, records, tokenizer, source).items():
        _log.info(
            'tokens %s, %s: %s tokens of %s documents, %s bytes',
            folder,
            split,
            f'{sum(r.tokens for r in found):,}',
            f'{sum(r.documents for r in found):,}',
            f'{sum(r.text_bytes for r in found):,}',
        )


def _run(jobs: list[_Job], cores: int, bar: progress.Progress) -> None:
    """Tokenises the shards that are not there, or not whole."""
    left = []
    for job in jobs:
        if tokens.records(job.folder, job.index) is None:
            left.append(job)
        else:
            bar.advance(job.shard.text_bytes)
    # Of the library of a vocabulary, in each process; read when it first works.
    os.environ.setdefault('RAYON_NUM_THREADS', str(math.ceil(cores / max(1, len(left)))))
    for _ in workers.each(_Job.run, left, cores, bar.advance):
        pass


if __name__ == '__main__':
    program.run(main, __doc__, READS, uses_jax=False)
