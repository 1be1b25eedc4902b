# SPDX-License-Identifier: Apache-2.0
"""Causal attention, dense or locally banded, with an explicit key-value cache."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from gptjax.models import axes, layers


class KeyValue(NamedTuple):
    """What one layer keeps of the past: M slots of keys and values."""

    key_BxMxHxK: Float[Array, 'B M H K']
    value_BxMxHxK: Float[Array, 'B M H K']


def mask(
    query_BxL: Int[Array, '#B L'], key_BxM: Int[Array, '#B M'], band_width: int
) -> Bool[Array, '#B L M']:
    """Which keys each query may see, from positions alone.

    Args:
      query_BxL: positions of the queries.
      key_BxM: positions of the keys; a negative one marks padding or an empty slot.
      band_width: how many positions a query sees, its own included; 0 = all before it.
    """
    distance_BxLxM = query_BxL[:, :, None] - key_BxM[:, None, :]
    seen_BxLxM = (distance_BxLxM >= 0) & (key_BxM[:, None, :] >= 0)
    if band_width:
        seen_BxLxM &= distance_BxLxM < band_width
    return seen_BxLxM


def attend(
    query_BxLxHxK: Float[Array, 'B L H K'],
    key_BxMxHxK: Float[Array, 'B M H K'],
    value_BxMxHxK: Float[Array, 'B M H K'],
    mask_BxLxM: Bool[Array, '#B L M'],
    dropout: nn.Module,
    deterministic: bool,
) -> Float[Array, 'B L H K']:
    """Scaled dot-product attention (Attention Is All You Need, section 3.2.1); softmax in float32.

    A query that may see no key at all (padding) gets an average of values: finite, never read.
    """
    scale = query_BxLxHxK.shape[-1] ** -0.5
    att_BxHxLxM = jnp.einsum(
        'BLHK,BMHK->BHLM', query_BxLxHxK * scale, key_BxMxHxK, preferred_element_type=jnp.float32
    )
    att_BxHxLxM = jnp.where(mask_BxLxM[:, None], att_BxHxLxM, jnp.finfo(jnp.float32).min)
    att_BxHxLxM = jax.nn.softmax(att_BxHxLxM, axis=-1).astype(value_BxMxHxK.dtype)
    att_BxHxLxM = dropout(att_BxHxLxM, deterministic=deterministic)
    return jnp.einsum('BHLM,BMHK->BLHK', att_BxHxLxM, value_BxMxHxK)


def update(
    cache: KeyValue,
    key_BxLxHxK: Float[Array, 'B L H K'],
    value_BxLxHxK: Float[Array, 'B L H K'],
    slot: Int[Array, ''],
) -> KeyValue:
    """The cache with L new keys and values written from `slot` on."""
    start = (0, slot, 0, 0)
    return KeyValue(
        jax.lax.dynamic_update_slice(
            cache.key_BxMxHxK, key_BxLxHxK.astype(cache.key_BxMxHxK.dtype), start
        ),
        jax.lax.dynamic_update_slice(
            cache.value_BxMxHxK, value_BxLxHxK.astype(cache.value_BxMxHxK.dtype), start
        ),
    )


class Attention(nn.Module):
    """Multi-head causal self-attention: (B, L, D) -> (B, L, D).

    `config` is gpt.Config; a `band_width` of 0 is dense attention.
    """

    config: Any
    band_width: int

    @nn.compact
    def __call__(
        self,
        x_BxLxD: Float[Array, 'B L D'],
        query_positions_BxL: Int[Array, '#B L'],
        key_positions_BxM: Int[Array, '#B M'],
        cache: KeyValue | None = None,
        slot: Int[Array, ''] | None = None,
    ) -> tuple[Float[Array, 'B L D'], KeyValue | None]:
        cfg = self.config
        linear = functools.partial(
            layers.Linear,
            use_bias=cfg.use_bias,
            param_dtype=cfg.param_dtype,
            compute_dtype=cfg.compute_dtype,
        )

        def heads(name: str) -> jax.Array:
            y_BxLxHxK = linear(
                'BLD,DHK->BLHK',
                (cfg.d_model, cfg.n_heads, cfg.d_head),
                ('embed', 'heads', 'head_dim'),
                cfg.init_std,
                name=name,
            )(x_BxLxD)
            return axes.constrain(y_BxLxHxK, 'batch', 'length', 'act_heads', 'act_head_dim')

        query_BxLxHxK, key_BxLxHxK, value_BxLxHxK = map(heads, ('query', 'key', 'value'))
        if cache is None:
            key_BxMxHxK, value_BxMxHxK = key_BxLxHxK, value_BxLxHxK
        else:
            cache = update(cache, key_BxLxHxK, value_BxLxHxK, slot)
            key_BxMxHxK, value_BxMxHxK = (kv.astype(x_BxLxD.dtype) for kv in cache)
        y_BxLxHxK = attend(
            query_BxLxHxK,
            key_BxMxHxK,
            value_BxMxHxK,
            mask(query_positions_BxL, key_positions_BxM, self.band_width),
            nn.Dropout(cfg.attention_dropout),
            not self.has_rng('dropout'),
        )
        y_BxLxD = linear(
            'BLHK,HKD->BLD',
            (cfg.n_heads, cfg.d_head, cfg.d_model),
            ('heads', 'head_dim', 'embed'),
            cfg.residual_init_std,
            name='out',
        )(y_BxLxHxK)
        return axes.constrain(y_BxLxD, 'batch', 'length', 'act_embed'), cache
