# SPDX-License-Identifier: Apache-2.0
"""Self-attention of whole windows, by the kernel that suits the platform and the mesh."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gptjax.models import axes, masks
from gptjax.models.kernels import ring, tiled

_LANES = 128  # of a TPU; splash attention works on blocks of multiples of it
_MAX_BLOCK = 1024

Kernel = Callable[..., jax.Array]  # (query, key, value) -> out, of one device
_NAMES = ('batch', 'length', 'act_heads', 'act_head_dim')


def attend(
    query_BxLxHxK: Float[Array, 'B L H K'],
    key_BxLxGxK: Float[Array, 'B L G K'],
    value_BxLxGxK: Float[Array, 'B L G K'],
    mask: masks.Mask,
) -> Float[Array, 'B L H K'] | None:
    """Attention of positions 0 .. L-1 to those that the mask lets each see.

    - a length split over several devices: ring attention, on every platform;
    - TPU: Pallas splash attention, which computes no block that the mask leaves empty;
    - GPU: cuDNN's fused attention. Untested: nobody has run it yet;
    - CPU: tiles, see tiled.py.

    Queries are scaled here. H / G neighbouring query heads share a key-value head.

    Returns:
      None where no kernel fits (the shape, the dtype, the mask); the plain form always does.
    """
    length, d_head = query_BxLxHxK.shape[1], query_BxLxHxK.shape[3]
    if not all(axes.fits(x.shape, *_NAMES) for x in (query_BxLxHxK, key_BxLxGxK)):
        return None  # one window of an initialisation, say
    query_BxLxHxK = query_BxLxHxK * d_head**-0.5
    platform = axes.platform()
    context = axes.mesh_size('length')
    if context > 1 and not masks.sees_ahead(mask, length):

        def kernel(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            return ring.attend(query, key, value, mask, axes.mesh_axis('length'), context)

    elif context > 1:
        return None
    elif platform == 'tpu' and length % _LANES == 0:
        kernel = functools.partial(splash, mask=mask)
    elif platform in ('cuda', 'gpu') and _cudnn_takes(query_BxLxHxK, mask):
        kernel = functools.partial(_cudnn, mask=mask)
    elif platform == 'cpu':
        return tiled.attend(query_BxLxHxK, key_BxLxGxK, value_BxLxGxK, mask, axes.n_devices() == 1)
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
    mask: masks.Mask,
    interpret: bool = False,
) -> jax.Array:
    """JAX's own flash attention for TPUs with sparse masks; its length is a multiple of 128."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as mask_lib

    length, heads = query_BxLxHxK.shape[1:3]
    block = _block(length, mask.window)
    attend = kernel.make_splash_mha(
        mask_lib.MultiHeadMask([mask.splash(length)] * heads),
        block_sizes=kernel.BlockSizes(
            block_q=block,
            block_kv=block,
            block_kv_compute=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_kv_dkv_compute=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    heads_first = (x.swapaxes(1, 2) for x in (query_BxLxHxK, key_BxLxGxK, value_BxLxGxK))
    return jax.vmap(attend)(*heads_first).swapaxes(1, 2)


def _block(length: int, window: int) -> int:
    """The largest block that divides the length; a window wants blocks no wider than itself."""
    limit = min(_MAX_BLOCK, max(_LANES, window)) if window else _MAX_BLOCK
    sizes = np.arange(_LANES, min(limit, length) + 1, _LANES)
    return int(sizes[length % sizes == 0][-1])


def _cudnn_takes(query_BxLxHxK: jax.Array, mask: masks.Mask) -> bool:
    d_head = query_BxLxHxK.shape[3]
    half = query_BxLxHxK.dtype in (jnp.bfloat16, jnp.float16)
    return half and d_head % 8 == 0 and d_head <= 128 and mask.fills_window


def _cudnn(
    query_BxLxHxK: jax.Array, key_BxLxGxK: jax.Array, value_BxLxGxK: jax.Array, mask: masks.Mask
) -> jax.Array:
    return jax.nn.dot_product_attention(
        query_BxLxHxK,
        key_BxLxGxK,
        value_BxLxGxK,
        scale=1.0,
        is_causal=True,
        local_window_size=(mask.window - 1, 0) if mask.window else None,
        implementation='cudnn',
    )
