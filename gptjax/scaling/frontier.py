# SPDX-License-Identifier: Apache-2.0
"""The compute-optimal frontier of a law of N and D, at C = 6 N D (Kaplan et al. 2020, section 2.1).

Of E + A / N^alpha + B / D^beta: N* = G (C / 6)^(beta / (alpha + beta)), D* = C / (6 N*), and
G = (alpha A / (beta B))^(1 / (alpha + beta)) (Hoffmann et al. 2022, equation 4). Of Kaplan's joint
form likewise, by its derivative.
"""

from typing import NamedTuple

import numpy as np

from gptjax.scaling import laws

FLOPS = 6.0  # a parameter and token


class Optimum(NamedTuple):
    """What is best at a budget, of each sample.

    Attributes:
      n: parameters. d: tokens. loss: nats a token. exponent: of N* over C; D*'s is 1 less it.
    """

    n: laws.Values
    d: laws.Values
    loss: laws.Values
    exponent: laws.Values


def optimum(law: str, numbers: laws.Numbers, c: float) -> Optimum:
    """The best size and length at c FLOPs.

    Args:
      law: chinchilla or kaplan.
      numbers: of the law; arrays of samples, or single numbers.
    """
    if law == 'chinchilla':
        a, b, alpha, beta = (np.asarray(numbers[name]) for name in ('A', 'B', 'alpha', 'beta'))
        exponent = beta / (alpha + beta)
        log_n = np.log(alpha * a / (beta * b)) / (alpha + beta) + exponent * np.log(c / FLOPS)
    else:
        of_n, of_d, n_c, d_c = (np.asarray(numbers[name]) for name in laws.Kaplan.names)
        ratio = of_n / of_d
        exponent = 1 / (1 + ratio)
        log_n = exponent * (np.log(ratio * c / (FLOPS * d_c)) + ratio * np.log(n_c))
    n = np.exp(log_n)
    d = c / (FLOPS * n)
    return Optimum(n, d, laws.LAWS[law].loss(numbers, n, d), exponent)
