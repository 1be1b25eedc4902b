# SPDX-License-Identifier: Apache-2.0
"""A published layout: which tensor and which field of config.json is which of ours, both ways.

A tensor's pattern is read as by einops, published axes -> ours. Letters as in gpt.py, and L n_ctx,
T the parts that are published as one tensor.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import einops
import numpy as np

from gptjax.configs import errors, sizes
from gptjax.models import gpt

_LAYER = re.compile(r'\.(0|[1-9][0-9]{0,8})\.')


class Tensor(NamedTuple):
    """One published tensor, or one for every layer where its name has a {}."""

    name: str
    paths: tuple[str, ...]  # of our parameters; of several, they are stacked along T
    pattern: str
    rotated: bool = False  # its last axis of ours is a head's, turned by rotary positions


class Place(NamedTuple):
    """Where a published tensor goes: our parameters, and the layer in them (-1 = not stacked)."""

    tensor: Tensor
    name: str
    layer: int


@dataclasses.dataclass(frozen=True)
class Layout:
    """One published family.

    Attributes:
      model_type: as config.json calls it.
      prefix: before every tensor's name but the head's, when the whole language model is published;
        absent where the bare network is.
      ignored: buffers that are published but not learned, by the end of their names.
      neighbours: rotary pairs are (2i, 2i + 1) there; ours are (i, i + dims / 2).
      defaults: of the fields of config.json that are read, as the published class has them.
      only: fields of config.json that must have this value: ours computes nothing else.
      fields: those of config.json that say which tensors there are, and of which shape: by the
        letter of an axis, 'layers', 'head', or the part of a tensor's name that has biases.
      section: config.json, defaults filled in -> fields of our model section.
      published: our Config -> config.json.
    """

    model_type: str
    prefix: str
    ignored: tuple[str, ...]
    neighbours: bool
    tensors: tuple[Tensor, ...]
    defaults: Mapping[str, Any]
    only: Mapping[str, Any]
    fields: Mapping[str, str]
    section: Callable[[Mapping[str, Any]], dict[str, Any]]
    published: Callable[[gpt.Config], dict[str, Any]]

    def config(self, published: Mapping[str, Any]) -> gpt.Config:
        """Our Config of a published config.json. Raises InputError on what ours cannot compute."""
        filled = {**self.defaults, **self.only, **published}
        for field, value in self.only.items():
            if filled[field] != value:
                raise errors.InputError(
                    f'config.json has {field} = {filled[field]!r}; only {value!r} is known here'
                )
        template = sizes.model('gpt2-small')
        section = self.section(filled)
        for name, value in section.items():
            wanted = (int, float) if isinstance(template[name], float) else type(template[name])
            if not isinstance(value, wanted) or isinstance(value, bool) != (wanted is bool):
                raise errors.InputError(f'config.json makes {name} = {value!r}, of the wrong type')
        return gpt.Config(**(template.to_dict() | section))

    def places(self, paths: set[str], n_layers: int) -> Iterator[Place]:
        """Every published tensor of a model with these parameters."""
        for tensor in self.tensors:
            if paths.issuperset(tensor.paths):
                if '{}' in tensor.name:
                    for layer in range(n_layers):
                        yield Place(tensor, tensor.name.format(layer), layer)
                else:
                    yield Place(tensor, tensor.name, -1)

    def place(self, name: str) -> Place | None:
        """Where a published tensor would go; None where the family has none of the name."""
        pattern = _LAYER.sub('.{}.', name, 1)
        layer = _LAYER.search(name)
        for tensor in self.tensors:
            if tensor.name == pattern:
                return Place(tensor, name, int(layer[1]) if layer else -1)
        return None

    def shape(self, tensor: Tensor, config: gpt.Config) -> tuple[int, ...]:
        """The shape of the published tensor."""
        sizes_ = _sizes(tensor, config)
        left = groups(tensor.pattern.split(' -> ')[0])
        return tuple(math.prod(sizes_[letter] for letter in group.split()) for group in left)

    def check_shape(self, tensor: Tensor, found: tuple[int, ...], config: gpt.Config) -> None:
        """Raises InputError where a published tensor's shape is not what the config says."""
        shape = self.shape(tensor, config)
        if found != shape:
            axes = zip(groups(tensor.pattern.split(' -> ')[0]), shape, found, strict=False)
            wrong = ' '.join(letters for letters, ours, theirs in axes if ours != theirs)
            names = (self.fields.get(letter) for letter in wrong.split())
            fields = ', '.join(dict.fromkeys(filter(None, names)))
            raise errors.InputError(
                f'its shape is {found} where its config says {shape}'
                + (f' (by {fields})' if fields else '')
            )

    def ours(self, tensor: Tensor, array: np.ndarray, config: gpt.Config) -> list[np.ndarray]:
        """Views of a published tensor as our parameters, one for each of its paths.

        Raises:
          InputError: its shape is not what the config says.
        """
        self.check_shape(tensor, array.shape, config)
        sizes_ = _sizes(tensor, config)
        left, right = tensor.pattern.split(' -> ')
        found = einops.rearrange(array, f'{left} -> {right}', **_used(sizes_, left))
        if tensor.rotated and self.neighbours:
            found = found[..., _order(config)]
        return list(found) if right.startswith('T ') else [found]

    def theirs(self, tensor: Tensor, arrays: list[np.ndarray], config: gpt.Config) -> np.ndarray:
        """The published tensor made of our parameters; the inverse of ours()."""
        left, right = tensor.pattern.split(' -> ')
        if tensor.rotated and self.neighbours:
            arrays = [array[..., np.argsort(_order(config))] for array in arrays]
        array = np.stack(arrays) if right.startswith('T ') else arrays[0]
        sizes_ = _used(_sizes(tensor, config), left)
        return np.ascontiguousarray(einops.rearrange(array, f'{right} -> {left}', **sizes_))


def groups(side: str) -> list[str]:
    """'D (T H K)' -> ['D', 'T H K']."""
    return [inner or letter for inner, letter in re.findall(r'\(([^)]*)\)|(\S+)', side)]


def _sizes(tensor: Tensor, config: gpt.Config) -> dict[str, int]:
    return {
        'D': config.d_model,
        'F': config.d_ff,
        'G': config.kv_heads,
        'H': config.n_heads,
        'K': config.d_head,
        'L': config.n_ctx,
        'T': len(tensor.paths),
        'V': config.n_vocab,
    }


def _used(sizes_: dict[str, int], side: str) -> dict[str, int]:
    return {letter: size for letter, size in sizes_.items() if letter in side}


def _order(config: gpt.Config) -> np.ndarray:
    """The published head dimension of each of ours, where rotary pairs are neighbours."""
    dims = config.rotary_dims
    turned = np.arange(dims).reshape(-1, 2).T.ravel()
    return np.concatenate([turned, np.arange(dims, config.d_head)])
