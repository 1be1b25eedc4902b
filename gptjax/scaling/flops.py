# SPDX-License-Identifier: Apache-2.0
"""FLOPs of training a GPT, counted from its shape."""


def per_token(n_layers: int, n_heads: int, d_head: int, n_ctx: int, n_params: int) -> float:
    """Training FLOPs a token: 6 for each parameter that multiplies, and causal attention.

    The convention: 2 a multiply-add, the backward pass twice the forward; `n_params` without the
    position table, the tied embedding counted once (for the logits); attention scores and values
    over the n_ctx / 2 positions that a causal mask leaves on average (Kaplan et al. 2020, section
    2.1, counts n_ctx; PaLM, appendix B, too). Banded layers are counted as dense.
    """
    attention = 2 * 2 * n_layers * n_heads * d_head * (n_ctx / 2)
    return 6.0 * n_params + 3.0 * attention
