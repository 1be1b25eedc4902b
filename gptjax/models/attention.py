# SPDX-License-Identifier: Apache-2.0
"""Attention in any form of models/masks.py, with rotary positions and an explicit cache."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, Shaped

from gptjax.configs import errors
from gptjax.models import axes, layers, masks
from gptjax.models.kernels import flash


@dataclasses.dataclass(frozen=True)
class Config:
    """What gpt.Config says of attention; the fields are explained in configs/sections/models.py."""

    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    attention: tuple[str, ...]
    band_width: int
    positions: Literal['learned', 'rotary']
    rotary_dims: int
    rotary_base: float
    rotary_scaling: tuple[float, ...]
    attention_bias: bool
    attention_dropout: float

    def __post_init__(self) -> None:
        errors.require_positive(self, 'd_model', 'n_heads', 'd_head', 'rotary_base')
        errors.require_between(self, 1e-30, 1e30, 'rotary_base')
        errors.require_choice(self, 'positions', ('learned', 'rotary'))
        errors.require_between(self, 0.0, 0.99, 'attention_dropout')
        errors.require(
            self.n_kv_heads >= 0 and self.n_heads % self.kv_heads == 0,
            f'n_heads = {self.n_heads} is not a multiple of n_kv_heads = {self.n_kv_heads}',
        )
        rotary = self.positions == 'rotary'
        errors.require(
            self.rotary_dims % 2 == 0 and rotary * 2 <= self.rotary_dims <= rotary * self.d_head,
            f'rotary_dims = {self.rotary_dims} does not fit positions = {self.positions!r}: even, '
            f'from 2 to d_head = {self.d_head} for rotary positions, 0 for learned ones',
        )
        errors.require(
            len(self.rotary_scaling) in (0, 4) and all(x > 0 for x in self.rotary_scaling),
            'rotary_scaling must be empty or (factor, low_freq_factor, high_freq_factor, '
            f'original n_ctx), all above 0, got {self.rotary_scaling}',
        )
        errors.require(bool(self.attention), 'attention is a pattern of one form or more')
        errors.require(
            ('banded' in self.attention) == (self.band_width > 0),
            f'band_width = {self.band_width} does not fit attention = {self.attention}; it is '
            "above 0 exactly when a layer is 'banded' without a width of its own",
        )
        _ = self.layer_masks  # says what is wrong with a form

    @property
    def kv_heads(self) -> int:
        """Heads that have keys and values of their own."""
        return self.n_kv_heads or self.n_heads

    @property
    def layer_masks(self) -> list[masks.Mask]:
        """The forms of attention of the layers of the pattern."""
        return [masks.named(written, self.band_width) for written in self.attention]


class KeyValue(NamedTuple):
    """What one layer keeps of the past in G heads: position m of a row is in slot m of M.

    Slots behind a row's last position are stale, and never seen, for no form that keeps a cache
    sees ahead: a row goes back by being given smaller positions again. In int8, a key or value is
    its integers times its scale.
    """

    key_BxGxKxM: Shaped[Array, 'B G K M']  # turned, as products with queries read it
    value_BxGxMxK: Shaped[Array, 'B G M K']
    key_scale_BxGxM: Float[Array, 'B G M'] | None
    value_scale_BxGxM: Float[Array, 'B G M'] | None


class Tree(NamedTuple):
    """Where tokens go if each row of a cache holds several texts that begin alike: beams."""

    slot_BxL: Int[Array, 'B L']
    positions_BxM: Int[Array, 'B M']  # of what the slots hold; -1 = nothing
    seen_BxLxM: Bool[Array, 'B L M']  # which slots hold a token's own text, itself included


def visible(
    query_BxL: Int[Array, '#B L'], key_BxM: Int[Array, '#B M'], mask: masks.Mask
) -> Bool[Array, '#B L M']:
    """Which keys each query may see, from positions alone.

    Args:
      query_BxL: positions of the queries.
      key_BxM: positions of the keys; a negative one marks padding or an empty slot.
    """
    query_BxLx1, key_Bx1xM = query_BxL[:, :, None], key_BxM[:, None, :]
    return mask.seen(query_BxLx1, key_Bx1xM) & (key_Bx1xM >= 0)


def rotate(
    x_BxLxHxK: Float[Array, 'B L H K'],
    positions_BxL: Int[Array, '#B L'],
    dims: int,
    base: float,
    scaling: tuple[float, ...],
) -> Float[Array, 'B L H K']:
    """Rotary position embedding (RoFormer, section 3.4.2) of the first `dims` of each head.

    Dimension i is paired with i + dims / 2. Weights published for neighbouring pairs (GPT-J, GGUF)
    are reordered where they are read.

    Args:
      scaling: () or (factor, low_freq_factor, high_freq_factor, original n_ctx): Llama 3.1 divides
        the frequencies of wave lengths beyond n_ctx / low_freq_factor by `factor`, keeps those
        below n_ctx / high_freq_factor, and interpolates in between.
    """
    if not dims:
        return x_BxLxHxK
    frequency = base ** (-np.arange(0, dims, 2, dtype=np.float64) / dims)
    if scaling:
        factor, low, high, n_ctx = scaling
        turns = n_ctx * frequency / (2 * np.pi)
        kept = np.clip((turns - low) / (high - low), 0, 1)
        frequency *= kept + (1 - kept) / factor
    frequency_1x1x1xK = jnp.asarray(frequency, jnp.float32)[None, None, None]
    angle_BxLx1xK = positions_BxL[:, :, None, None] * frequency_1x1x1xK
    cos, sin = jnp.cos(angle_BxLx1xK), jnp.sin(angle_BxLx1xK)
    x1, x2, rest = jnp.split(x_BxLxHxK, (dims // 2, dims), axis=-1)
    a, b = x1.astype(jnp.float32), x2.astype(jnp.float32)
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return jnp.concatenate([turned.astype(x_BxLxHxK.dtype), rest], axis=-1)


def attend(
    query_BxLxHxK: Float[Array, 'B L H K'],
    key_BxGxKxM: Float[Array, 'B G K M'],
    value_BxGxMxK: Float[Array, 'B G M K'],
    mask_BxLxM: Bool[Array, '#B L M'],
    dropout: Callable[[jax.Array], jax.Array],
) -> Float[Array, 'B L H K']:
    """Scaled dot-product attention (Attention Is All You Need, section 3.2.1); softmax in float32.

    The plain form, for whatever no kernel does: caches, padding, dropout of attention weights.

    H / G neighbouring query heads share a key-value head (Ainslie et al. 2023). A query that may
    see no key at all (padding) gets an average of values: finite, never read.
    """
    shape, n_kv_heads = query_BxLxHxK.shape, key_BxGxKxM.shape[1]
    query_BxLxGxSxK = query_BxLxHxK.reshape(*shape[:2], n_kv_heads, -1, shape[3])
    att_BxGxLxSxM = jnp.einsum(
        'BGLSK,BGKM->BGLSM',
        (query_BxLxGxSxK * shape[3] ** -0.5).swapaxes(1, 2),
        key_BxGxKxM,
        preferred_element_type=jnp.float32,
    )
    lowest = jnp.finfo(jnp.float32).min
    att_BxGxLxSxM = jnp.where(mask_BxLxM[:, None, :, None], att_BxGxLxSxM, lowest)
    att_BxGxLxSxM = jax.nn.softmax(att_BxGxLxSxM, axis=-1).astype(value_BxGxMxK.dtype)
    att_BxGxLxSxM = dropout(att_BxGxLxSxM)
    y_BxGxLxSxK = jnp.einsum('BGLSM,BGMK->BGLSK', att_BxGxLxSxM, value_BxGxMxK)
    return y_BxGxLxSxK.swapaxes(1, 2).reshape(shape)


def empty(shape: tuple[int, int, int, int], dtype: str) -> KeyValue:
    """A cache of values of a (B, G, M, K) shape, in int8 or a floating dtype."""
    turned = (*shape[:2], shape[3], shape[2])
    scales = [jnp.zeros(shape[:3]) if dtype == 'int8' else None for _ in range(2)]
    return KeyValue(jnp.zeros(turned, dtype), jnp.zeros(shape, dtype), *scales)


def update(
    cache: KeyValue,
    key_BxLxGxK: Float[Array, 'B L G K'],
    value_BxLxGxK: Float[Array, 'B L G K'],
    slot_BxL: Int[Array, 'B L'],
) -> KeyValue:
    """The cache with keys and values written to slots; those of padding (-1) are not."""
    slots = cache.key_BxGxKxM.shape[3]
    slot_BxL = jnp.where(slot_BxL < 0, slots, slot_BxL)  # beyond the end: dropped

    def write(
        kept: jax.Array, scale_BxGxM: jax.Array | None, x_BxLxGxK: jax.Array, axis: int
    ) -> tuple[jax.Array, jax.Array | None]:
        if scale_BxGxM is not None:
            new_BxLxG = jnp.abs(x_BxLxGxK).max(axis=-1).astype(jnp.float32) / 127
            x_BxLxGxK = jnp.round(x_BxLxGxK / jnp.maximum(new_BxLxG, 1e-30)[..., None])
            scale_BxGxM = _put(scale_BxGxM, new_BxLxG, slot_BxL, 2)
        return _put(kept, x_BxLxGxK, slot_BxL, axis), scale_BxGxM

    key, key_scale = write(cache.key_BxGxKxM, cache.key_scale_BxGxM, key_BxLxGxK, 3)
    value, value_scale = write(cache.value_BxGxMxK, cache.value_scale_BxGxM, value_BxLxGxK, 2)
    return KeyValue(key, value, key_scale, value_scale)


def _put(kept: jax.Array, new: jax.Array, slot_BxL: jax.Array, axis: int) -> jax.Array:
    """`kept` (B, G, ...) with `new` (B, L, G, ...) in the slots, which are along an axis."""
    rows_Bx1 = jnp.arange(kept.shape[0])[:, None]
    place = (rows_Bx1, *(slice(None),) * (axis - 1), slot_BxL)
    kept = kept.at[place].set(new.astype(kept.dtype), mode='drop')
    return axes.constrain(kept, 'batch', 'act_heads', *('act_head_dim',) * (kept.ndim - 2))


def _read(cache: KeyValue, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Keys and values as they were written, rounded where they are quantised."""
    key_BxGxKxM, value_BxGxMxK, key_scale_BxGxM, value_scale_BxGxM = cache
    if key_scale_BxGxM is not None:
        key_BxGxKxM = key_BxGxKxM * key_scale_BxGxM[:, :, None]
        value_BxGxMxK = value_BxGxMxK * value_scale_BxGxM[..., None]
    return key_BxGxKxM.astype(dtype), value_BxGxMxK.astype(dtype)


class Attention(nn.Module):
    """Multi-head self-attention: (B, L, D) -> (B, L, D).

    `config` is gpt.Config. Positions of None are 0 .. L-1: whole windows, which a kernel for the
    platform attends to.
    """

    config: Any
    mask: masks.Mask

    @nn.compact
    def __call__(
        self,
        x_BxLxD: Float[Array, 'B L D'],
        positions_BxL: Int[Array, '#B L'] | None,
        cache: KeyValue | None = None,
        tree: Tree | None = None,
    ) -> tuple[Float[Array, 'B L D'], KeyValue | None]:
        cfg = self.config
        query_positions_BxL = positions_BxL
        if positions_BxL is None:
            query_positions_BxL = jnp.arange(x_BxLxD.shape[1])[None]
        linear = functools.partial(
            layers.Linear,
            use_bias=cfg.attention_bias,
            param_dtype=cfg.param_dtype,
            compute_dtype=cfg.compute_dtype,
        )

        def heads(name: str, number: int) -> jax.Array:
            y_BxLxHxK = linear(
                'BLD,DHK->BLHK',
                (cfg.d_model, number, cfg.d_head),
                ('embed', 'heads', 'head_dim'),
                cfg.hidden_std(cfg.init_std),
                name=name,
            )(x_BxLxD)
            return axes.constrain(y_BxLxHxK, 'batch', 'length', 'act_heads', 'act_head_dim')

        rotary = (query_positions_BxL, cfg.rotary_dims, cfg.rotary_base, cfg.rotary_scaling)
        query_BxLxHxK = rotate(heads('query', cfg.n_heads), *rotary)
        key_BxLxGxK = rotate(heads('key', cfg.kv_heads), *rotary)
        value_BxLxGxK = heads('value', cfg.kv_heads)
        y_BxLxHxK = None
        dropping = cfg.attention_dropout > 0 and self.has_rng('dropout')
        if positions_BxL is None and not dropping:
            y_BxLxHxK = flash.attend(query_BxLxHxK, key_BxLxGxK, value_BxLxGxK, self.mask)
        if y_BxLxHxK is None:
            key_positions_BxM = query_positions_BxL
            if cache is None:
                key_BxGxKxM = key_BxLxGxK.transpose(0, 2, 3, 1)
                value_BxGxMxK = value_BxLxGxK.swapaxes(1, 2)
            else:
                slot_BxL = query_positions_BxL if tree is None else tree.slot_BxL
                cache = update(cache, key_BxLxGxK, value_BxLxGxK, slot_BxL)
                key_BxGxKxM, value_BxGxMxK = _read(cache, x_BxLxD.dtype)
                key_positions_BxM = jnp.arange(key_BxGxKxM.shape[3])[None]
            if tree is not None:
                key_positions_BxM = tree.positions_BxM
            seen_BxLxM = visible(query_positions_BxL, key_positions_BxM, self.mask)
            if tree is not None:
                seen_BxLxM &= tree.seen_BxLxM
            dropout = layers.Dropout(cfg.attention_dropout)
            y_BxLxHxK = attend(query_BxLxHxK, key_BxGxKxM, value_BxGxMxK, seen_BxLxM, dropout)
        y_BxLxD = linear(
            'BLHK,HKD->BLD',
            (cfg.n_heads, cfg.d_head, cfg.d_model),
            ('heads', 'head_dim', 'embed'),
            cfg.hidden_std(cfg.residual_init_std),
            name='out',
        )(y_BxLxHxK)
        return axes.constrain(y_BxLxD, 'batch', 'length', 'act_embed'), cache
