# SPDX-License-Identifier: Apache-2.0
"""Trained weights in and out: our workdirs, Hugging Face folders, GGUF files."""

import functools
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from gptjax.configs import errors
from gptjax.models import gpt, heads, sources, weights, workdirs
from gptjax.models.published import beside, families, layout, stream, tensors, tokenizer_files
from gptjax.storage import files, sums, unfinished
from gptjax.text import tokenizer as tokenizer_lib

TOKENIZER = workdirs.TOKENIZER  # folder below a workdir
Pretrained = weights.Pretrained
save_workdir = workdirs.save  # beside save(), of published folders


def load(
    path: str | pathlib.Path | weights.Source,
    dtype: str | None = None,
    shardings: weights.Shardings | None = None,
    progress: weights.Progress = lambda parameters: None,
) -> Pretrained:
    """Weights as a model: `model.apply({'params': params}, tokens_BxL)` gives logits.

    Memory beyond the parameters that end up on this host: the largest published tensor. Where the
    devices have memory of their own, also the parameter being read, as far as they hold it.

    Args:
      path: a workdir of ours (its newest whole checkpoint), WORKDIR/best for the best by
        checkpoint.keep_best, WORKDIR/checkpoints/<step>, each with /average behind it for the
        average of its weights that optim.ema_decay kept; a Hugging Face folder of gpt2, openai-gpt,
        gptj or llama (config.json with model.safetensors or pytorch_model.bin); or a GGUF file of
        the llama architecture. What sources.open() gave of it serves as well.
      dtype: of the parameters, 'float32', 'bfloat16' or 'float16'; None = as they are stored,
        quantised ones as float32. They are computed with in the same dtype, in float32 where they
        are float16.
      shardings: boxed abstract parameters -> shardings, as runtime.mesh's; None = one device.
      progress: is told the parameters read.

    Returns:
      (model, params, tokenizer); the tokenizer is None where the folder has none.

    Raises:
      InputError: there are no weights, a tensor is unexpected, missing or misshapen (the message
        names it), or the model is not one of these.
    """
    errors.require(
        dtype in (None, 'float32', 'bfloat16', 'float16'),
        f'dtype must be float32, bfloat16, float16 or None, got {dtype!r}',
    )
    source = path if isinstance(path, weights.Source) else sources.open(path)
    return source.load(dtype, shardings, progress)


def save(
    path: str | pathlib.Path,
    model: heads.LanguageModel,
    params: Any,
    tokenizer: tokenizer_lib.Tokenizer | None,
    note: str = '',
    kept: beside.Files | None = None,
    made_of: str = '',
    shard_bytes: int = 5 * 10**9,
    progress: Callable[[int], None] = lambda written: None,
) -> None:
    """Writes a Hugging Face folder: config.json, safetensors, tokenizer, generation_config.json.

    Besides the parameters, one file of at most `shard_bytes` is held in memory. Until all is
    written the folder is marked as unfinished; called again, what is there is written afresh.

    Args:
      note: what its provenance will say.
      kept: what was published beside the weights, as sources.open() gives it.
      made_of: by which unfinished.is_made_of() knows the folder again.

    Raises:
      InputError: no published layout holds this model, or the folder is not empty.
    """
    path = pathlib.Path(path)
    config = model.config
    if not isinstance(config, gpt.Config):
        raise errors.InputError(f'no published layout holds a model of family {config.family!r}')
    family = families.of(config)
    flat = stream.flatten(nn.meta.unbox(params))
    dtype = np.dtype(jnp.dtype(config.param_dtype))

    def get(place: layout.Place) -> np.ndarray:
        leaves = [flat[name] for name in place.tensor.paths]
        arrays = [np.asarray(x if place.layer < 0 else x[place.layer]) for x in leaves]
        return family.theirs(place.tensor, arrays, config)

    def items() -> Any:
        for place in family.places(set(flat), config.n_layers):
            prefix = '' if place.name.startswith('lm_head.') else family.prefix
            size = dtype.itemsize * int(np.prod(family.shape(place.tensor, config)))
            yield prefix + place.name, size, functools.partial(get, place)

    with unfinished.writing(path, made_of):
        summed = tensors.write(path, items(), shard_bytes, progress)
        ends: dict[str, int] = {}
        found: dict[str, bytes] = {}
        if tokenizer is not None:
            if tokenizer.end_of_text >= 0:
                ends = {'bos_token_id': tokenizer.beginning, 'eos_token_id': tokenizer.end_of_text}
            found = tokenizer_files.of(tokenizer, config.n_ctx)
        found[beside.GENERATION] = _json(ends)
        found |= kept or {}
        found.pop(sources.CONFIG, None)
        beside.write(path, found)
        ours = {'model_type': family.model_type, **family.published(config)}
        ours |= {'torch_dtype': config.param_dtype, sources.NOTE: note}
        files.replace(path / sources.CONFIG, _json(beside.config(kept or {}, ours, ends)))
        summed += [p.name for p in tokenizer_lib.files_of(path) if p.parent == path]
        sums.write(path, {*summed, *beside.summed(found), sources.CONFIG})


def _json(said: Mapping[str, Any]) -> bytes:
    return (json.dumps(said, indent=2) + '\n').encode()
