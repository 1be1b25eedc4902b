# SPDX-License-Identifier: Apache-2.0
"""What trained weights are, wherever they come from."""

import abc
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jax.sharding import SingleDeviceSharding

from gptjax.configs import errors
from gptjax.models import axes, heads
from gptjax.storage import scratch
from gptjax.text import tokenizer as tokenizer_lib

Shardings = Callable[[Any], Any]  # boxed abstract parameters -> shardings, as runtime.mesh's
Progress = Callable[[int], None]  # is told the parameters read
_CHECKED = 2**15  # numbers at a time, which stay in the processor's cache
OBJECTIVE = 'next_token'  # of weights that do not say another


class Pretrained(NamedTuple):
    """A model: `model.apply({'params': params}, tokens_BxL)` gives logits."""

    model: heads.LanguageModel
    params: Any
    tokenizer: tokenizer_lib.Tokenizer | None  # None where the weights have none


class Source(abc.ABC):
    """Where weights come from; models.sources.open() tells which."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path

    @abc.abstractmethod
    def load(
        self, dtype: str | None, shardings: Shardings | None, progress: Progress
    ) -> Pretrained:
        """Arguments and errors as pretrained.load()."""

    @abc.abstractmethod
    def identity(self) -> str:
        """Changes with the weights: other ones under the same path have another identity."""

    @property
    @abc.abstractmethod
    def provenance(self) -> str:
        """What must stand beside every score: how they were quantised; '' = nothing."""

    @property
    @abc.abstractmethod
    def beside(self) -> Mapping[str, bytes]:
        """What was published beside tensors and vocabulary: name of a file -> content."""

    @property
    def decoding(self) -> Mapping[str, Any]:
        """The generation options of the run that made them, where it set any."""
        return {}

    @property
    def objective(self) -> str:
        """What they were trained on, as train.objective says it."""
        return OBJECTIVE

    @property
    def train_tokens(self) -> int:
        """How many tokens they were trained on; 0 = unknown."""
        return 0

    @functools.cached_property
    def said(self) -> str:
        """The path with its provenance: how results name the weights."""
        return ', '.join(filter(None, (scratch.told(str(self.path)), self.provenance)))


def target(model: nn.Module, shardings: Shardings | None) -> Any:
    """Abstract parameters in the shardings wanted; None = one device.

    Raises:
      UsageError: a parameter does not divide over the mesh.
    """
    with jax.sharding.use_abstract_mesh(axes.NO_MESH):  # else tracing fails where one does not
        boxed = jax.eval_shape(model.init_params, jax.random.key(0))
    plain = nn.meta.unbox(boxed)
    one = SingleDeviceSharding(jax.devices()[0])
    placed = jax.tree.map(lambda _: one, plain) if shardings is None else shardings(boxed)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), plain, placed
    )


def check_finite(params: Any, path: pathlib.Path) -> None:
    """Raises InputError where a parameter holds NaN or infinite numbers; it names the first."""
    flat = traverse_util.flatten_dict(params, sep='/')
    floats = {name: x for name, x in flat.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    on_host = jax.devices()[0].platform == 'cpu'  # numpy is faster than a program there
    finite = _are_finite_here(floats) if on_host else jax.device_get(_are_finite(floats))
    wrong = [name for name, right in finite.items() if not right]
    if wrong:
        raise errors.InputError(
            f'{path}: {wrong[0]} holds NaN or infinite numbers, as do {len(wrong)} of '
            f'{len(floats)} parameters; use weights from before'
        )


def check_range(array: np.ndarray, dtype: str) -> None:
    """Raises InputError where numbers would become infinite in a dtype."""
    if dtype == 'float16' and np.abs(array).max(initial=0) > np.finfo(np.float16).max:
        raise errors.InputError('it has numbers beyond float16; choose another --dtype')


def is_finite(array: np.ndarray) -> bool:
    """Whether no number is NaN or infinite: no exponent has every bit set."""
    unsigned = np.dtype(f'u{array.dtype.itemsize}')
    infinity = np.array(np.inf, array.dtype).view(unsigned)
    no_sign = unsigned.type(2 ** (8 * unsigned.itemsize - 1) - 1)
    flat = array.ravel('K').view(unsigned)
    return all(
        (flat[start : start + _CHECKED] & no_sign).max() < infinity
        for start in range(0, flat.size, _CHECKED)
    )


def _are_finite_here(flat: dict[str, jax.Array]) -> dict[str, bool]:
    shards = {name: [s.data for s in x.addressable_shards] for name, x in flat.items()}
    return {name: all(is_finite(np.asarray(s)) for s in each) for name, each in shards.items()}


@jax.jit
def _are_finite(flat: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: jnp.isfinite(x).all() for name, x in flat.items()}


def with_dtype(config: Any, dtype: str) -> Any:
    """A model's config with its parameters in another dtype, and computed with in it."""
    compute = 'float32' if dtype == 'float16' else dtype  # float16 overflows too easily
    return dataclasses.replace(config, param_dtype=dtype, compute_dtype=compute)
