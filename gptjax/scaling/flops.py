# SPDX-License-Identifier: Apache-2.0
"""FLOPs of training a GPT, counted from its shape."""


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
