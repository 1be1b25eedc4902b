# SPDX-License-Identifier: Apache-2.0
"""The recurrent baseline: stacked LSTM or GRU layers, gradients cut every few tokens.

Names carry their axes as in gpt.py; W is the width of all gates of a layer together.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from gptjax.configs import errors
from gptjax.models import axes, layers
from gptjax.models.kernels import embed, xent
from gptjax.scaling import flops

_GATES = {'lstm': 4, 'gru': 3}
State = tuple[jax.Array, ...]  # of one layer: (hidden_BxD, cell_BxD) of an LSTM, (hidden_BxD,)


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape and numerics of an RNN; the fields are explained in configs/sections/models.py."""

    family: Literal['rnn']
    cell: Literal['lstm', 'gru']
    n_layers: int
    d_model: int
    n_ctx: int
    n_vocab: int
    bptt_tokens: int
    init_range: float
    dropout: float
    tied_embedding: bool
    param_dtype: Literal['float32', 'bfloat16']
    compute_dtype: Literal['float32', 'bfloat16']

    def __post_init__(self) -> None:
        errors.require_positive(self, 'n_layers', 'd_model', 'n_ctx', 'n_vocab')
        errors.require_numbers(vars(self), 2**31 - 1)
        size = self.d_model * (8 * self.n_layers * self.d_model + self.n_vocab)
        errors.require(
            self.n_layers <= 10_000 and size < 1e15,
            f'n_layers = {self.n_layers}, d_model = {self.d_model}, n_vocab = {self.n_vocab}: no '
            'model is of such a size; lower them',
        )
        errors.require_choice(self, 'family', ('rnn',))
        errors.require_choice(self, 'cell', tuple(_GATES))
        for field in ('param_dtype', 'compute_dtype'):
            errors.require_choice(self, field, ('float32', 'bfloat16'))
        errors.require_between(self, 0, 2**31 - 1, 'bptt_tokens')
        errors.require_between(self, 0.0, 10.0, 'init_range')
        errors.require_between(self, 0.0, 0.99, 'dropout')

    def network(self) -> 'RNN':
        return RNN(self)

    most_tokens = None  # any number can be read, one after the other
    has_slots = False

    def empty_cache(self, batch: int, slots: int, dtype: str = '') -> tuple[State, ...]:
        del slots, dtype  # an RNN's past is of one size
        shape, parts = (batch, self.d_model), 2 if self.cell == 'lstm' else 1
        return tuple(
            tuple(jnp.zeros(shape, self.compute_dtype) for _ in range(parts))  # for donation
            for _ in range(self.n_layers)
        )

    def rate_scale(self, about: axes.Parameter) -> float:
        del about
        return 1.0

    def kernels(self, windows: int) -> dict[str, str]:
        del windows
        return {}

    def flops_per_token(self, n_params: int) -> float:
        looked_up = 0 if self.tied_embedding else self.n_vocab * self.d_model
        return flops.per_token(n_params - looked_up, 0, 0.0)


class RNN(nn.Module):
    """Tokens -> hidden states of the last layer, and hidden states -> logits.

    Dropout is on the embedding, between layers and on the output, never on the recurrence (Zaremba
    et al. 2014, section 3).
    """

    config: Config

    def setup(self) -> None:
        cfg = self.config
        self.token_embedding = self._weight('token_embedding', 'vocab', 'embed')
        if not cfg.tied_embedding:
            self.unembedding = self._weight('unembedding', 'vocab', 'embed')
        self.layers = [Layer(cfg, name=f'layer_{i}') for i in range(cfg.n_layers)]
        self.dropout = layers.Dropout(cfg.dropout)

    def __call__(
        self,
        tokens_BxL: Int[ArrayLike, 'B L'],
        positions_BxL: Int[ArrayLike, '#B L'] | None = None,
        cache: tuple[State, ...] | None = None,
    ) -> tuple[Float[Array, 'B L D'], tuple[State, ...] | None]:
        """Hidden states of the last layer; dropout is on exactly when a 'dropout' rng is given.

        Args:
          tokens_BxL: token ids.
          positions_BxL: -1 marks padding, which leaves the state alone; else without meaning.
          cache: the states so far; None = zeros, as before every window.
        """
        cfg = self.config
        rows, length = tokens_BxL.shape
        if positions_BxL is None:
            positions_BxL = jnp.arange(length)[None]
        real_BxL = jnp.broadcast_to(positions_BxL >= 0, (rows, length))
        x_BxLxD = embed.lookup(self.token_embedding, jnp.asarray(tokens_BxL), cfg.compute_dtype)
        x_BxLxD = axes.constrain(x_BxLxD, 'batch', 'length', 'act_embed')
        states = cfg.empty_cache(rows, length) if cache is None else cache
        kept = []
        for layer, state in zip(self.layers, states, strict=True):
            x_BxLxD, state = layer(self.dropout(x_BxLxD), real_BxL, state)
            kept.append(state)
        x_BxLxD = self.dropout(x_BxLxD)
        return x_BxLxD, None if cache is None else tuple(kept)

    def unembed(self, hidden_BxLxD: Float[Array, 'B L D']) -> Float[Array, 'B L V']:
        """float32 logits, through the token embedding where it is tied."""
        return layers.logits(hidden_BxLxD, self._output())

    def nats(
        self,
        hidden_BxLxD: jax.Array,
        targets_BxL: jax.Array,
        weights_BxL: jax.Array,
        z_loss: float,
    ) -> tuple[Float[Array, ''], Float[Array, '']]:
        """The two sums of xent.nats(), without ever holding all logits."""
        return xent.nats(hidden_BxLxD, self._output(), None, targets_BxL, weights_BxL, z_loss)

    def _output(self) -> jax.Array:
        return self.token_embedding if self.config.tied_embedding else self.unembedding

    def _weight(self, name: str, *names: str) -> jax.Array:
        cfg = self.config
        init = axes.table(_uniform(cfg.init_range), *names)
        return self.param(name, init, (cfg.n_vocab, cfg.d_model), jnp.dtype(cfg.param_dtype))


class Layer(nn.Module):
    """One recurrent layer: (B, L, D) -> (B, L, D). Input products are made for all places at once.

    Gates in torch's order: input, forget, cell, output (LSTM); reset, update, new (GRU, where the
    reset gate acts on the product of the hidden state, as in cuDNN).
    """

    config: Config

    @nn.compact
    def __call__(
        self, x_BxLxD: Float[Array, 'B L D'], real_BxL: Bool[Array, 'B L'], state: State
    ) -> tuple[Float[Array, 'B L D'], State]:
        cfg = self.config
        width = _GATES[cfg.cell] * cfg.d_model
        param_dtype, dtype = jnp.dtype(cfg.param_dtype), jnp.dtype(cfg.compute_dtype)
        uniform = _uniform(cfg.init_range)

        def weight(name: str) -> jax.Array:
            init = axes.matrix(uniform, 'embed', 'mlp', inputs=(0,))
            return self.param(name, init, (cfg.d_model, width), param_dtype).astype(dtype)

        input_DxW, hidden_DxW = weight('input_kernel'), weight('hidden_kernel')
        bias_W = self.param('bias', axes.vector(self._bias, 'mlp'), (width,), param_dtype)
        gates_BxLxW = (
            jnp.einsum('BLD,DW->BLW', x_BxLxD, input_DxW) + bias_W.astype(dtype)[None, None]
        )
        gates_BxLxW = axes.constrain(gates_BxLxW, 'batch', 'length', 'act_mlp')
        cell = _lstm
        if cfg.cell == 'gru':
            init = axes.vector(nn.initializers.zeros, 'embed')
            bias_D = self.param('hidden_bias', init, (cfg.d_model,), param_dtype)
            cell = functools.partial(_gru, bias_D=bias_D.astype(dtype))
        cut_L = jnp.zeros(x_BxLxD.shape[1], bool)
        if cfg.bptt_tokens:
            places_L = jnp.arange(x_BxLxD.shape[1])
            cut_L = (places_L > 0) & (places_L % cfg.bptt_tokens == 0)

        def step(state: State, scanned: tuple) -> tuple:
            gates_BxW, real_B, cut = scanned
            state = tuple(jnp.where(cut, jax.lax.stop_gradient(s), s) for s in state)
            new = cell(gates_BxW, state, hidden_DxW)
            state = tuple(jnp.where(real_B[:, None], n, s) for n, s in zip(new, state, strict=True))
            return state, state[0]

        scanned = (gates_BxLxW.swapaxes(0, 1), real_BxL.T, cut_L)
        state, hidden_LxBxD = jax.lax.scan(step, state, scanned)
        return hidden_LxBxD.swapaxes(0, 1), state

    def _bias(self, rng: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        """Zeros, and ones for an LSTM's forget gate (Jozefowicz et al. 2015, section 2.2)."""
        del rng
        bias_W = jnp.zeros(shape, dtype)
        if self.config.cell == 'lstm':
            bias_W = bias_W.at[self.config.d_model : 2 * self.config.d_model].set(1)
        return bias_W


def _lstm(gates_BxW: jax.Array, state: State, kernel_DxW: jax.Array) -> State:
    hidden_BxD, cell_BxD = state
    gates_BxW += hidden_BxD @ kernel_DxW
    i_BxD, f_BxD, g_BxD, o_BxD = jnp.split(gates_BxW, 4, axis=-1)
    cell_BxD = nn.sigmoid(f_BxD) * cell_BxD + nn.sigmoid(i_BxD) * nn.tanh(g_BxD)
    return nn.sigmoid(o_BxD) * nn.tanh(cell_BxD), cell_BxD


def _gru(gates_BxW: jax.Array, state: State, kernel_DxW: jax.Array, bias_D: jax.Array) -> State:
    (hidden_BxD,) = state
    r_BxD, z_BxD, n_BxD = jnp.split(gates_BxW, 3, axis=-1)
    hr_BxD, hz_BxD, hn_BxD = jnp.split(hidden_BxD @ kernel_DxW, 3, axis=-1)
    r_BxD, z_BxD = nn.sigmoid(r_BxD + hr_BxD), nn.sigmoid(z_BxD + hz_BxD)
    n_BxD = nn.tanh(n_BxD + r_BxD * (hn_BxD + bias_D[None]))
    return ((1 - z_BxD) * n_BxD + z_BxD * hidden_BxD,)


def _uniform(limit: float) -> axes.Initializer:
    """Uniform over [-limit, limit]."""
    return lambda rng, shape, dtype: jax.random.uniform(rng, shape, dtype, -limit, limit)
