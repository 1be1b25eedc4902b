# SPDX-License-Identifier: Apache-2.0
"""What a model makes of its context: loss and gradient by distance.

The same held-out targets are scored with only the last 1, 2, 4, ... tokens before them, so that a
fall in loss is due to the tokens farther away (Khandelwal et al. 2018, section 4). The gradient of
a target's log probability with respect to the embedding of the token d places before it says how
much that token still counts.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from gptjax.configs import errors
from gptjax.data import tokens


def windows(
    held_out: tokens.TokenSet, n_ctx: int, count: int
) -> tuple[Int[np.ndarray, 'N L'], Int[np.ndarray, ' N']]:
    """`count` contexts of n_ctx tokens, evenly spread, and the token after each.

    Raises:
      InputError: the held-out text is shorter than one window.
    """
    room = len(held_out) - n_ctx - 1
    if room < 0:
        raise errors.InputError(
            f'{held_out.folder} holds {len(held_out)} held-out tokens, fewer than n_ctx + 1'
        )
    starts = np.unique(np.linspace(0, room, min(count, room + 1)).astype(int))
    read = np.stack([held_out.read(int(start), n_ctx + 1) for start in starts]).astype(np.int32)
    scored = read[:, -1] != held_out.end_of_text
    return read[scored, :-1], read[scored, -1]


def lengths(n_ctx: int) -> list[int]:
    """1, 2, 4, ... n_ctx."""
    found = [2**i for i in range(n_ctx.bit_length()) if 2**i < n_ctx]
    return [*found, n_ctx]


def loss_by_length(
    model: Any,
    params: Any,
    contexts_NxL: Int[np.ndarray, 'N L'],
    targets_N: Int[np.ndarray, ' N'],
    batch: int,
    progress: Callable[[int], None] = lambda windows: None,
) -> dict[int, float]:
    """Mean nats of the targets, by how many tokens before them the model is shown."""

    @jax.jit
    def nats(params: Any, tokens_BxC: jax.Array, targets_B: jax.Array) -> jax.Array:
        hidden_BxCxD = model.apply({'params': params}, tokens_BxC, method='hidden')
        logits_Bx1xV = model.apply({'params': params}, hidden_BxCxD[:, -1:], method='project')
        log_probs_BxV = jax.nn.log_softmax(logits_Bx1xV[:, 0])
        return -jnp.take_along_axis(log_probs_BxV, targets_B[:, None], axis=1).sum()

    found = {}
    for length in lengths(contexts_NxL.shape[1]):
        total = 0.0
        for start in range(0, len(targets_N), batch):
            part = slice(start, start + batch)
            total += float(nats(params, contexts_NxL[part, -length:], targets_N[part]))
            progress(len(targets_N[part]))
        found[length] = total / len(targets_N)
    return found


def gradient_by_distance(
    model: Any,
    params: Any,
    contexts_NxL: Int[np.ndarray, 'N L'],
    targets_N: Int[np.ndarray, ' N'],
    batch: int,
    progress: Callable[[int], None] = lambda windows: None,
) -> Float[np.ndarray, ' L']:
    """Mean norm of d log p(target) / d embedding, nearest token first."""
    n_ctx = contexts_NxL.shape[1]
    # Every place gets an embedding of its own: token i of a vocabulary of n_ctx stands at place i.
    places = dataclasses.replace(model.config, n_vocab=n_ctx)
    if hasattr(places, 'bptt_tokens'):
        places = dataclasses.replace(places, bptt_tokens=0)  # the whole gradient
    placed = type(model)(places)
    shapes = jax.eval_shape(placed.init_params, jax.random.key(0))['network']
    of_vocabulary = [name for name, x in params['network'].items() if name in _VOCABULARY]
    rest = {name: x for name, x in params['network'].items() if name not in of_vocabulary}
    unused = {name: jnp.zeros(shapes[name].value.shape) for name in of_vocabulary}

    def log_prob(embedded_LxD: jax.Array, target: jax.Array) -> jax.Array:
        network = rest | unused | {'token_embedding': embedded_LxD}
        tokens_1xL = jnp.arange(n_ctx)[None]
        hidden = placed.apply({'params': {'network': network}}, tokens_1xL, method='hidden')
        logits_1x1xV = model.apply({'params': params}, hidden[:, -1:], method='project')
        return jax.nn.log_softmax(logits_1x1xV[0, 0])[target]

    @jax.jit
    def norms(contexts_BxL: jax.Array, targets_B: jax.Array) -> jax.Array:
        embedded_BxLxD = params['network']['token_embedding'][contexts_BxL]
        gradient_BxLxD = jax.vmap(jax.grad(log_prob))(embedded_BxLxD, targets_B)
        return jnp.linalg.norm(gradient_BxLxD, axis=-1).sum(axis=0)

    total_L = np.zeros(n_ctx)
    for start in range(0, len(targets_N), batch):
        part = slice(start, start + batch)
        total_L += np.asarray(norms(contexts_NxL[part], targets_N[part]))
        progress(len(targets_N[part]))
    return (total_L / len(targets_N))[::-1]


_VOCABULARY = ('token_embedding', 'unembedding', 'unembedding_bias')
