# SPDX-License-Identifier: Apache-2.0
"""The decoder of GPT-1, GPT-2, GPT-3, GPT-J and Llama: one block, its choices in the Config.

Names carry their axes: B batch, L query positions, M key positions, D d_model, H heads, G key-value
heads, K d_head, F d_ff, V vocabulary, N layers, R repeats of the layer pattern.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, ArrayLike, Float, Int

from gptjax.configs import errors
from gptjax.models import attention, axes, layers, stack
from gptjax.models.kernels import embed, xent
from gptjax.scaling import flops


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape and numerics of a GPT; the fields are explained in configs/sizes.py."""

    family: Literal['gpt']
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_ff: int
    n_ctx: int
    n_vocab: int
    norm: Literal['pre', 'post']
    norm_kind: Literal['layer', 'rms']
    norm_eps: float
    parallel_residual: bool
    attention: tuple[str, ...]
    band_width: int
    positions: Literal['learned', 'rotary']
    rotary_dims: int
    rotary_base: float
    rotary_scaling: tuple[float, ...]
    activation: Literal['gelu_tanh', 'gelu', 'relu', 'silu']
    gated_mlp: bool
    attention_bias: bool
    mlp_bias: bool
    norm_bias: bool
    head_bias: bool
    tied_embedding: bool
    mup_base_width: int
    init_std: float
    position_init_std: float
    residual_init_std: float
    embed_dropout: float
    attention_dropout: float
    residual_dropout: float
    param_dtype: Literal['float32', 'bfloat16', 'float16']
    compute_dtype: Literal['float32', 'bfloat16', 'float16']
    scan_layers: bool
    remat: stack.Remat

    def __post_init__(self) -> None:
        errors.require_positive(
            self, 'n_layers', 'd_model', 'n_heads', 'd_head', 'd_ff', 'n_ctx', 'n_vocab',
            'norm_eps', 'rotary_base',
        )  # fmt: skip
        errors.require_choice(self, 'family', ('gpt',))
        errors.require_choice(self, 'norm', ('pre', 'post'))
        errors.require_choice(self, 'norm_kind', ('layer', 'rms'))
        errors.require_choice(self, 'positions', ('learned', 'rotary'))
        errors.require_choice(self, 'activation', tuple(_ACTIVATIONS))
        errors.require_choice(self, 'remat', stack.REMAT)
        for field in ('param_dtype', 'compute_dtype'):
            errors.require_choice(self, field, ('float32', 'bfloat16', 'float16'))
        errors.require_between(
            self, 0.0, 0.99, 'embed_dropout', 'attention_dropout', 'residual_dropout'
        )
        errors.require_between(
            self, 0.0, 10.0, 'init_std', 'position_init_std', 'residual_init_std'
        )
        errors.require(
            self.n_kv_heads >= 0 and self.n_heads % self.kv_heads == 0,
            f'n_heads = {self.n_heads} is not a multiple of n_kv_heads = {self.n_kv_heads}',
        )
        errors.require(
            not (self.parallel_residual and self.norm == 'post'),
            "parallel_residual = True has one norm before both branches; set norm = 'pre'",
        )
        rotary = self.positions == 'rotary'
        errors.require(
            self.rotary_dims % 2 == 0 and rotary * 2 <= self.rotary_dims <= rotary * self.d_head,
            f'rotary_dims = {self.rotary_dims} does not fit positions = {self.positions!r}: even, '
            f'from 2 to d_head = {self.d_head} for rotary positions, 0 for learned ones',
        )
        errors.require(
            len(self.rotary_scaling) in (0, 4),
            'rotary_scaling must be empty or (factor, low_freq_factor, high_freq_factor, '
            f'original n_ctx), got {self.rotary_scaling}',
        )
        kinds = {str(kind) for kind in self.attention}
        errors.require(
            bool(kinds) and kinds <= {'dense', 'banded'},
            f"attention must be a pattern of 'dense' and 'banded', got {self.attention}",
        )
        errors.require(
            self.n_layers % len(self.attention) == 0,
            f'n_layers = {self.n_layers} is not a multiple of the attention pattern '
            f'{self.attention}; use a multiple of {len(self.attention)}',
        )
        errors.require(
            ('banded' in kinds) == (self.band_width > 0),
            f'band_width = {self.band_width} does not fit attention = {self.attention}; '
            'it is above 0 exactly when a layer is banded',
        )

    @property
    def kv_heads(self) -> int:
        """Heads that have keys and values of their own."""
        return self.n_kv_heads or self.n_heads

    @property
    def width_ratio(self) -> float:
        """How much wider than muP's base model; 1 in the standard parameterisation."""
        return self.d_model / self.mup_base_width if self.mup_base_width else 1.0

    def hidden_std(self, std: float) -> float:
        """The initial standard deviation of hidden weights that have `std` at the base width."""
        return std * self.width_ratio**-0.5

    def rate_scale(self, name: str) -> float:
        """muP (Yang et al. 2022, Table 8): Adam's rate of hidden weights falls with the width."""
        return 1 / self.width_ratio if name.endswith('kernel') else 1.0

    def network(self) -> 'GPT':
        return GPT(self)

    def empty_cache(self, batch: int, slots: int, dtype: str = '') -> 'Cache':
        """A cache for `batch` rows of up to `slots` tokens; in int8, or '' = compute_dtype."""
        shape = (batch, self.kv_heads, slots, self.d_head)
        return tuple(
            attention.empty(shape, dtype or self.compute_dtype) for _ in range(self.n_layers)
        )

    @property
    def most_tokens(self) -> int:
        """How many tokens can be read in one go."""
        return self.n_ctx

    def flops_per_token(self, n_params: int) -> float:
        """FLOPs of training on a token; what is only looked up does not multiply."""
        looked_up = self.n_ctx if self.positions == 'learned' else 0
        looked_up += 0 if self.tied_embedding else self.n_vocab
        bands = [self.band_width if kind == 'banded' else 0 for kind in self.attention]
        seen = sum(flops.mean_seen(self.n_ctx, band) for band in bands)
        return flops.per_token(
            n_params - looked_up * self.d_model,
            self.n_heads * self.d_head,
            seen * self.n_layers / len(bands),
        )


Cache = tuple[attention.KeyValue, ...]  # one a layer


class Block(nn.Module):
    """One layer: attention and a feed-forward net, normed before (GPT-2) or after (GPT-1).

    Both branches read the same normed input where the residual is parallel (GPT-J).
    """

    config: Config
    band_width: int

    @nn.compact
    def __call__(
        self,
        x_BxLxD: Float[Array, 'B L D'],
        positions_BxL: Int[Array, '#B L'] | None,
        cache: attention.KeyValue | None = None,
        tree: attention.Tree | None = None,
    ) -> tuple[Float[Array, 'B L D'], attention.KeyValue | None]:
        cfg = self.config
        norm = functools.partial(
            layers.Norm, cfg.norm_kind, cfg.norm_eps, cfg.norm_bias, cfg.param_dtype
        )
        norm_attention = norm(name='norm_attention')
        attend = attention.Attention(cfg, self.band_width, name='attention')
        dropout = nn.Dropout(cfg.residual_dropout, deterministic=not self.has_rng('dropout'))
        pre = cfg.norm == 'pre'

        y_BxLxD = norm_attention(x_BxLxD) if pre else x_BxLxD
        att_BxLxD, cache = attend(y_BxLxD, positions_BxL, cache, tree)
        x_BxLxD += dropout(att_BxLxD)
        if cfg.parallel_residual:
            return x_BxLxD + dropout(self._mlp(y_BxLxD)), cache
        norm_mlp = norm(name='norm_mlp')
        x_BxLxD = x_BxLxD if pre else norm_attention(x_BxLxD)
        y_BxLxD = norm_mlp(x_BxLxD) if pre else x_BxLxD
        x_BxLxD += dropout(self._mlp(y_BxLxD))
        return x_BxLxD if pre else norm_mlp(x_BxLxD), cache

    def _mlp(self, x_BxLxD: jax.Array) -> jax.Array:
        cfg = self.config
        numerics = (cfg.mlp_bias, cfg.param_dtype, cfg.compute_dtype)

        def widen(name: str) -> jax.Array:
            y_BxLxF = layers.Linear(
                'BLD,DF->BLF', (cfg.d_model, cfg.d_ff), ('embed', 'mlp'),
                cfg.hidden_std(cfg.init_std), *numerics, name=name,
            )(x_BxLxD)  # fmt: skip
            return axes.constrain(y_BxLxF, 'batch', 'length', 'act_mlp')

        act = layers.in_float32(_ACTIVATIONS[cfg.activation])
        y_BxLxF = act(widen('gate')) * widen('up') if cfg.gated_mlp else act(widen('up'))
        y_BxLxD = layers.Linear(
            'BLF,FD->BLD', (cfg.d_ff, cfg.d_model), ('mlp', 'embed'),
            cfg.hidden_std(cfg.residual_init_std), *numerics, name='down',
        )(y_BxLxF)  # fmt: skip
        return axes.constrain(y_BxLxD, 'batch', 'length', 'act_embed')


class GPT(nn.Module):
    """Tokens -> hidden states, and hidden states -> logits.

    Parameters of the layers are stacked: 'block_j' holds, for place j of the attention pattern,
    the layers j, j + P, j + 2P, ... of a pattern P long. Scanned and unrolled forms share them.
    """

    config: Config

    def setup(self) -> None:
        cfg = self.config
        dtype = jnp.dtype(cfg.param_dtype)
        self.token_embedding = layers.weight(
            self,
            'token_embedding',
            axes.boxed(nn.initializers.normal(cfg.init_std), 'vocab', 'embed'),
            (cfg.n_vocab, cfg.d_model),
            dtype,
        )
        if cfg.positions == 'learned':
            self.position_embedding = self.param(
                'position_embedding',
                axes.boxed(nn.initializers.normal(cfg.position_init_std), 'ctx', 'embed'),
                (cfg.n_ctx, cfg.d_model),
                dtype,
            )
        if not cfg.tied_embedding:
            self.unembedding = layers.weight(
                self,
                'unembedding',
                axes.boxed(nn.initializers.normal(cfg.init_std), 'vocab', 'embed'),
                (cfg.n_vocab, cfg.d_model),
                dtype,
            )
        if cfg.head_bias:
            self.unembedding_bias = self.param(
                'unembedding_bias',
                axes.boxed(nn.initializers.zeros, 'vocab'),
                (cfg.n_vocab,),
                dtype,
            )
        self.pattern = [
            Block(cfg, cfg.band_width if kind == 'banded' else 0, parent=None)
            for kind in cfg.attention
        ]
        self.blocks = [
            layers.weight(self, f'block_{j}', self._init_stack, block)
            for j, block in enumerate(self.pattern)
        ]
        if cfg.norm == 'pre':
            self.final_norm = layers.Norm(
                cfg.norm_kind, cfg.norm_eps, cfg.norm_bias, cfg.param_dtype
            )
        self.embed_dropout = nn.Dropout(cfg.embed_dropout)

    def __call__(
        self,
        tokens_BxL: Int[ArrayLike, 'B L'],
        positions_BxL: Int[ArrayLike, '#B L'] | None = None,
        cache: Cache | None = None,
        tree: attention.Tree | None = None,
    ) -> tuple[Float[Array, 'B L D'], Cache | None]:
        """Hidden states after the last layer.

        Dropout is on exactly when a 'dropout' rng is given.

        Args:
          tokens_BxL: token ids.
          positions_BxL: their positions; -1 marks padding, which nothing sees. None = 0 .. L-1.
          cache: the past; it has a slot for every position.
          tree: where tokens go in it, if not to the slots of their positions.

        Returns:
          hidden states, and the cache with the L new positions (None for None).
        """
        cfg = self.config
        dtype = jnp.dtype(cfg.compute_dtype)
        length = tokens_BxL.shape[1]
        if length > cfg.n_ctx and tree is None:
            raise errors.InputError(f'{length} tokens do not fit n_ctx = {cfg.n_ctx}')
        x_BxLxD = embed.lookup(self.token_embedding, jnp.asarray(tokens_BxL), cfg.compute_dtype)
        if cfg.positions == 'learned' and positions_BxL is None:
            x_BxLxD += self.position_embedding[:length].astype(dtype)[None]
        elif cfg.positions == 'learned':
            x_BxLxD += self.position_embedding.astype(dtype)[jnp.maximum(positions_BxL, 0)]
        x_BxLxD = axes.constrain(x_BxLxD, 'batch', 'length', 'act_embed')
        x_BxLxD = self.embed_dropout(x_BxLxD, deterministic=not self.has_rng('dropout'))
        if cache is None:
            x_BxLxD = self._run(x_BxLxD, positions_BxL, tree)
        else:
            if positions_BxL is None:
                positions_BxL = jnp.arange(length)[None]
            x_BxLxD, cache = self._run_cached(x_BxLxD, positions_BxL, cache, tree)
        if cfg.norm == 'pre':
            x_BxLxD = self.final_norm(x_BxLxD)
        return x_BxLxD, cache

    def unembed(self, hidden_BxLxD: Float[Array, 'B L D']) -> Float[Array, 'B L V']:
        """float32 logits, through the token embedding where it is tied."""
        table_VxD, bias_V = self._output()
        hidden_BxLxD /= self.config.width_ratio
        logits_BxLxV = layers.logits(hidden_BxLxD, table_VxD)
        if bias_V is not None:
            logits_BxLxV += bias_V.astype(jnp.float32)[None, None]
        return logits_BxLxV

    def nats(self, hidden_BxLxD, targets_BxL, weights_BxL) -> Float[Array, '']:
        """The weighted sum of -log p(target), without ever holding all logits."""
        hidden_BxLxD /= self.config.width_ratio
        return xent.nats(hidden_BxLxD, *self._output(), targets_BxL, weights_BxL)

    def _output(self) -> tuple[Any, jax.Array | None]:
        table_VxD = self.token_embedding if self.config.tied_embedding else self.unembedding
        return table_VxD, self.unembedding_bias if self.config.head_bias else None

    def _init_stack(self, rng: jax.Array, block: Block) -> dict:
        repeats = self.config.n_layers // len(self.config.attention)
        x_BxLxD = jnp.zeros((1, 1, self.config.d_model), jnp.dtype(self.config.compute_dtype))
        position_BxL = jnp.zeros((1, 1), jnp.int32)

        def init(rng: jax.Array) -> dict:
            with jax.sharding.use_abstract_mesh(_NO_MESH):  # one position divides over nothing
                return block.init(rng, x_BxLxD, position_BxL)['params']

        return axes.stacked(jax.vmap(init)(jax.random.split(rng, repeats)))

    def _run(self, x_BxLxD, positions_BxL, tree):
        rng = self.make_rng('dropout') if self.has_rng('dropout') else None

        def layer(x_BxLxD, params, place, number):
            rngs = {} if rng is None else {'dropout': jax.random.fold_in(rng, number)}
            with jax.named_scope(f'block_{place}'):
                block = self.pattern[place]
                arguments = (x_BxLxD, positions_BxL, None, tree)
                return block.apply({'params': params}, *arguments, rngs=rngs)[0]

        return stack.run(layer, x_BxLxD, self.blocks, self.config.scan_layers, self.config.remat)

    def _run_cached(self, x_BxLxD, positions_BxL, cache, tree):
        positions_BxL = jnp.broadcast_to(positions_BxL, x_BxLxD.shape[:2])
        kept = []
        for repeat in stack.unstacked(self.blocks):
            for block, params in zip(self.pattern, repeat, strict=True):
                past = cache[len(kept)]
                x_BxLxD, layer = block.apply({'params': params}, x_BxLxD, positions_BxL, past, tree)
                kept.append(layer)
        return x_BxLxD, tuple(kept)


_ACTIVATIONS = {
    'gelu_tanh': functools.partial(jax.nn.gelu, approximate=True),  # all of OpenAI's released code
    'gelu': functools.partial(jax.nn.gelu, approximate=False),
    'relu': jax.nn.relu,
    'silu': jax.nn.silu,
}
_NO_MESH = jax.sharding.AbstractMesh((), ())
