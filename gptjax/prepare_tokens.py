# SPDX-License-Identifier: Apache-2.0
"""Tokenises a corpus into token shards with a manifest, one process a document shard.

Laptop:
  python -m gptjax.prepare_tokens --config=experiments/quickstart.py --workdir=runs/quickstart
TPU VM, once, on one host; then copy the folder to a bucket and train with
--config.data.sets="('gs://bucket/tokens',)" --config.data.eval_sets.tokens=gs://bucket/tokens:
  python -m gptjax.prepare_tokens --config=experiments/gpt2/pretrain.py --workdir=/data/wiki \
      --config.tokens.processes=96
"""

import dataclasses
import json
import logging
import pathlib

from gptjax.configs import cli, errors
from gptjax.data import documents, tokens
from gptjax.runtime import program, progress, workers
from gptjax.storage import files
from gptjax.text import tokenizer as tokenizer_lib

READS = ('corpus', 'tokenizer', 'tokens')
_log = logging.getLogger('gptjax')


@dataclasses.dataclass(frozen=True)
class _Job:
    corpus: pathlib.Path
    tokenizer: pathlib.Path
    folder: pathlib.Path
    index: int
    shard: documents.Shard
    valid_fraction: float

    def run(self) -> dict:
        """Tokenises the shard and leaves its record beside it, so that it is not done twice."""
        tokenizer = tokenizer_lib.load(self.tokenizer)
        texts = documents.split(self.corpus, self.shard, self.valid_fraction)
        record = tokens.write_shard(self.folder, self.index, texts, tokenizer)
        files.replace(self.record_path(), json.dumps(record) + '\n')
        return record

    def record_path(self) -> pathlib.Path:
        return self.folder / f'record-{self.index:05d}.json'


def main(args: cli.Args) -> None:
    """Writes WORKDIR/tokens; shards that an interrupted run finished are kept."""
    with program.only_one(pathlib.Path(args.workdir)):
        _main(args)


def _main(args: cli.Args) -> None:
    config = args.section('tokens', tokens.Config)
    corpus = pathlib.Path(args.workdir, args.config.corpus.dir)
    tokenizer_dir = pathlib.Path(args.workdir, args.config.tokenizer.dir)
    folder = pathlib.Path(args.workdir, config.dir)
    shards = documents.shards(corpus)
    tokenizer = tokenizer_lib.load(tokenizer_dir)
    if tokenizer.end_of_text < 0:
        raise errors.InputError(
            f'the tokenizer in {tokenizer_dir} has no end-of-text token to separate documents; '
            'use one that has'
        )
    source = {
        'tokenizer': tokenizer_lib.fingerprint(tokenizer),
        'valid_fraction': config.valid_fraction,
        'corpus': [shard.sha256 for shard in shards],
    }
    if tokens.is_finished(folder, source):
        _log.info('tokens %s are done already', folder)
        return
    jobs = [
        _Job(corpus, tokenizer_dir, folder, index, shard, config.valid_fraction)
        for index, shard in enumerate(shards)
    ]
    with progress.Progress('tokenise', sum(s.text_bytes for s in shards), ' bytes') as bar:
        records = _run(jobs, config.processes, bar)
    manifest = tokens.write_manifest(folder, records, tokenizer, source)
    for split, found in manifest['splits'].items():
        _log.info(
            'tokens %s, %s: %s tokens of %s documents, %s bytes',
            folder,
            split,
            f'{sum(r["tokens"] for r in found):,}',
            f'{sum(r["documents"] for r in found):,}',
            f'{sum(r["text_bytes"] for r in found):,}',
        )


def _run(jobs: list[_Job], processes: int, bar: progress.Progress) -> list[dict]:
    records: dict[int, dict] = {}
    for job in jobs:
        if job.record_path().exists():
            records[job.index] = json.loads(job.record_path().read_text())
            bar.advance(job.shard.text_bytes)
    left = [job for job in jobs if job.index not in records]
    if processes == 1 or len(left) < 2:
        for job in left:
            records[job.index] = job.run()
            bar.advance(job.shard.text_bytes)
    else:
        for job, record in workers.each(_Job.run, left, processes):
            records[job.index] = record
            bar.advance(job.shard.text_bytes)
    return [records[job.index] for job in jobs]


if __name__ == '__main__':
    program.run(main, __doc__, READS, uses_jax=False)
