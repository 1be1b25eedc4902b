# SPDX-License-Identifier: Apache-2.0
"""Trained weights in and out: our workdirs, Hugging Face folders, GGUF files.

Weights stream: one published tensor after another is read, turned into ours, and written into its
place on the devices. Every tensor must be expected, present, and of the right shape.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jax.sharding import SingleDeviceSharding

from gptjax.configs import errors
from gptjax.models import gpt, heads
from gptjax.models.published import families, gguf, layout, tensors, tokenizer_files
from gptjax.runtime import checkpoint
from gptjax.text import files
from gptjax.text import tokenizer as tokenizer_lib

TOKENIZER = 'tokenizer'  # folder below a workdir
_CONFIG = 'config.json'
_NOTE = 'gptjax_provenance'  # our field of config.json
_NETWORK = 'network/'  # our parameters are below it
_log = logging.getLogger(__name__)


class Pretrained(NamedTuple):
    model: heads.LanguageModel
    params: Any
    tokenizer: tokenizer_lib.Tokenizer | None


def load(
    path: str | pathlib.Path,
    dtype: str | None = None,
    shardings: Callable[[Any], Any] | None = None,
    progress: Callable[[int], None] = lambda parameters: None,
) -> Pretrained:
    """Weights as a model: `model.apply({'params': params}, tokens_BxL)` gives logits.

    Memory beyond the parameters that end up on this host: the largest published tensor. Where the
    devices have memory of their own, also the parameter being read, as far as they hold it.

    Args:
      path: a workdir of ours (its newest whole checkpoint), or WORKDIR/average for the average of
        its weights that optim.ema_decay kept; a Hugging Face folder of gpt2,
        openai-gpt, gptj or llama (config.json with model.safetensors or pytorch_model.bin); or a
        GGUF file of the llama architecture.
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
    path = pathlib.Path(path)
    errors.require(
        dtype in (None, 'float32', 'bfloat16', 'float16'),
        f'dtype must be float32, bfloat16, float16 or None, got {dtype!r}',
    )
    if not path.exists() and not _run(path)[0]:
        raise errors.InputError(f'{path} does not exist; name a workdir, a folder or a .gguf file')
    if _is_gguf(path):
        with _reading(path):
            file = _gguf(path)
            config, stored, tokenizer = file.config(), file.tensors(), file.tokenizer()
        return _stream(path, families.LLAMA_GGUF, config, stored, tokenizer, dtype, shardings,
                       progress)  # fmt: skip
    workdir, item = _run(path)
    if workdir:
        return _workdir(workdir, item, dtype, shardings)
    if found := _published(path):
        kind = found['model_type']
        if kind not in list(families.ALL):
            raise errors.InputError(
                f'{path} holds a {kind!r}; there are: {", ".join(families.ALL)}'
            )
        with _reading(path / _CONFIG):
            config = families.ALL[kind].config(found)
        tokenizer = tokenizer_lib.find(path)
        return _stream(path, families.ALL[kind], config, tensors.find(path), tokenizer, dtype,
                       shardings, progress)  # fmt: skip
    raise errors.InputError(
        f'no checkpoint in {path}, and it is no published folder (config.json with a model_type) '
        'nor a .gguf file; train one with python -m gptjax.train, or name another with '
        '--config.init_from'
    )


def save(
    path: str | pathlib.Path,
    model: heads.LanguageModel,
    params: Any,
    tokenizer: tokenizer_lib.Tokenizer | None,
    note: str = '',
    token_ids: Mapping[str, Any] | None = None,
    shard_bytes: int = 5 * 10**9,
    progress: Callable[[int], None] = lambda written: None,
) -> None:
    """Writes a Hugging Face folder: config.json, safetensors, tokenizer, generation_config.json.

    Besides the parameters, one file of at most `shard_bytes` is held in memory. config.json is
    written last: a folder without one is unfinished.

    Args:
      note: what provenance() will say of the folder.
      token_ids: bos_token_id and eos_token_id; None = end-of-text for both.

    Raises:
      InputError: no published layout holds this model, or the folder is not empty.
    """
    path = pathlib.Path(path)
    if path.exists() and any(path.iterdir()):
        raise errors.InputError(f'{path} is not empty; choose another folder, or remove it')
    config = model.config
    if not isinstance(config, gpt.Config):
        raise errors.InputError(f'no published layout holds a model of family {config.family!r}')
    family = families.of(config)
    flat = _flat(nn.meta.unbox(params))
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

    path.mkdir(parents=True, exist_ok=True)
    tensors.write(path, items(), shard_bytes, progress)
    end = -1 if tokenizer is None else tokenizer.end_of_text
    ids = token_ids or ({'bos_token_id': end, 'eos_token_id': end} if end >= 0 else {})
    if tokenizer is not None:
        for name, content in tokenizer_files.of(tokenizer, config.n_ctx).items():
            files.replace(path / name, content)
    files.replace(path / 'generation_config.json', json.dumps(ids, indent=2) + '\n')
    described = {'model_type': family.model_type, **family.published(config), **ids}
    described |= {'torch_dtype': config.param_dtype, _NOTE: note}
    files.replace(path / _CONFIG, json.dumps(described, indent=2) + '\n')


def provenance(path: str | pathlib.Path) -> str:
    """What must stand beside every score of these weights: how they were quantised; '' = nothing.

    Of a GGUF file, and of what was converted from one.
    """
    path = pathlib.Path(path)
    if _is_gguf(path):
        return f'{path.name}, quantised as {_gguf(path).quantisation()}'
    if workdir := _run(path)[0]:
        return checkpoint.newest_meta(workdir).get('provenance', '')
    return _published(path).get(_NOTE, '')


def token_ids(path: str | pathlib.Path) -> dict[str, Any]:
    """bos_token_id and eos_token_id as published with weights; empty where nothing says."""
    path = pathlib.Path(path)
    if _is_gguf(path):
        return _gguf(path).token_ids()
    if workdir := _run(path)[0]:
        return checkpoint.newest_meta(workdir).get('token_ids', {})
    found = _published(path)
    return {name: found[name] for name in ('bos_token_id', 'eos_token_id') if name in found}


def wants_one_device(path: str | pathlib.Path) -> bool:
    """Whether it is an n-gram model, which is looked up on the host.

    Host callbacks of a program over several devices wait for one another until they time out.
    """
    meta = checkpoint.newest_meta(path)
    return bool(meta) and meta['config']['model']['family'] == 'ngram'


@contextlib.contextmanager
def _reading(path: pathlib.Path) -> Iterator[None]:
    """What a damaged file makes libraries raise, as one clear line."""
    try:
        yield
    except errors.InputError:
        raise
    except KeyError as e:
        raise errors.InputError(f'{path} has no field {e}; fetch it again') from e
    except Exception as e:
        raise errors.InputError(f'cannot read {path}: {e}; fetch it again') from e


def _is_gguf(path: pathlib.Path) -> bool:
    return path.suffix == '.gguf' and path.is_file()


@functools.lru_cache(maxsize=1)
def _gguf(path: pathlib.Path) -> gguf.File:
    """Opening takes seconds: it reads the vocabulary."""
    return gguf.File(path)


def _published(path: pathlib.Path) -> dict[str, Any]:
    """config.json of a published folder; empty where it is none."""
    if not (path / _CONFIG).is_file():
        return {}
    with _reading(path / _CONFIG):
        found = json.loads((path / _CONFIG).read_text(encoding='utf-8-sig'))
    return found if isinstance(found, dict) and 'model_type' in found else {}


def _stream(
    path: pathlib.Path,
    family: layout.Layout,
    config: gpt.Config,
    stored: Mapping[str, tensors.Stored],
    tokenizer: tokenizer_lib.Tokenizer | None,
    dtype: str | None,
    shardings: Callable[[Any], Any] | None,
    progress: Callable[[int], None],
) -> Pretrained:
    """A published model's tensors as our parameters, wherever they are wanted."""
    stored = _named(family, stored)
    config = _with_dtype(config, dtype or _dtype(stored))
    model = heads.LanguageModel(config)
    target = _target(model, shardings)
    flat = _flat(target)
    places = list(family.places(set(flat), config.n_layers))
    wanted = {place.name for place in places}
    tied = 'lm_head.weight' if config.tied_embedding and 'lm_head.weight' in stored else ''
    for name in sorted(stored.keys() - wanted - {tied}):
        raise errors.InputError(f'{path} holds an unexpected tensor {name}; nothing of it was used')
    for name in sorted(wanted - stored.keys()):
        raise errors.InputError(f'{path} lacks the tensor {name}; fetch it again')
    uncovered = flat.keys() - {p for place in places for p in place.tensor.paths}
    if uncovered:
        raise errors.InputError(f'{path}: nothing is published for our {min(uncovered)}')
    leaves = {name: _Leaf(x) for name, x in flat.items()}
    for place in places:
        try:
            parts = family.ours(place.tensor, stored[place.name].read(), config)
        except (errors.InputError, OSError, ValueError) as e:
            raise errors.InputError(f'{path}: {place.name}: {e}') from e
        for name, part in zip(place.tensor.paths, parts, strict=True):
            leaves[name].fill(part, place.layer)
            progress(part.size)
        del part, parts  # before the next one is read
        if place.name == family.tensors[0].name and tied:
            _check_tied(path, stored[tied], stored[place.name])
    params = {_NETWORK + name: leaf.array() for name, leaf in leaves.items()}
    tree = traverse_util.unflatten_dict(params, sep='/')
    _log.info('read %s parameters of %s', f'{sum(x.size for x in params.values()):,}', path)
    return Pretrained(model, tree, tokenizer)


def _named(
    family: layout.Layout, stored: Mapping[str, tensors.Stored]
) -> dict[str, tensors.Stored]:
    """Without the network's prefix, which bare networks lack, and without buffers."""
    return {
        name.removeprefix(family.prefix): tensor
        for name, tensor in stored.items()
        if not name.endswith(family.ignored or ('\0',))
    }


def _check_tied(path: pathlib.Path, head: tensors.Stored, embedding: tensors.Stored) -> None:
    if not np.array_equal(head.read(), embedding.read()):
        raise errors.InputError(
            f'{path}: lm_head.weight differs from the embedding, though config.json ties them; '
            'set tie_word_embeddings to false there'
        )


def _dtype(stored: Mapping[str, tensors.Stored]) -> str:
    """Of the matrices, where they agree on a half precision; else float32."""
    kinds = {tensor.dtype.name for tensor in stored.values() if len(tensor.shape) > 1}
    return kinds.pop() if len(kinds) == 1 and kinds <= {'float16', 'bfloat16'} else 'float32'


def _with_dtype(config: Any, dtype: str) -> Any:
    compute = 'float32' if dtype == 'float16' else dtype  # float16 overflows too easily
    return dataclasses.replace(config, param_dtype=dtype, compute_dtype=compute)


def _target(model: heads.LanguageModel, shardings: Callable[[Any], Any] | None) -> Any:
    """Abstract parameters in the shardings wanted."""
    boxed = jax.eval_shape(model.init_params, jax.random.key(0))
    plain = nn.meta.unbox(boxed)
    one = SingleDeviceSharding(jax.devices()[0])
    placed = jax.tree.map(lambda _: one, plain) if shardings is None else shardings(boxed)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), plain, placed
    )


def _flat(params: Any) -> dict[str, Any]:
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


def _run(path: pathlib.Path) -> tuple[pathlib.Path | None, str]:
    """The workdir that a path names, and the item of its checkpoints that is meant."""
    if (path / checkpoint.FOLDER).is_dir():
        return path, 'params'
    if path.name == 'average' and (path.parent / checkpoint.FOLDER).is_dir():
        return path.parent, 'average'
    return None, ''


def _workdir(
    path: pathlib.Path, item: str, dtype: str | None, shardings: Callable[[Any], Any] | None
) -> Pretrained:
    found = checkpoint.latest(path, put_aside=False)
    if found is None:
        raise errors.InputError(f'no whole checkpoint in {path}; train on, or name another workdir')
    folder, meta = found
    tokenizer = None
    if meta['tokenizer']:
        tokenizer = tokenizer_lib.load(path / TOKENIZER)
        if tokenizer_lib.fingerprint(tokenizer) != meta['tokenizer']:
            raise errors.InputError(
                f'the tokenizer in {path}/{TOKENIZER} is not the one that the weights were trained '
                'with; put that one back'
            )
    section = {  # JSON knows lists only
        name: tuple(value) if isinstance(value, list) else value
        for name, value in meta['config']['model'].items()
    }
    model = heads.build(section)
    target = _target(model, shardings)
    if item == 'average':
        if not any(name.startswith("['average']") for name in meta['shapes']):
            raise errors.InputError(f'{path} keeps no average; it was trained with ema_decay = 0')
        target = jax.tree.map(lambda x: x.update(dtype=jnp.float32), target)
        dtype = dtype or model.config.param_dtype
    params = checkpoint.restore(folder, meta, **{item: target})[item]
    if dtype and not hasattr(model.config, 'param_dtype'):
        raise errors.InputError(f'{path} holds a model of family {model.config.family!r}: no dtype')
    if dtype and dtype != model.config.param_dtype:
        model = heads.LanguageModel(_with_dtype(model.config, dtype))
    if dtype:
        params = jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), params)
    _log.info('read step %d of %s', meta['step'], path)
    return Pretrained(model, params, tokenizer)
