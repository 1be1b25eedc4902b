# SPDX-License-Identifier: Apache-2.0
"""Trained weights as a model that can be applied; for now, from our own workdirs."""

import logging
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import linen as nn
from jax.sharding import SingleDeviceSharding

from gptjax.configs import errors
from gptjax.models import heads
from gptjax.runtime import checkpoint
from gptjax.text import tokenizer as tokenizer_lib

TOKENIZER = 'tokenizer'  # folder below a workdir
_log = logging.getLogger(__name__)


class Pretrained(NamedTuple):
    model: heads.LanguageModel
    params: Any
    tokenizer: tokenizer_lib.Tokenizer


def load(path: str, shardings: Callable[[Any], Any] | None = None) -> Pretrained:
    """The newest whole checkpoint of a workdir, on any devices, whatever it was trained on.

    Args:
      path: a workdir that python -m gptjax.train made.
      shardings: boxed abstract parameters -> shardings, as runtime.mesh's; None = one device.

    Raises:
      InputError: there is no checkpoint or no tokenizer.
    """
    found = checkpoint.latest(path, put_aside=False)
    if found is None:
        raise errors.InputError(
            f'no checkpoint in {path}; train one with python -m gptjax.train, or name another '
            'workdir with --config.init_from'
        )
    folder, meta = found
    tokenizer = tokenizer_lib.load(pathlib.Path(path) / TOKENIZER)
    if tokenizer_lib.fingerprint(tokenizer) != meta['tokenizer']:
        raise errors.InputError(
            f'the tokenizer in {path}/{TOKENIZER} is not the one that the weights were trained '
            'with; put that one back'
        )
    section = meta['config']['model']
    section['attention'] = tuple(section['attention'])  # JSON knows lists only
    model = heads.build(section)
    boxed = jax.eval_shape(model.init_params, jax.random.key(0))
    plain = nn.meta.unbox(boxed)
    if shardings is None:
        one = SingleDeviceSharding(jax.devices()[0])
        placed = jax.tree.map(lambda _: one, plain)
    else:
        placed = shardings(boxed)
    target = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), plain, placed
    )
    params = checkpoint.restore(folder, meta, params=target)['params']
    _log.info('read step %d of %s', meta['step'], path)
    return Pretrained(model, params, tokenizer)
