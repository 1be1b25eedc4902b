# SPDX-License-Identifier: Apache-2.0
"""Collects documents into a corpus: JSONL shards with a manifest; files are read on all cores.

Laptop, the built-in corpus, and a folder of your own text, tables or JSON:
  python -m gptjax.prepare_corpus --config=experiments/quickstart.py --workdir=runs/quickstart
  python -m gptjax.prepare_corpus --config=experiments/quickstart.py --workdir=runs/mine \
      --config.corpus.set=files --config.corpus.path=texts/
TPU VM, a TFDS set, once, on one host (no accelerator is used):
  python -m gptjax.prepare_corpus --config=experiments/gpt2/pretrain.py --workdir=/data/wiki \
      --config.corpus.set=tfds --config.corpus.path=wikipedia/20230601.en
"""

import contextlib
import logging
import os
import pathlib

from gptjax.configs import cli, lookup
from gptjax.data import collecting, documents
from gptjax.runtime import program, progress, workers
from gptjax.storage import scratch

READS = ('corpus',)
_log = logging.getLogger('gptjax')


def main(args: cli.Args) -> None:
    """Writes WORKDIR/corpus; whole shards of an interrupted run are kept."""
    with program.only_one(pathlib.Path(args.workdir)):
        _main(args)


def _main(args: cli.Args) -> None:
    config = args.section('corpus', documents.Config)
    folder = pathlib.Path(args.workdir, config.dir)
    dataset = lookup.module('gptjax.data.sets', config.set)
    source = {'set': config.set, 'path': config.path, 'text_field': config.text_field}
    source['repeated'] = config.repeated
    source['identity'] = dataset.identity(config.path)
    if documents.is_finished(folder, source):
        scratch.clear_own(folder)
        _log.info('corpus %s is done already', folder)
        return
    cores = config.processes or os.cpu_count() or 1
    with scratch.own_folder(folder) as own, progress.Progress('collect', None, ' bytes') as bar:
        jobs = collecting.jobs(config, own)
        pieces = workers.in_order(collecting.Job.run, jobs, cores, lambda done: None)
        with contextlib.closing(pieces):  # no process writes into the folder when it goes
            left_out = collecting.write(folder, pieces, config, source, bar.advance)
    shards = documents.shards(folder)
    _log.info(
        'corpus %s: %s documents, %s bytes of text',
        folder,
        f'{sum(s.documents for s in shards):,}',
        f'{sum(s.text_bytes for s in shards):,}',
    )
    why = {
        'bad': f'bad records, in {folder / documents.BAD}',
        'empty': 'documents without text',
        'repeated': 'documents that repeat another one exactly',
    }
    said = [f'{number:,} {why[name]}' for name, number in left_out.items() if number]
    if said:
        _log.warning('left out: %s', '; '.join(said))


if __name__ == '__main__':
    program.run(main, __doc__, READS, uses_jax=False)
