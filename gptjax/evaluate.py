# SPDX-License-Identifier: Apache-2.0
"""Scores a trained model on held-out text: nats per token, bits per byte, word perplexity.

Laptop:
  python -m gptjax.evaluate --config=experiments/quickstart.py --workdir=runs/quickstart
Published weights, on token shards made with their tokenizer:
  python -m gptjax.evaluate --config.init_from=SmolLM2.gguf --workdir=runs/smollm2 \
      --config.evaluate.n_ctx=1024 --config.evaluate.batch_windows=1
TPU VM; every token with at least half a window of context, on 16 devices:
  python -m gptjax.evaluate --config=experiments/gpt2/pretrain.py --workdir=/data/run \
      --config.evaluate.stride=512 --config.evaluate.batch_windows=64
"""

import json
import logging
import pathlib

from gptjax.configs import base, cli, errors
from gptjax.data import loader, tokens
from gptjax.evals import perplexity
from gptjax.models import pretrained
from gptjax.runtime import mesh as mesh_lib
from gptjax.runtime import program, progress
from gptjax.text import files
from gptjax.text import tokenizer as tokenizer_lib
from gptjax.training import losses
from gptjax.training import step as step_lib

EVALUATION = 'evaluation.json'
_log = logging.getLogger('gptjax')


def main(args: cli.Args) -> None:
    """Scores the held-out split of config.data.eval_set; writes WORKDIR/evaluation.json."""
    config = perplexity.Config(**args.config.evaluate)
    workdir = pathlib.Path(args.workdir)
    weights = args.config.init_from or args.workdir
    mesh = mesh_lib.Mesh(mesh_lib.Config(**args.config.mesh))
    if pretrained.wants_one_device(weights):
        mesh = mesh_lib.one_device()
    provenance = pretrained.provenance(weights)
    data = loader.Config(**args.config.data)
    with progress.Progress('stage', None, ' tokens') as bar:
        folder = tokens.locate(data.eval_set, workdir, data.stage_dir, bar.advance)
    held_out = tokens.open_set(folder, 'valid')
    with mesh.scope():
        with progress.Progress('read', None, ' parameters') as bar:
            model, params, tokenizer = pretrained.load(
                weights, shardings=mesh.shardings, progress=bar.advance
            )
        if tokenizer is None:
            _log.warning('%s has no tokenizer to compare with that of the tokens', weights)
        elif tokenizer_lib.fingerprint(tokenizer) != held_out.fingerprint:
            raise errors.InputError(
                f'the tokens in {held_out.folder} were made with another tokenizer than that of '
                f'{weights}; prepare them with the latter (--config.tokenizer.kind=file; of a '
                '.gguf file, python -m gptjax.convert makes a folder that has it)'
            )
        n_ctx = config.n_ctx or model.config.n_ctx
        errors.require(
            held_out.n_vocab <= model.config.n_vocab,
            f'the tokens in {held_out.folder} have {held_out.n_vocab} ids, the model of {weights} '
            f'{model.config.n_vocab}; prepare them with its tokenizer',
        )
        perplexity.check(held_out, n_ctx, config)
        mesh.check_batch(config.batch_windows, n_ctx)
        total = perplexity.n_windows(held_out, n_ctx, config)
        with progress.Progress('evaluate', total, ' windows') as bar:
            found = perplexity.score(
                step_lib.make_eval_step(losses.next_token(model.apply)), params, held_out, n_ctx,
                config, mesh, bar.advance,
            )  # fmt: skip
    report = {
        'weights': ', '.join(filter(None, (str(weights), provenance))),
        'set': args.config.data.eval_set,
        'protocol': found.protocol,
        'documents': found.documents,
        'tokens': found.tokens,
        'bytes': found.text_bytes,
        'words': found.words,
        **found.metrics(),
    }
    workdir.mkdir(parents=True, exist_ok=True)
    if program.is_first():
        files.replace(workdir / EVALUATION, json.dumps(report, indent=1) + '\n')
    for name, value in report.items():
        print(f'{name:18} {value:,.4f}' if isinstance(value, float) else f'{name:18} {value}')
    _log.info('wrote %s', workdir / EVALUATION)


if __name__ == '__main__':
    program.run(main, __doc__, default_config=base.__file__)
