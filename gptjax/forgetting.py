# SPDX-License-Identifier: Apache-2.0
"""What models forget: loss and gradient by distance in context, several runs side by side.

Laptop, after a quickstart:
  python -m gptjax.forgetting --config=experiments/quickstart.py --workdir=runs/quickstart \
      --run=GPT=runs/quickstart --run=LSTM=runs/quickstart/lstm --run=n-gram=runs/quickstart/ngram
TPU VM, the same; on several hosts with --distributed.
"""

import logging
import pathlib

from absl import flags

from gptjax.configs import base, cli, errors
from gptjax.data import inputs, loader
from gptjax.evals import context, perplexity
from gptjax.models import ngram, pretrained, sources
from gptjax.runtime import alike, hosts, plots, program, progress
from gptjax.runtime import mesh as mesh_lib
from gptjax.storage import documents, files
from gptjax.text import tokenizer as tokenizer_lib

READS = ('data', 'evaluate', 'mesh')
RESULTS, PICTURE = 'forgetting.json', 'forgetting.png'
_log = logging.getLogger('gptjax')


def define(values: flags.FlagValues) -> None:
    """The program's own flags."""
    flags.DEFINE_multi_string(
        'run', [], 'NAME=PATH of a trained model; give several.', flag_values=values
    )
    flags.DEFINE_integer(
        'windows', 512, 'Held-out targets that are scored.', lower_bound=1, flag_values=values
    )


def main(args: cli.Args) -> None:
    """Writes WORKDIR/forgetting.json and forgetting.png."""
    runs = dict(run.split('=', 1) if '=' in run else (run, run) for run in args.flags.run)
    errors.require(bool(runs), 'give --run=NAME=PATH; several are allowed')
    workdir = pathlib.Path(args.workdir)
    if hosts.is_first():
        files.check_writable(workdir)
    config, scoring = args.config, args.section('evaluate', perplexity.Config)
    for field in ('stride', 'max_tokens', 'measures'):
        said = f'evaluate.{field} changes nothing here; leave it out'
        errors.require(not getattr(scoring, field), said)
    batch = scoring.batch_windows
    sets = inputs.open_held_out(loader.configure(config.data), workdir, lambda n: None)
    errors.require(len(sets) == 1, f'one held-out set is looked at; data.eval_sets has {len(sets)}')
    ((label, held_out),) = sets.items()
    opened = {name: sources.open(path) for name, path in runs.items()}
    alike.check_same(config=base.plain(config), runs=runs, windows=args.flags.windows)
    mesh = mesh_lib.Mesh(args.section('mesh', mesh_lib.Config))
    with mesh.scope():
        loaded = {
            name: pretrained.load(source, shardings=mesh.shardings)
            for name, source in opened.items()
        }
    for name, (_, _, tokenizer) in loaded.items():
        if tokenizer is None or tokenizer_lib.fingerprint(tokenizer) != held_out.fingerprint:
            raise errors.InputError(
                f'{name} was made with another tokenizer than {held_out.folder}'
            )
        held_out.check_ids(tokenizer)
        n_vocab = loaded[name].model.config.n_vocab
        errors.require(
            held_out.n_vocab <= n_vocab,
            f'{held_out.folder} has {held_out.n_vocab} ids, the model {name} {n_vocab}',
        )
    n_ctx = scoring.n_ctx or min(m.config.n_ctx for m, _, _ in loaded.values())
    contexts, targets = context.windows(held_out, n_ctx, args.flags.windows)
    found: dict[str, dict] = {}
    with progress.Progress('score', None, ' windows') as bar:
        for name, (model, params, _) in loaded.items():
            asked = (model, params, contexts, targets, batch, bar.advance, mesh.rows())
            with mesh.scope():
                loss = context.loss_by_length(*asked)
                found[name] = {'weights': opened[name].said, 'nats_by_context_tokens': loss}
                if not isinstance(model.config, ngram.Config):  # a count has no gradient
                    norms = context.gradient_by_distance(*asked)
                    found[name]['gradient_norm_by_distance'] = norms.tolist()
    protocol = (
        f'{len(targets)} held-out targets, evenly spread; the same ones at every length of '
        f'context, up to {n_ctx} tokens; gradient of their log probability by each embedding, '
        'mean norm'
    )
    report = {'set': config.data.eval_sets[label], 'protocol': protocol, 'runs': found}
    report |= {'commit': program.commit()}
    if hosts.is_first():
        documents.write(workdir / RESULTS, report)
        plots.forgetting(found, workdir / PICTURE)
    for name, values in found.items():
        losses = values['nats_by_context_tokens']
        print(f'{name:10}', ', '.join(f'{k}: {v:.3f}' for k, v in losses.items()))
    _log.info('wrote %s and %s', workdir / RESULTS, workdir / PICTURE)


if __name__ == '__main__':
    program.run(main, __doc__, READS, define, default_config=base.OF_RUN)
