# SPDX-License-Identifier: Apache-2.0
"""Estimates an n-gram model, the first baseline, from token shards: one pass, no gradient.

The model is a run like any other: evaluate and generate read its workdir. Laptop, after a
quickstart:
  python -m gptjax.count_ngrams --config=experiments/quickstart.py:model=ngram \
      --workdir=runs/quickstart/ngram --config.tokenizer.dir=../tokenizer \
      --config.data.sets="('../tokens',)" --config.data.eval_sets.tokens=../tokens
TPU VM, the same on one host: it needs no accelerator.
"""

import dataclasses
import json
import logging
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import ml_collections
import numpy as np

from gptjax.configs import base, cli, errors
from gptjax.data import inputs, loader, tokens
from gptjax.evals import perplexity
from gptjax.models import heads, kneser_ney, ngram, pretrained
from gptjax.runtime import checkpoint, hosts, listing, program, progress
from gptjax.runtime import mesh as mesh_lib
from gptjax.runtime import meta as meta_lib
from gptjax.runtime import results as results_lib
from gptjax.storage import documents, files, scratch
from gptjax.training import claim
from gptjax.training import step as step_lib

READS = ('tokenizer', 'data', 'model', 'ngram', 'evaluate')
ARPA = 'model.arpa'
_PIECE = 1 << 20  # tokens read at once
_log = logging.getLogger('gptjax')


def main(args: cli.Args) -> None:
    """Counts every training token once; writes a checkpoint, model.arpa and results.json."""
    config, workdir = args.config, pathlib.Path(args.workdir)
    model_config = heads.configure(config.model)
    errors.require(
        isinstance(model_config, ngram.Config),
        f'model.family is {config.model.family!r}; an n-gram config is wanted, as '
        'experiments/quickstart.py:model=ngram',
    )
    errors.require(hosts.is_alone(), 'counting runs on one host; leave out --distributed')
    counting = args.section('ngram', kneser_ney.Config)
    scoring = args.section('evaluate', perplexity.Config)
    with program.only_one(workdir):
        with progress.Progress('open tokens', None, ' tokens checked') as bar:
            own = workdir / pretrained.TOKENIZER
            opening = (
                loader.configure(config.data),
                scratch.within(workdir, config.tokenizer.dir),
                workdir,
            )
            data = inputs.open_all(*opening, own, hosts.is_first(), bar.advance)
        inputs.check_vocabulary(model_config.n_vocab, data.train)
        n_ctx = scoring.n_ctx or model_config.n_ctx
        for token_set in data.held_out.values():
            perplexity.check(token_set, n_ctx, scoring)
        made_of = {'sets': [token_set.digest for token_set in data.train]}
        there = _matching(workdir, config, made_of)
        documents.write(workdir / base.OF_RUN, base.plain(config))
        if there and _is_done(workdir):
            _log.info('counting in %s is done already', workdir)
            return
        began = time.monotonic()
        total = sum(map(len, data.train))
        with progress.Progress('count', total, ' tokens') as bar:
            order, memory = model_config.order, counting.memory_tokens
            sets = (model_config.n_vocab, memory, workdir, bar.advance)
            tables = kneser_ney.estimate(map(_pieces, data.train), order, *sets)
        secs = time.monotonic() - began
        params = ngram.params_of(tables)
        entries = tuple(len(table['token']) for table in tables.values())
        model = heads.LanguageModel(dataclasses.replace(model_config, entries=entries))
        ngram.write_arpa(tables, workdir / ARPA)
        results = {'steps': 0, 'tokens': total, 'parameters': sum(entries)}
        results |= {'train_secs': round(secs, 3)} | _scores(model, params, data, scoring)
        results |= {'arpa_sha256': files.sha256(workdir / ARPA), 'commit': program.commit()}
        if noted := perplexity.notes(data.held_out, scoring):
            results['notes'] = noted
        results_lib.write(workdir, results)
        counted = config.copy_and_resolve_references()
        with counted.unlocked():
            counted.model.entries = entries
        tokenizer = data.train[0].fingerprint
        meta = meta_lib.of(counted, heads.name_of(model), tokenizer, data=made_of)
        if there:
            listing.remove(there)  # the same tables, counted again for the results
        checkpoints = checkpoint.Checkpoints(workdir, keep=2)
        try:
            checkpoints.save(0, {'params': params}, meta)
        finally:
            checkpoints.close()
    _log.info('counted %s n-grams in %.1f s: %s', f'{sum(entries):,}', secs, json.dumps(results))


def _scores(
    model: heads.LanguageModel, params: Any, data: inputs.Inputs, config: perplexity.Config
) -> dict[str, float]:
    """Scores of the held-out sets."""
    found: dict[str, float] = {}
    mesh = mesh_lib.one_device()  # n-grams are looked up on the host
    with mesh.scope():
        params = jax.device_put(params, mesh.replicated())
        step = step_lib.make_eval_step(perplexity.measure(model.apply, config))
        for label, token_set in data.held_out.items():
            n_ctx = config.n_ctx or model.config.n_ctx
            found |= perplexity.score(step, params, token_set, n_ctx, config, mesh).named(label)
    return found


def _pieces(token_set: tokens.TokenSet) -> Iterator[np.ndarray]:
    for start in range(0, len(token_set), _PIECE):
        yield token_set.read(start, _PIECE)


def _is_done(workdir: pathlib.Path) -> bool:
    """Whether the results and the file beside them are as they were written."""
    try:
        digest = results_lib.read(workdir).get('arpa_sha256')
        return digest is None or files.sha256(workdir / ARPA) == digest
    except (documents.Damaged, OSError):
        return False


def _matching(
    workdir: pathlib.Path, config: ml_collections.ConfigDict, made_of: Mapping[str, Any]
) -> pathlib.Path | None:
    """The workdir's checkpoint of this very model. Raises InputError where it holds another."""
    found = checkpoint.latest(workdir)
    if not found:
        return None
    claim.check(workdir, found[1], base.plain(config), READS, made_of)
    return found[0]


if __name__ == '__main__':
    program.run(main, __doc__, READS)
