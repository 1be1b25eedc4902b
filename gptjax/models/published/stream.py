# SPDX-License-Identifier: Apache-2.0
"""Published tensors into our parameters, one after another: read, turned into ours, put in place.

Every tensor must be expected, present, and of the right shape.
"""

import json
import logging
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from gptjax.configs import errors
from gptjax.models import gpt, heads, weights
from gptjax.models.published import layout, tensors
from gptjax.text import tokenizer as tokenizer_lib

_NETWORK = 'network/'  # our parameters are below it
_log = logging.getLogger(__name__)


def read(
    path: pathlib.Path,
    family: layout.Layout,
    config: gpt.Config,
    stored: Mapping[str, tensors.Stored],
    tokenizer: tokenizer_lib.Tokenizer | None,
    dtype: str | None,
    shardings: weights.Shardings | None,
    progress: weights.Progress,
) -> weights.Pretrained:
    """A published model's tensors as our parameters, wherever they are wanted.

    Args:
      path: for errors.
      config: ours; its dtypes become `dtype`, or that of the tensors.
      stored: the tensors by their published names.

    Raises:
      InputError: a tensor is unexpected, missing, misshapen or unreadable; the message names it.
    """
    stored = _named(family, stored)
    embedding, head = family.tensors[0].name, _head(family)
    if config.tied_embedding and embedding not in stored and head in stored:
        stored[embedding] = stored.pop(head)  # as safetensors.torch.save_model leaves them
    _check_sizes(path, family, config, stored)
    config = weights.with_dtype(config, dtype or _dtype(stored))
    model = heads.LanguageModel(config)
    flat = flatten(weights.target(model, shardings))
    places = list(family.places(set(flat), config.n_layers))
    wanted = {place.name for place in places}
    tied = head if config.tied_embedding and head in stored else ''
    for name in sorted(stored.keys() - wanted - {tied}):
        said = _said(family, config, stored, name)
        raise errors.InputError(f'{path} holds an unexpected tensor {name}{said}')
    for name in sorted(wanted - stored.keys()):
        said = _said(family, config, stored, name)
        raise errors.InputError(f'{path} lacks the tensor {name}{said}; fetch it again')
    uncovered = flat.keys() - {p for place in places for p in place.tensor.paths}
    if uncovered:
        raise errors.InputError(f'{path}: nothing is published for our {min(uncovered)}')
    leaves = {name: _Leaf(x) for name, x in flat.items()}
    for place in places:
        try:
            array = stored[place.name].read()
            if jnp.issubdtype(array.dtype, jnp.floating) and not weights.is_finite(array):
                kind = 'NaN' if np.isnan(array).any() else 'infinite numbers'
                raise errors.InputError(f'it holds {kind}; fetch it again, or make it again')
            weights.check_range(array, config.param_dtype)
            parts = family.ours(place.tensor, array, config)
        except (errors.InputError, OSError, ValueError) as e:
            raise errors.InputError(f'{path}: {place.name}: {e}') from e
        for name, part in zip(place.tensor.paths, parts, strict=True):
            leaves[name].fill(part, place.layer)
            progress(part.size)
        del array, part, parts  # before the next one is read
        if place.name == embedding and tied:
            _check_tied(path, stored[tied], stored[place.name])
    params = {_NETWORK + name: leaf.array() for name, leaf in leaves.items()}
    tree = traverse_util.unflatten_dict(params, sep='/')
    _log.info('read %s parameters of %s', f'{sum(x.size for x in params.values()):,}', path)
    return weights.Pretrained(model, tree, tokenizer)


def _named(
    family: layout.Layout, stored: Mapping[str, tensors.Stored]
) -> dict[str, tensors.Stored]:
    """Without the network's prefix, which bare networks lack, and without buffers."""
    return {
        name.removeprefix(family.prefix): tensor
        for name, tensor in stored.items()
        if not name.endswith(family.ignored or ('\0',))
    }


def _check_sizes(
    path: pathlib.Path,
    family: layout.Layout,
    config: gpt.Config,
    stored: Mapping[str, tensors.Stored],
) -> None:
    """Holds the config against the tensors there are, before anything is made of its sizes."""
    places = [place for name in stored if (place := family.place(name))]
    for place in sorted(places, key=lambda place: family.tensors.index(place.tensor)):
        try:
            family.check_shape(place.tensor, stored[place.name].shape, config)
        except errors.InputError as e:
            raise errors.InputError(f'{path}: {place.name}: {e}') from e
    layers = {place.layer for place in places}
    missing = next(i for i in range(len(layers) + 1) if i not in layers)
    if missing < config.n_layers:
        norm = min(tensor.name for tensor in family.tensors if '{}' in tensor.name)
        name = norm.format(missing)
        said = _said(family, config, stored, name)
        raise errors.InputError(f'{path} lacks the tensor {name}{said}; fetch it again')


def _said(
    family: layout.Layout, config: gpt.Config, stored: Mapping[str, tensors.Stored], name: str
) -> str:
    """The field of the config by which a tensor should be there, or should not; '' = none."""

    def layer(name: str) -> int:
        found = re.search(r'\.(\d{1,9})\.', name)
        return int(found[1]) if found else -1

    def bias(kind: str) -> bool:
        return name.endswith('.bias') and f'.{kind}.' in name

    kind = next(filter(bias, family.fields), '')
    if name == _head(family):
        kind = 'head'
    elif layer(name) >= min(config.n_layers, 1 + max(map(layer, stored))):
        kind = 'layers'
    field = family.fields.get(kind, '')
    said = family.published(config) if field else {}
    return f', though its config says {field} = {json.dumps(said[field])}' if field else ''


def _head(family: layout.Layout) -> str:
    return next(t.name for t in family.tensors if t.paths == ('unembedding',))


def _check_tied(path: pathlib.Path, head: tensors.Stored, embedding: tensors.Stored) -> None:
    if not np.array_equal(head.read(), embedding.read()):
        raise errors.InputError(
            f'{path}: lm_head.weight differs from the embedding, though config.json ties them; '
            'set tie_word_embeddings to false there'
        )


def _dtype(stored: Mapping[str, tensors.Stored]) -> str:
    """The dtype of the matrices, where they agree on a half precision; else float32."""
    kinds = {tensor.dtype.name for tensor in stored.values() if len(tensor.shape) > 1}
    return kinds.pop() if len(kinds) == 1 and kinds <= {'float16', 'bfloat16'} else 'float32'


def flatten(params: Any) -> dict[str, Any]:
    """A network's parameters by their paths below it."""
    flat = traverse_util.flatten_dict(params, sep='/')
    return {name.removeprefix(_NETWORK): x for name, x in flat.items()}


class _Leaf:
    """A parameter that grows layer by layer in the memory of this host, then goes to its devices.

    Only what this process's devices hold is converted and copied. On a CPU the memory it grew in
    becomes the device's own.
    """

    def __init__(self, target: jax.ShapeDtypeStruct) -> None:
        self._target = target
        self._missing = target.size
        self._index = target.sharding.addressable_devices_indices_map(target.shape)
        self._parts: dict[str, np.ndarray] = {}  # by index: replicas share one
        self._array: jax.Array | None = None

    def fill(self, array: np.ndarray, layer: int) -> None:
        """Writes one layer of a stacked parameter, or the whole of another (layer -1)."""
        for key, index in {str(index): index for index in self._index.values()}.items():
            if key not in self._parts:
                shape = self._target.sharding.shard_shape(self._target.shape)
                self._parts[key] = tensors.aligned(shape, self._target.dtype)
            if layer < 0:
                self._parts[key][...] = array[index]
            else:
                self._parts[key][layer] = array[index[1:]]
        self._missing -= array.size
        if not self._missing:
            parts = [
                jax.device_put(self._parts[str(i)], device) for device, i in self._index.items()
            ]
            self._parts.clear()
            self._array = jax.make_array_from_single_device_arrays(
                self._target.shape, self._target.sharding, parts
            )

    def array(self) -> jax.Array:
        return self._array
