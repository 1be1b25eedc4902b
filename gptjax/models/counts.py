# SPDX-License-Identifier: Apache-2.0
"""How large a model is, as scaling laws count it: from shapes alone."""

import functools
from typing import NamedTuple

import jax

from gptjax.models import axes, heads

_PROCESS_BYTES = 0.8e9  # of Python, JAX and a compilation


class Counts(NamedTuple):
    """Three counts of parameters, and what a token costs.

    The papers differ in what N is. Kaplan et al. 2020 (section 2.1) leave embeddings out, Hoffmann
    et al. 2022 count all; what multiplies is the transformer with what gives the logits. In small
    models the choice moves the exponents (Pearce and Song 2024).
    """

    parameters: int
    non_embedding: int  # without tables of tokens and positions, and without what gives the logits
    with_head: int  # those, and what gives the logits: a tied table once
    flops_per_token: float  # of training: forward and backward, causal


@functools.lru_cache(4096)
def of(config: heads.Config) -> Counts:
    """The counts of a model; of an n-gram model its n-grams. No array is made."""
    if config.family == 'ngram':  # whose arrays are tables beside its n-grams
        entries = sum(config.entries)
        return Counts(entries, entries, entries, 0.0)
    model = heads.LanguageModel(config)
    boxed = jax.eval_shape(model.init_params, jax.random.key(0))
    leaves = jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, axes.Boxed))
    sizes = [(leaf.about, leaf.value.size) for leaf in leaves]
    total = sum(size for _, size in sizes)
    tables = sum(size for about, size in sizes if about.kind == 'table')
    of_vocab = [size for about, size in sizes if about.kind == 'table' and 'vocab' in about.names]
    bias = sum(size for about, size in sizes if about.kind != 'table' and 'vocab' in about.names)
    head = of_vocab[-1] + bias if of_vocab else 0  # one of two of a size where they are not tied
    body = total - tables - bias
    return Counts(total, body, body + head, config.flops_per_token(total))


def memory(config: heads.Config, batch_tokens: int) -> float:
    """Bytes that training takes on a CPU, roughly and rather too many.

    Weights, gradients and two moments in float32, and once more while a step makes new ones; what
    every token leaves in every layer for the backward pass; its logits three times.
    """
    width, layers = getattr(config, 'd_model', 0), getattr(config, 'n_layers', 0)
    inner = getattr(config, 'd_ff', 4 * width)
    a_token = layers * (16 * width + 4 * inner) + 3 * config.n_vocab
    return _PROCESS_BYTES + 4.0 * (8 * of(config).parameters + batch_tokens * a_token)
