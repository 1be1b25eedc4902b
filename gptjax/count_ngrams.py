# SPDX-License-Identifier: Apache-2.0
"""Estimates an n-gram model, the first baseline, from token shards: counts, no gradient.

Memory is what config.ngram.memory_tokens says, whatever the text; the rest stands on the disk of
the workdir. --arpa writes model.arpa, too, for kenlm; of a run that is done, from its tables, all
of which are read for that. The model is a run like any other: evaluate and generate read its
workdir. Laptop, after a quickstart:
  python -m gptjax.count_ngrams --config=experiments/quickstart.py:model=ngram \
      --workdir=runs/quickstart/ngram --config.tokenizer.dir=../tokenizer \
      --config.data.sets="('../tokens',)" --config.data.eval_sets.tokens=../tokens
TPU VM, the same on one host: it needs no accelerator.
"""

import contextlib
import dataclasses
import json
import logging
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import flags

from gptjax.configs import base, cli, errors
from gptjax.data import inputs, loader, tokens
from gptjax.evals import perplexity
from gptjax.models import heads, kneser_ney, ngram, pretrained
from gptjax.models.published import arpa
from gptjax.runtime import checkpoint, hosts, listing, program, progress
from gptjax.runtime import mesh as mesh_lib
from gptjax.runtime import meta as meta_lib
from gptjax.runtime import results as results_lib
from gptjax.storage import documents, files, scratch
from gptjax.training import claim
from gptjax.training import step as step_lib

READS = ('seed', 'tokenizer', 'data', 'model', 'ngram', 'evaluate')
ARPA = 'model.arpa'
_ARPA_SUM = 'arpa_sha256'
_PIECE = 1 << 20  # tokens read at once
_log = logging.getLogger('gptjax')


def define(values: flags.FlagValues) -> None:
    """The program's own flags."""
    flags.DEFINE_bool('arpa', False, f'Write {ARPA}, for kenlm.', flag_values=values)


def main(args: cli.Args) -> None:
    """Counts the training tokens; writes a checkpoint and results.json."""
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
        if there and results_lib.is_whole(workdir):
            scratch.clear_own(workdir)
            if not _write_wanted_arpa(workdir, args.flags.arpa):
                _log.info('counting in %s is done already', workdir)
            return
        began = time.monotonic()
        with scratch.own_folder(workdir) as folder:
            texts = _texts(data.train, config, counting.total_tokens)
            counted_tokens = sum(len(text) for text in texts)
            sizes = (model_config.order, model_config.n_vocab, counting.memory_tokens)
            tables = kneser_ney.estimate(texts, *sizes, folder, _stage)
            secs = time.monotonic() - began
            entries = tuple(len(table['token']) for table in tables.values())
            model = heads.LanguageModel(dataclasses.replace(model_config, entries=entries))
            mesh = mesh_lib.one_device()
            # The files themselves, where the device has the memory of the host.
            params = jax.device_put(ngram.params_of(tables), mesh.replicated(), may_alias=True)
            results = {'steps': 0, 'tokens': counted_tokens, 'parameters': sum(entries)}
            results |= {'train_secs': round(secs, 3)} | _scores(model, params, data, scoring, mesh)
            results['commit'] = program.commit()
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
            if args.flags.arpa:  # last: a disk that it fills loses nothing else
                results |= _write_arpa(tables, workdir)
                results_lib.write(workdir, results)
    _log.info('counted %s n-grams in %.1f s: %s', f'{sum(entries):,}', secs, json.dumps(results))


class _Text:
    """Tokens of a set, from one to before another, as a text in pieces."""

    def __init__(self, token_set: tokens.TokenSet, start: int, stop: int) -> None:
        self._set, self._start, self._stop = token_set, start, stop

    def __len__(self) -> int:
        return self._stop - self._start

    def __iter__(self) -> Iterator[np.ndarray]:
        for start in range(self._start, self._stop, _PIECE):
            yield self._set.read(start, min(_PIECE, self._stop - start))


def _texts(
    sets: list[tokens.TokenSet], config: ml_collections.ConfigDict, total: int
) -> list[_Text]:
    """What is counted: whole sets, or the windows that training reads first; neighbours joined."""
    if not total:
        return [_Text(token_set, 0, len(token_set)) for token_set in sets]
    n_ctx = config.model.n_ctx
    count = max(1, total // n_ctx)
    chosen = loader.first_windows(sets, config.data.weights, n_ctx, config.seed, count)
    texts = []
    for token_set, windows in zip(sets, chosen, strict=True):
        for joined in np.split(windows, np.flatnonzero(np.diff(windows) > 1) + 1):
            if len(joined):
                first, last = int(joined[0]), int(joined[-1])
                texts.append(_Text(token_set, first * n_ctx, (last + 1) * n_ctx))
    return texts


@contextlib.contextmanager
def _stage(what: str, total: int | None, unit: str) -> Iterator[Callable[[int], None]]:
    with progress.Progress(what, total, unit) as bar:
        yield bar.advance


def _scores(
    model: heads.LanguageModel,
    params: Any,
    data: inputs.Inputs,
    config: perplexity.Config,
    mesh: mesh_lib.Mesh,
) -> dict[str, float]:
    """Scores of the held-out sets."""
    found: dict[str, float] = {}
    with mesh.scope():
        step = step_lib.make_eval_step(perplexity.measure(model.apply, config))
        for label, token_set in data.held_out.items():
            n_ctx = config.n_ctx or model.config.n_ctx
            found |= perplexity.score(step, params, token_set, n_ctx, config, mesh).named(label)
    return found


def _write_arpa(tables: ngram.Tables, workdir: pathlib.Path) -> dict[str, str]:
    """Writes the file. Returns what the results say of it."""
    total = sum(len(table['token']) for table in tables.values())
    with progress.Progress(f'write {ARPA}', total, ' n-grams') as bar:
        arpa.write(tables, workdir / ARPA, bar.advance)
    return {_ARPA_SUM: files.sha256(workdir / ARPA)}


def _write_wanted_arpa(workdir: pathlib.Path, wanted: bool) -> bool:
    """Of a run that is done: writes its ARPA file, if wanted, where it is not as it was written."""
    found = results_lib.read(workdir)
    if not (wanted or _ARPA_SUM in found):
        return False
    with contextlib.suppress(OSError):
        if files.sha256(scratch.need(workdir / ARPA)) == found.get(_ARPA_SUM):
            return False
    tables = ngram.tables_of(pretrained.load(workdir).params)
    results_lib.write(workdir, found | _write_arpa(tables, workdir))
    return True


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
    program.run(main, __doc__, READS, define)
