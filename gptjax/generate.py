# SPDX-License-Identifier: Apache-2.0
"""Continues prompts with a trained model; prints them and writes WORKDIR/samples.jsonl.

Laptop:
  python -m gptjax.generate --config=experiments/quickstart.py --workdir=runs/quickstart \
      --prompt="Return a list of" --config.decode.temperature=0.8 --config.decode.top_k=40
Published weights:
  python -m gptjax.generate --config.init_from=SmolLM2.gguf --workdir=runs/smollm2 \
      --prompt="The capital of France is" --config.decode.temperature=0
TPU VM, the same; the weights are spread over --config.mesh.tensor devices:
  python -m gptjax.generate --config=experiments/gpt2/pretrain.py --workdir=/data/run \
      --prompt="Once upon a time" --config.mesh.tensor=4
"""

import json
import logging
import pathlib

import jax.numpy as jnp
from absl import flags

from gptjax.configs import base, cli, errors
from gptjax.models import heads, pretrained
from gptjax.runtime import mesh as mesh_lib
from gptjax.runtime import program, progress
from gptjax.sampling import decode
from gptjax.text import files
from gptjax.text import tokenizer as tokenizer_lib

SAMPLES = 'samples.jsonl'
_log = logging.getLogger('gptjax')


def define(values: flags.FlagValues) -> None:
    """The program's own flags."""
    flags.DEFINE_multi_string(
        'prompt', [], 'A prompt; may be given several times.', flag_values=values
    )


def main(args: cli.Args) -> None:
    """Samples continuations of every --prompt."""
    config = decode.Config(**args.config.decode)
    errors.require(bool(args.flags.prompt), 'give --prompt="..."; several are allowed')
    weights = args.config.init_from or args.workdir
    mesh = mesh_lib.Mesh(mesh_lib.Config(**args.config.mesh))
    if pretrained.wants_one_device(weights):
        mesh = mesh_lib.one_device()
    with mesh.scope():
        with progress.Progress('read', None, ' parameters') as bar:
            model, params, tokenizer = pretrained.load(
                weights, shardings=mesh.shardings, progress=bar.advance
            )
        if tokenizer is None:
            raise errors.InputError(f'{weights} has no tokenizer, so no prompt can be read')
        ids = [_ids(tokenizer, prompt) for prompt in args.flags.prompt]
        found = decode.generate(
            decoder(model, tokenizer.n_vocab),
            params,
            ids,
            config,
            tokenizer.end_of_text,
            args.config.seed,
        )
    prompts = list(zip(args.flags.prompt, ids, strict=True))
    prompts = [prompt for prompt in prompts for _ in range(config.samples)]
    workdir = pathlib.Path(args.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    lines = []
    for (prompt, before), tokens in zip(prompts, found, strict=True):
        text = _continuation(tokenizer, before, tokens)
        lines.append(json.dumps({'prompt': prompt, 'text': text}, ensure_ascii=False) + '\n')
        print(f'{prompt}{text}\n---')
    files.replace(workdir / SAMPLES, ''.join(lines))
    _log.info('wrote %s', workdir / SAMPLES)


def _ids(tokenizer: tokenizer_lib.Tokenizer, prompt: str) -> list[int]:
    ids = tokenizer.encode(prompt)
    if not ids and tokenizer.end_of_text < 0:
        raise errors.InputError(
            f'the prompt {prompt!r} has no token, and the vocabulary no end-of-text to begin with'
        )
    return ids or [tokenizer.end_of_text]


def _continuation(tokenizer: tokenizer_lib.Tokenizer, before: list[int], tokens: list[int]) -> str:
    """The text of what follows a prompt; decoded alone, it could lose its first space."""
    prompt, whole = tokenizer.decode(before), tokenizer.decode([*before, *tokens])
    return whole[len(prompt) :] if whole.startswith(prompt) else tokenizer.decode(tokens)


def decoder(model: heads.LanguageModel, n_vocab: int) -> decode.Decoder:
    """What decoding needs of a language model; ids from n_vocab on are padding, never drawn."""

    def extend(params, tokens_BxL, positions_BxL, cache):
        logits_Bx1xV, cache = model.apply(
            {'params': params}, tokens_BxL, positions_BxL, cache, method='extend'
        )
        real_V = jnp.arange(logits_Bx1xV.shape[-1]) < n_vocab
        return jnp.where(real_V[None, None], logits_Bx1xV, jnp.finfo(jnp.float32).min), cache

    def empty_cache(rows, slots):
        return model.config.empty_cache(rows, slots)

    return decode.Decoder(extend, empty_cache, model.config.n_ctx)


if __name__ == '__main__':
    program.run(main, __doc__, define, default_config=base.__file__)
