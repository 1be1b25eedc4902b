# SPDX-License-Identifier: Apache-2.0
"""FLOPs of training a GPT, counted from its shape."""

from typing import NamedTuple

from gptjax.configs import fields


def per_token(n_params: int, attention_width: int, seen: float) -> float:
    """Training FLOPs a token: 6 for each parameter that multiplies, and causal attention.

    The convention: 2 a multiply-add, the backward pass twice the forward, nothing that is computed
    again counted; attention scores and values over the positions that the mask leaves, on average
    (Kaplan et al. 2020, section 2.1, counts all n_ctx of them; PaLM, appendix B, too).

    Args:
      n_params: without what is only looked up; the tied embedding counted once, for the logits.
      attention_width: heads x d_head.
      seen: positions a token sees, summed over the layers; see mean_seen().
    """
    return 6.0 * n_params + 3.0 * 2 * 2 * attention_width * seen


def mean_seen(n_ctx: int, band_width: int) -> float:
    """Positions that a token of a full window sees on average, its own included.

    Args:
      band_width: how many it sees at most; 0 = all before it.
    """
    band = min(band_width or n_ctx, n_ctx)
    return band - band * (band - 1) / (2 * n_ctx)


class Size(NamedTuple):
    """How large a GPT is, and what training it on a token costs."""

    parameters: int
    flops_per_token: float


def of_gpt(section: fields.Values) -> Size:
    """The size of a GPT by arithmetic, from its model section; without JAX, for sweeps.

    Args:
      section: of dense attention and the `dense` feed-forward net. models/counts.py counts any.
    """
    width, layers = section['d_model'], section['n_layers']
    own, shared = (section['d_head'] * n for n in _heads(section))
    ways = 2 if section['gated_mlp'] else 1
    norms = 1 if section['parallel_residual'] else 2
    norm = width * (2 if section['norm_bias'] else 1)
    attention = 2 * width * (own + shared)
    attention += own + 2 * shared + width if section['attention_bias'] else 0
    inner = section['d_ff']
    mlp = (ways + 1) * width * inner + (ways * inner + width if section['mlp_bias'] else 0)
    total = layers * (attention + mlp + norms * norm) + (norm if section['norm'] == 'pre' else 0)
    tables = section['n_vocab'] * width
    positions = section['n_ctx'] * width if section['positions'] == 'learned' else 0
    head = 0 if section['tied_embedding'] else tables
    bias = section['n_vocab'] if section['head_bias'] else 0
    parameters = total + tables + positions + head + bias
    seen = mean_seen(section['n_ctx'], 0) * layers
    looked_up = positions + (tables if head else 0)
    return Size(parameters, per_token(parameters - looked_up, own, seen))


def _heads(section: fields.Values) -> tuple[int, int]:
    """Query heads, and those with keys and values of their own."""
    return section['n_heads'], section['n_kv_heads'] or section['n_heads']
