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
from flax import traverse_util
from jaxtyping import Array, ArrayLike, Float, Int

from gptjax.configs import errors
from gptjax.models import attention, axes, layers, masks, mlp, stack
from gptjax.models.kernels import embed, flash, xent
from gptjax.scaling import flops

_MOST_HELD = 2**30  # bytes of attention weights of a window that the plain form may hold


@dataclasses.dataclass(frozen=True)
class Config(attention.Config, mlp.Config):
    """Shape and numerics of a GPT; the fields are explained in configs/sections/models.py.

    What concerns attention or the feed-forward net alone stands with them.
    """

    family: Literal['gpt']
    n_layers: int
    n_ctx: int
    n_vocab: int
    norm: Literal['pre', 'post']
    norm_kind: str
    norm_eps: float
    parallel_residual: bool
    norm_bias: bool
    head_bias: bool
    tied_embedding: bool
    mup_base_width: int
    init_std: float
    position_init_std: float
    residual_init_std: float
    embed_dropout: float
    residual_dropout: float
    param_dtype: Literal['float32', 'bfloat16', 'float16']
    compute_dtype: Literal['float32', 'bfloat16', 'float16']
    scan_layers: bool
    remat: stack.Remat

    def __post_init__(self) -> None:
        errors.require_numbers(vars(self), 2**31 - 1)
        errors.require_positive(self, 'n_layers', 'n_ctx', 'n_vocab', 'norm_eps')
        errors.require_between(self, 1e-30, 1e30, 'norm_eps')  # normal numbers of float32
        attention.Config.__post_init__(self)
        mlp.Config.__post_init__(self)
        errors.require_choice(self, 'family', ('gpt',))
        errors.require_choice(self, 'norm', ('pre', 'post'))
        errors.require_choice(self, 'norm_kind', tuple(layers.NORMS))
        errors.require_choice(self, 'remat', stack.REMAT)
        for field in ('param_dtype', 'compute_dtype'):
            errors.require_choice(self, field, ('float32', 'bfloat16', 'float16'))
        errors.require_between(self, 0.0, 0.99, 'embed_dropout', 'residual_dropout')
        errors.require_between(
            self, 0.0, 10.0, 'init_std', 'position_init_std', 'residual_init_std'
        )
        errors.require(
            not (self.parallel_residual and self.norm == 'post'),
            "parallel_residual = True has one norm before both branches; set norm = 'pre'",
        )
        errors.require_between(self, 0, 2**31 - 1, 'mup_base_width')
        layer = self.d_model * (4 * self.n_heads * self.d_head + 3 * self.d_ff)
        errors.require(
            self.n_layers <= 10_000 and self.n_layers * layer + self.d_model * self.n_vocab < 1e15,
            f'n_layers = {self.n_layers}, d_model = {self.d_model}, d_ff = {self.d_ff}, n_heads x '
            f'd_head = {self.n_heads} x {self.d_head}, n_vocab = {self.n_vocab}: no model is of '
            'such a size; lower them',
        )
        errors.require(
            self.n_layers % len(self.attention) == 0,
            f'n_layers = {self.n_layers} is not a multiple of the attention pattern '
            f'{self.attention}; use a multiple of {len(self.attention)}',
        )

    @property
    def width_ratio(self) -> float:
        """How much wider than muP's base model; 1 in the standard parameterisation."""
        return self.d_model / self.mup_base_width if self.mup_base_width else 1.0

    def hidden_std(self, std: float) -> float:
        """The initial standard deviation of hidden weights that have `std` at the base width."""
        return std * self.width_ratio**-0.5

    def rate_scale(self, about: axes.Parameter) -> float:
        """muP (Yang et al. 2022, Table 8): Adam's rate of hidden weights falls with the width."""
        return 1 / self.width_ratio if about.kind == 'matrix' else 1.0

    def network(self) -> 'GPT':
        return GPT(self)

    def empty_cache(self, batch: int, slots: int, dtype: str = '') -> 'Cache':
        """A cache for `batch` rows of up to `slots` tokens; in int8, or '' = compute_dtype.

        Raises:
          UsageError: a layer's form of attention sees ahead.
        """
        errors.require(
            not any(masks.sees_ahead(mask, self.n_ctx) for mask in self.layer_masks),
            f'attention = {self.attention} sees ahead: such a model scores whole windows of text '
            '(python -m gptjax.evaluate), but keeps no past to go on from',
        )
        shape = (batch, self.kv_heads, slots, self.d_head)
        return tuple(
            attention.empty(shape, dtype or self.compute_dtype) for _ in range(self.n_layers)
        )

    has_slots = True

    @property
    def most_tokens(self) -> int:
        """How many tokens can be read in one go."""
        return self.n_ctx

    def flops_per_token(self, n_params: int) -> float:
        """FLOPs of training on a token; what is only looked up does not multiply."""
        looked_up = self.n_ctx if self.positions == 'learned' else 0
        looked_up += 0 if self.tied_embedding else self.n_vocab
        seen = sum(mask.mean_seen(self.n_ctx) for mask in self.layer_masks)
        return flops.per_token(
            n_params - looked_up * self.d_model,
            self.n_heads * self.d_head,
            seen * self.n_layers / len(self.attention),
        )

    def kernels(self, windows: int) -> dict[str, str]:
        """Form of attention -> what trains it, of kernels/flash.py, on the mesh in force.

        Args:
          windows: that are trained on at once.

        Raises:
          UsageError: the plain form would, and holds too much, on an accelerator.
        """
        shapes = [
            (windows, self.n_ctx, heads, self.d_head) for heads in (self.n_heads, self.kv_heads)
        ]
        dtype = jnp.dtype(self.compute_dtype)
        chosen = [flash.chosen(*shapes, dtype, mask) for mask in self.layer_masks]
        if self.attention_dropout:
            chosen = [flash.PLAIN for _ in chosen]
        held = 4 * self.n_heads * self.n_ctx**2
        errors.require(
            flash.PLAIN not in chosen or axes.platform() == 'cpu' or held <= _MOST_HELD,
            f'no kernel of {axes.platform()} trains attention = {self.attention} with heads of '
            f'{self.d_head} in {self.compute_dtype}, n_ctx = {self.n_ctx}, attention_dropout = '
            f'{self.attention_dropout}: the plain form would hold {held / 2**30:.1f} GiB of '
            'weights for a window in a layer. Set --config.model.compute_dtype=bfloat16, n_ctx to '
            'a multiple of 128, attention_dropout to 0',
        )
        return dict(zip(self.attention, chosen, strict=True))


Cache = tuple[attention.KeyValue, ...]  # one a layer


class Block(nn.Module):
    """One layer: attention and a feed-forward net, normed before (GPT-2) or after (GPT-1).

    Both branches read the same normed input where the residual is parallel (GPT-J).
    """

    config: Config
    mask: masks.Mask

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
        attend = attention.Attention(cfg, self.mask, name='attention')
        dropout = layers.Dropout(cfg.residual_dropout)
        pre = cfg.norm == 'pre'

        y_BxLxD = norm_attention(x_BxLxD) if pre else x_BxLxD
        att_BxLxD, cache = attend(y_BxLxD, positions_BxL, cache, tree)
        x_BxLxD += dropout(att_BxLxD)
        if cfg.parallel_residual:
            return x_BxLxD + dropout(mlp.feed_forward(self, cfg, y_BxLxD)), cache
        norm_mlp = norm(name='norm_mlp')
        x_BxLxD = x_BxLxD if pre else norm_attention(x_BxLxD)
        y_BxLxD = norm_mlp(x_BxLxD) if pre else x_BxLxD
        x_BxLxD += dropout(mlp.feed_forward(self, cfg, y_BxLxD))
        return x_BxLxD if pre else norm_mlp(x_BxLxD), cache


class GPT(nn.Module):
    """Tokens -> hidden states, and hidden states -> logits.

    Parameters of the layers are stacked: 'block_j' holds, for place j of the attention pattern,
    the layers j, j + P, j + 2P, ... of a pattern P long. Scanned and unrolled forms share them.
    """

    config: Config

    def setup(self) -> None:
        cfg = self.config
        dtype = jnp.dtype(cfg.param_dtype)
        normal, shape = nn.initializers.normal, (cfg.n_vocab, cfg.d_model)
        table = axes.table(normal(cfg.init_std), 'vocab', 'embed', turns=True)
        self.token_embedding = layers.weight(self, 'token_embedding', table, shape, dtype)
        if cfg.positions == 'learned':
            positions = axes.table(normal(cfg.position_init_std), 'ctx', 'embed')
            self.position_embedding = self.param(
                'position_embedding', positions, (cfg.n_ctx, cfg.d_model), dtype
            )
        if not cfg.tied_embedding:
            self.unembedding = layers.weight(self, 'unembedding', table, shape, dtype)
        if cfg.head_bias:
            bias = axes.vector(nn.initializers.zeros, 'vocab')
            self.unembedding_bias = self.param('unembedding_bias', bias, (cfg.n_vocab,), dtype)
        self.pattern = [Block(cfg, mask, parent=None) for mask in cfg.layer_masks]
        self.blocks = [
            layers.weight(self, f'block_{j}', self._init_stack, block)
            for j, block in enumerate(self.pattern)
        ]
        if cfg.norm == 'pre':
            self.final_norm = layers.Norm(
                cfg.norm_kind, cfg.norm_eps, cfg.norm_bias, cfg.param_dtype
            )
        self.embed_dropout = layers.Dropout(cfg.embed_dropout)

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
        x_BxLxD = self.embed_dropout(x_BxLxD)
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

    def nats(
        self,
        hidden_BxLxD: Float[Array, 'B L D'],
        targets_BxL: Int[ArrayLike, 'B L'],
        weights_BxL: Float[ArrayLike, 'B L'],
        z_loss: float,
    ) -> tuple[Float[Array, ''], Float[Array, '']]:
        """The two sums of xent.nats(), without ever holding all logits."""
        hidden_BxLxD /= self.config.width_ratio
        return xent.nats(hidden_BxLxD, *self._output(), targets_BxL, weights_BxL, z_loss)

    def _output(self) -> tuple[Any, jax.Array | None]:
        table_VxD = self.token_embedding if self.config.tied_embedding else self.unembedding
        return table_VxD, self.unembedding_bias if self.config.head_bias else None

    def _init_stack(self, rng: jax.Array, block: Block) -> dict:
        repeats = self.config.n_layers // len(self.config.attention)
        x_BxLxD = jnp.zeros((1, 1, self.config.d_model), jnp.dtype(self.config.compute_dtype))
        position_BxL = jnp.zeros((1, 1), jnp.int32)

        def init(rng: jax.Array) -> dict:
            with jax.sharding.use_abstract_mesh(axes.NO_MESH):  # one position divides over nothing
                return block.init(rng, x_BxLxD, position_BxL)['params']

        return axes.stacked(jax.vmap(init)(jax.random.split(rng, repeats)))

    def _run(
        self, x_BxLxD: jax.Array, positions_BxL: jax.Array | None, tree: attention.Tree | None
    ) -> jax.Array:
        rng = self.make_rng('dropout') if self.has_rng('dropout') else None
        rows = layers.rows(self)

        def layer(
            x_BxLxD: jax.Array, params: Any, place: int, number: Any
        ) -> tuple[jax.Array, stack.Sown]:
            rngs = {} if rng is None else {'dropout': jax.random.fold_in(rng, number)}
            with jax.named_scope(f'block_{place}'):
                block = self.pattern[place]
                arguments = (x_BxLxD, positions_BxL, None, tree)
                kinds = ('losses', 'measures')
                variables = {'params': params, 'rows': rows}
                (x_BxLxD, _), found = block.apply(variables, *arguments, rngs=rngs, mutable=kinds)
            flat = functools.partial(traverse_util.flatten_dict, sep='/')  # of what parts sow, too
            return x_BxLxD, {kind: flat(named) for kind, named in found.items()}

        form = (self.config.scan_layers, self.config.remat)
        x_BxLxD, sown = stack.run(layer, x_BxLxD, self.blocks, *form)
        for name, of_layers_N in sown.get('losses', {}).items():
            layers.sow_loss(self, name, of_layers_N.sum())
        for name, of_layers_N in sown.get('measures', {}).items():
            layers.sow_measure(self, name, of_layers_N.mean())
        return x_BxLxD

    def _run_cached(
        self,
        x_BxLxD: jax.Array,
        positions_BxL: jax.Array,
        cache: Cache,
        tree: attention.Tree | None,
    ) -> tuple[jax.Array, Cache]:
        positions_BxL = jnp.broadcast_to(positions_BxL, x_BxLxD.shape[:2])
        kept = []
        for repeat in stack.unstacked(self.blocks):
            for block, params in zip(self.pattern, repeat, strict=True):
                past = cache[len(kept)]
                x_BxLxD, layer = block.apply({'params': params}, x_BxLxD, positions_BxL, past, tree)
                kept.append(layer)
        return x_BxLxD, tuple(kept)
