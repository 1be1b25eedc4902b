# SPDX-License-Identifier: Apache-2.0
"""What a model makes of its context: loss and gradient by distance.

The same held-out targets are scored with only the last 1, 2, 4, ... tokens before them, so that a
fall in loss is due to the tokens farther away (Khandelwal et al. 2018, section 4). The gradient of
a target's log probability with respect to the embedding of the token d places before it says how
much that token still counts.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from gptjax.configs import errors
from gptjax.data import tokens
from gptjax.runtime import mesh as mesh_lib


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
    rows: int = 1,
) -> dict[int, float]:
    """Mean nats of the targets, by how many tokens before them the model is shown.

    Args:
      rows: batches have a multiple of so many; the mesh's data x fsdp.
    """

    @jax.jit
    def nats(
        params: Any, tokens_BxC: jax.Array, targets_B: jax.Array, counted_B: jax.Array
    ) -> jax.Array:
        hidden_BxCxD = model.apply({'params': params}, tokens_BxC, method='hidden')
        logits_Bx1xV = model.apply({'params': params}, hidden_BxCxD[:, -1:], method='project')
        log_probs_BxV = jax.nn.log_softmax(logits_Bx1xV[:, 0])
        picked_B = jnp.take_along_axis(log_probs_BxV, targets_B[:, None], axis=1)[:, 0]
        return -(picked_B * counted_B).sum()

    found = {}
    for length in lengths(contexts_NxL.shape[1]):
        total = 0.0
        for part in _batches(contexts_NxL[:, -length:], targets_N, batch, rows):
            total += float(mesh_lib.fetched(nats(params, *part)))
            progress(int(part[-1].sum()))
        found[length] = total / len(targets_N)
    return found


def gradient_by_distance(
    model: Any,
    params: Any,
    contexts_NxL: Int[np.ndarray, 'N L'],
    targets_N: Int[np.ndarray, ' N'],
    batch: int,
    progress: Callable[[int], None] = lambda windows: None,
    rows: int = 1,
) -> Float[np.ndarray, ' L']:
    """Mean norm of d log p(target) / d embedding, nearest token first. Args: rows: as above."""
    n_ctx = contexts_NxL.shape[1]
    most = -(-min(batch, len(targets_N)) // rows) * rows
    # Every place of a batch has an embedding of its own: token i of a vocabulary of so many.
    places = dataclasses.replace(model.config, n_vocab=most * n_ctx)
    if hasattr(places, 'bptt_tokens'):
        places = dataclasses.replace(places, bptt_tokens=0)  # the whole gradient
    placed = type(model)(places)
    shapes = jax.eval_shape(placed.init_params, jax.random.key(0))['network']
    of_vocabulary = [name for name, x in params['network'].items() if name in _VOCABULARY]
    unused = {name: shapes[name].value.shape for name in of_vocabulary if name in shapes}
    unused.pop('token_embedding')

    def log_probs(
        embedded_ExD: jax.Array, params: Any, targets_B: jax.Array, counted_B: jax.Array
    ) -> jax.Array:
        """Their sum; each depends on the embeddings of its own row alone."""
        network = {name: x for name, x in params['network'].items() if name not in of_vocabulary}
        network |= {name: jnp.zeros(shape) for name, shape in unused.items()}
        network['token_embedding'] = embedded_ExD
        tokens_BxL = jnp.arange(len(targets_B) * n_ctx).reshape(-1, n_ctx)
        hidden = placed.apply({'params': {'network': network}}, tokens_BxL, method='hidden')
        logits_Bx1xV = model.apply({'params': params}, hidden[:, -1:], method='project')
        log_probs_BxV = jax.nn.log_softmax(logits_Bx1xV[:, 0])
        picked_B = jnp.take_along_axis(log_probs_BxV, targets_B[:, None], axis=1)[:, 0]
        return (picked_B * counted_B).sum()

    @jax.jit
    def norms(
        params: Any, contexts_BxL: jax.Array, targets_B: jax.Array, counted_B: jax.Array
    ) -> jax.Array:
        table_VxD = params['network']['token_embedding']
        embedded_ExD = table_VxD[contexts_BxL.ravel()]
        spare = most * n_ctx - len(embedded_ExD)
        embedded_ExD = jnp.pad(embedded_ExD, ((0, spare), (0, 0)))
        gradient_ExD = jax.grad(log_probs)(embedded_ExD, params, targets_B, counted_B)
        norm_E = jnp.linalg.norm(gradient_ExD[: contexts_BxL.size], axis=-1)
        return norm_E.reshape(-1, n_ctx).sum(axis=0)

    total_L = np.zeros(n_ctx)
    for part in _batches(contexts_NxL, targets_N, batch, rows):
        total_L += mesh_lib.fetched(norms(params, *part))
        progress(int(part[-1].sum()))
    return (total_L / len(targets_N))[::-1]


def _batches(
    contexts_NxL: Int[np.ndarray, 'N L'], targets_N: Int[np.ndarray, ' N'], batch: int, rows: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Contexts, targets, and 1 where a row counts: the last batch is filled up to the mesh."""
    for start in range(0, len(targets_N), batch):
        contexts, targets = contexts_NxL[start : start + batch], targets_N[start : start + batch]
        spare = -len(targets) % rows
        counted_B = np.array([1.0] * len(targets) + [0.0] * spare, np.float32)
        yield np.pad(contexts, ((0, spare), (0, 0))), np.pad(targets, (0, spare)), counted_B


_VOCABULARY = ('token_embedding', 'unembedding', 'unembedding_bias')
