# SPDX-License-Identifier: Apache-2.0
"""What a network's hidden states are used for; for now, language modelling."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import linen as nn
from jaxtyping import Array, ArrayLike, Float, Int, Num

from gptjax.configs import errors, fields, lookup
from gptjax.configs.sections import models as sections
from gptjax.models import axes, layers

Section = Mapping[str, Any] | ml_collections.ConfigDict  # the model section of a config


@runtime_checkable
class Config(Protocol):
    """What the Config of every model family has beside its fields."""

    family: str  # a module of gptjax.models
    n_ctx: int  # tokens of a training window; the most a GPT can read
    n_vocab: int

    def network(self) -> nn.Module:
        """(tokens, positions, cache) -> (hidden, cache); unembed(hidden) -> logits; nats()."""

    most_tokens: int | None  # that can be read in one go; None = any number
    has_slots: bool  # whether its past is keys and values in slots, one a position

    def empty_cache(self, batch: int, slots: int, dtype: str = '') -> Any:
        """The decoding state of `batch` rows of up to `slots` tokens: the first axis is rows.

        A dtype of 'int8' is for keys and values; '' = the model's.
        """

    def flops_per_token(self, n_params: int) -> float:
        """FLOPs of training on a token."""

    def rate_scale(self, about: axes.Parameter) -> float:
        """What multiplies the learning rate of a parameter."""

    def kernels(self, windows: int) -> dict[str, str]:
        """Part -> what computes it in training, so many windows at once, on the mesh in force.

        Raises:
          UsageError: that cannot be had.
        """


class LanguageModel(nn.Module):
    """Next-token logits, from a network of any family: a GPT, an RNN, an n-gram model."""

    config: Config

    def setup(self) -> None:
        self.network = self.config.network()

    def __call__(
        self,
        tokens_BxL: Int[ArrayLike, 'B L'],
        positions_BxL: Int[ArrayLike, '#B L'] | None = None,
    ) -> Float[Array, 'B L V']:
        """float32 logits of the next token at every place.

        Args:
          tokens_BxL: token ids.
          positions_BxL: their positions; -1 marks padding, which nothing sees. None = 0 .. L-1.

        Raises:
          InputError: an id is outside the vocabulary. Within jit ids are not known, and such a one
            is read as another in silence.
        """
        return self.project(self.hidden(tokens_BxL, positions_BxL))

    def hidden(
        self,
        tokens_BxL: Int[ArrayLike, 'B L'],
        positions_BxL: Int[ArrayLike, '#B L'] | None = None,
    ) -> Num[Array, 'B L D']:
        """Hidden states; an n-gram model's are numbers of contexts."""
        _check_ids(tokens_BxL, self.config.n_vocab)
        return self.network(tokens_BxL, positions_BxL)[0]

    def project(self, hidden_BxLxD: Num[Array, 'B L D']) -> Float[Array, 'B L V']:
        """float32 logits of hidden states."""
        return self.network.unembed(hidden_BxLxD)

    def nats(
        self,
        tokens_BxL: Int[ArrayLike, 'B L'],
        targets_BxL: Int[ArrayLike, 'B L'],
        weights_BxL: Float[ArrayLike, 'B L'],
        z_loss: float = 0.0,
    ) -> Float[Array, '']:
        """The weighted sum of -log p(target) in nats, float32, of positions 0 .. L-1.

        Args:
          weights_BxL: any numbers; their gradient is each target's -log p.
          z_loss: what the square of log Z is multiplied with and added to each target's -log p, Z
            the softmax's denominator (PaLM, section 5); what that comes to is logged as z_loss.
        """
        _check_ids(targets_BxL, self.config.n_vocab)
        arrays = (self.hidden(tokens_BxL), targets_BxL, weights_BxL)
        total, added = self.network.nats(*arrays, z_loss)
        if z_loss:
            weight = jnp.sum(weights_BxL)
            mean = jnp.where(weight == 0, 0.0, added / jnp.where(weight == 0, 1.0, weight))
            layers.sow_measure(self, 'z_loss', mean)
        return total

    def extend(
        self,
        tokens_BxL: Int[ArrayLike, 'B L'],
        positions_BxL: Int[ArrayLike, 'B L'],
        cache: Any,
        every: bool = False,
        tree: Any = None,
    ) -> tuple[Float[Array, 'B _ V'], Any]:
        """Logits after tokens appended to a cache, and the longer cache.

        Args:
          tokens_BxL: the next tokens of every row.
          positions_BxL: their positions; -1 marks padding, anywhere.
          cache: the past.
          every: give logits at all places, not only (B, 1, V) at each row's highest position.
          tree: attention.Tree, where each row of a GPT's cache holds several texts.
        """
        _check_ids(tokens_BxL, self.config.n_vocab)
        more = () if tree is None else (tree,)
        hidden_BxLxD, cache = self.network(tokens_BxL, positions_BxL, cache, *more)
        if not every and hidden_BxLxD.shape[1] > 1:
            last_Bx1x1 = jnp.argmax(positions_BxL, axis=1)[:, None, None]
            hidden_BxLxD = jnp.take_along_axis(hidden_BxLxD, last_Bx1x1, axis=1)
        return self.project(hidden_BxLxD), cache

    def init_params(self, rng: jax.Array) -> dict:
        """Boxed parameters, each with its logical axes; jit or eval_shape it."""
        return self.init(rng, jnp.zeros((1, 1), jnp.int32))['params']


def _check_ids(ids: ArrayLike, n_vocab: int) -> None:
    """Raises InputError on ids outside the vocabulary, where ids are known: not within jit."""
    if isinstance(ids, jax.core.Tracer) or not getattr(ids, 'is_fully_addressable', True):
        return
    found = np.asarray(ids)
    if found.size and (found.min() < 0 or found.max() >= n_vocab):
        wrong = found.min() if found.min() < 0 else found.max()
        raise errors.InputError(
            f'token {wrong} is outside the vocabulary: ids are from 0 to {n_vocab - 1}'
        )


def configure(section: Section) -> Config:
    """The Config that a config's model section describes, of the family that it names.

    Raises:
      UsageError: the family or a field is unknown, missing or out of range.
    """
    errors.require('family' in section, 'the model section names no family')
    family = section['family']
    errors.require(
        family in sections.FAMILIES,
        f'model.family = {family!r} is not one of: {", ".join(sorted(sections.FAMILIES))}',
    )
    config = lookup.module('gptjax.models', family).Config
    known = (field.name for field in dataclasses.fields(config))
    fields.check(section, known, f'the model section of family {family!r}')
    return fields.make(config, section, 'model')


def build(section: Section, head: str = 'language_model') -> LanguageModel:
    """The model of a config's model section, under a head of HEADS.

    Raises:
      UsageError: there is no such head; errors as in configure().
    """
    errors.require(head in HEADS, f'no head {head!r}; there are: {", ".join(HEADS)}')
    return HEADS[head](configure(section))


def name_of(model: nn.Module) -> str:
    """The head of a model, as it stands in a checkpoint's meta."""
    return next(name for name, kind in HEADS.items() if type(model) is kind)


def describe(model: nn.Module) -> dict[str, axes.Parameter]:
    """Path -> what is known of the parameter beside its values, its learning rate included."""
    boxed = jax.eval_shape(model.init_params, jax.random.key(0))
    return axes.describe(boxed, model.config.rate_scale)


def differing(one: Config, other: Config) -> list[str]:
    """The fields in which two Configs compute different things; training and numerics aside."""
    a, b = dataclasses.asdict(one), dataclasses.asdict(other)
    if a['family'] != b['family']:
        return ['family']
    a |= {'n_kv_heads': getattr(one, 'kv_heads', 0)}  # 0 there stands for all heads
    b |= {'n_kv_heads': getattr(other, 'kv_heads', 0)}
    free = _FREE if a.get('positions') == 'learned' else _FREE | {'n_ctx'}
    return [name for name in a if a[name] != b[name] and name not in free]


HEADS = {'language_model': LanguageModel}  # what stands in a checkpoint's meta -> what it is
# The same weights under other values of these are the same model.
_FREE = frozenset(
    {
        'init_std',
        'position_init_std',
        'residual_init_std',
        'init_range',
        'embed_dropout',
        'attention_dropout',
        'residual_dropout',
        'dropout',
        'bptt_tokens',
        'param_dtype',
        'compute_dtype',
        'scan_layers',
        'remat',
    }
)
