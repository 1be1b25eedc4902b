# SPDX-License-Identifier: Apache-2.0
"""Causal self-attention of whole windows, by the kernel that suits the platform and the mesh."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gptjax.models import axes
from gptjax.models.kernels import ring, tiled

_LANES = 128  # of a TPU; splash attention works on blocks of multiples of it
_MAX_BLOCK = 1024

Kernel = Callable[..., jax.Array]  # (query, key, value) -> out, of one device
_NAMES = ('batch', 'length', 'act_heads', 'act_head_dim')


def causal(
    query_BxLxHxK: Float[Array, 'B L H K'],
    key_BxLxGxK: Float[Array, 'B L G K'],
    value_BxLxGxK: Float[Array, 'B L G K'],
    band_width: int,
) -> Float[Array, 'B L H K'] | None:
    """Attention of positions 0 .. L-1 to those before them, at most `band_width` with their own.

    - a length split over several devices: ring attention, on every platform;
    - TPU: Pallas splash attention, which computes no block that the mask leaves empty;
    - GPU: cuDNN's fused attention. Untested: nobody has run it yet;
    - CPU: tiles, see tiled.py.

    Queries are scaled here. H / G neighbouring query heads share a key-value head.

    Returns:
      None where no kernel fits (the shape, the dtype); the plain form always does.
    """
    length, d_head = query_BxLxHxK.shape[1], query_BxLxHxK.shape[3]
    if not all(axes.fits(x.shape, *_NAMES) for x in (query_BxLxHxK, key_BxLxGxK)):
        return None  # one window of an initialisation, say
    query_BxLxHxK = query_BxLxHxK * d_head**-0.5
    platform = axes.platform()
    context = axes.mesh_size('length')
    if context > 1:

        def kernel(query, key, value):
            return ring.attend(query, key, value, band_width, axes.mesh_axis('length'), context)

    elif platform == 'tpu' and length % _LANES == 0:
        kernel = functools.partial(splash, band_width=band_width)
    elif platform in ('cuda', 'gpu') and _cudnn_takes(query_BxLxHxK):
        kernel = functools.partial(_cudnn, band_width=band_width)
    elif platform == 'cpu':
        return tiled.attend(
            query_BxLxHxK, key_BxLxGxK, value_BxLxGxK, band_width, axes.n_devices() == 1
        )
    else:
        return None
    if axes.n_devices() == 1:
        return kernel(query_BxLxHxK, key_BxLxGxK, value_BxLxGxK)
    spec = axes.spec(*_NAMES)  # neither Pallas nor a ring can be split by the compiler
    return jax.shard_map(kernel, in_specs=(spec, spec, spec), out_specs=spec, check_vma=False)(
        query_BxLxHxK, key_BxLxGxK, value_BxLxGxK
    )


def splash(
    query_BxLxHxK: jax.Array,
    key_BxLxGxK: jax.Array,
    value_BxLxGxK: jax.Array,
    band_width: int,
    interpret: bool = False,
) -> jax.Array:
    """JAX's own flash attention for TPUs with sparse masks; its length is a multiple of 128."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, heads = query_BxLxHxK.shape[1:3]
    mask = masks.CausalMask((length, length))
    if band_width:
        mask = masks.LocalMask((length, length), window_size=(band_width - 1, 0), offset=0)
    block = _block(length, band_width)
    attend = kernel.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=kernel.BlockSizes(
            block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block,
            block_kv_dkv=block, block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )  # fmt: skip
    heads_first = (x.swapaxes(1, 2) for x in (query_BxLxHxK, key_BxLxGxK, value_BxLxGxK))
    return jax.vmap(attend)(*heads_first).swapaxes(1, 2)


def _block(length: int, band_width: int) -> int:
    """The largest block that divides the length; a band wants blocks no wider than itself."""
    limit = min(_MAX_BLOCK, max(_LANES, band_width)) if band_width else _MAX_BLOCK
    sizes = np.arange(_LANES, min(limit, length) + 1, _LANES)
    return int(sizes[length % sizes == 0][-1])


def _cudnn_takes(query_BxLxHxK: jax.Array) -> bool:
    d_head = query_BxLxHxK.shape[3]
    half = query_BxLxHxK.dtype in (jnp.bfloat16, jnp.float16)
    return half and d_head % 8 == 0 and d_head <= 128


def _cudnn(query_BxLxHxK, key_BxLxGxK, value_BxLxGxK, band_width):
    return jax.nn.dot_product_attention(
        query_BxLxHxK, key_BxLxGxK, value_BxLxGxK, scale=1.0, is_causal=True,
        local_window_size=(band_width - 1, 0) if band_width else None, implementation='cudnn',
    )  # fmt: skip
