# SPDX-License-Identifier: Apache-2.0
"""Self-attention of whole windows, by the kernel that suits the platform and the mesh."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gptjax.models import axes, masks
from gptjax.models.kernels import online, ring, tiled

_LANES = 128  # of a TPU; splash attention works on blocks of multiples of it
_MAX_BLOCK = 1024

_HOPPER = 9.0  # compute capability from which on cuDNN takes heads of 256

PLAIN = 'plain'
Kernel = Callable[..., jax.Array]  # (query, key, value) -> out, of one device
_NAMES = ('batch', 'length', 'act_heads', 'act_head_dim')


def attend(
    query_BxLxHxK: Float[Array, 'B L H K'],
    key_BxLxGxK: Float[Array, 'B L G K'],
    value_BxLxGxK: Float[Array, 'B L G K'],
    mask: masks.Mask,
) -> Float[Array, 'B L H K'] | None:
    """Attention of positions 0 .. L-1 to those that the mask lets each see, by the kernel chosen().

    Queries are scaled here. H / G neighbouring query heads share a key-value head.

    Returns:
      None where no kernel fits (the shape, the dtype, the mask); the plain form always does.
    """
    arrays = (query_BxLxHxK, key_BxLxGxK, value_BxLxGxK)
    name = chosen(query_BxLxHxK.shape, key_BxLxGxK.shape, query_BxLxHxK.dtype, mask)
    if name == PLAIN:
        return None
    arrays = (query_BxLxHxK * query_BxLxHxK.shape[3] ** -0.5, *arrays[1:])
    if name in _ON_CPUS:
        return _ON_CPUS[name](*arrays, mask, axes.n_devices() == 1)
    how: dict[str, Any] = {'mask': mask}
    if name == 'ring':
        how |= {'axis': axes.mesh_axis('length'), 'size': axes.mesh_size('length')}
    kernel: Kernel = functools.partial(_KERNELS[name], **how)
    if axes.n_devices() == 1:
        return kernel(*arrays)
    spec = axes.spec(*_NAMES)  # neither Pallas nor a ring can be split by the compiler
    return axes.shard_map(kernel, (spec, spec, spec), spec)(*arrays)


def chosen(queries: tuple[int, ...], keys: tuple[int, ...], dtype: Any, mask: masks.Mask) -> str:
    """The kernel for these shapes (B, L, H, K) and (B, L, G, K), on the mesh in force.

    - 'ring': a length split over several devices, on every platform;
    - 'splash' on TPUs: Pallas, which computes no block that the mask leaves empty;
    - 'cudnn' on GPUs: its fused attention. Untested: nobody has run it yet;
    - 'tiled' on CPUs, and 'online' for long windows: memory grows with the length alone;
    - 'plain': none of them fits.
    """
    if not all(axes.fits(shape, *_NAMES) for shape in (queries, keys)):
        return PLAIN  # one window of an initialisation, say
    platform, length = axes.platform(), queries[1]
    if axes.mesh_size('length') > 1:
        return PLAIN if masks.sees_ahead(mask, length) else 'ring'
    if platform == 'tpu' and length % _LANES == 0:
        return 'splash'
    if platform in ('cuda', 'gpu') and _cudnn_takes(queries[3], dtype, mask):
        return 'cudnn'
    if platform == 'cpu':
        return 'online' if length >= online.FROM else 'tiled'
    return PLAIN


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


def _cudnn_takes(d_head: int, dtype: Any, mask: masks.Mask) -> bool:
    capability = float(jax.local_devices()[0].compute_capability)  # as '9.0' and '10.0'
    most = 256 if capability >= _HOPPER else 128
    half = dtype in (jnp.bfloat16, jnp.float16)
    return half and d_head % 8 == 0 and d_head <= most and mask.fills_window


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


_ON_CPUS = {'tiled': tiled.attend, 'online': online.attend}
_KERNELS = {'ring': ring.attend, 'splash': splash, 'cudnn': _cudnn}
