# SPDX-License-Identifier: Apache-2.0
"""Laws that papers print, as curves to lay beside one's own. Other data, other tokenizers."""

from typing import NamedTuple

import numpy as np

from gptjax.scaling import laws

PF_DAY = 8.64e19  # FLOPs of a petaflop/s for a day


class Published(NamedTuple):
    """A law with its numbers. source: paper and place."""

    law: str
    numbers: dict[str, float]
    source: str


LAWS = {
    # N without embeddings, D in tokens, one tokenizer of 50,257 ids, WebText2.
    'kaplan_n': Published(
        'power', {'alpha': 0.076, 'x_c': 8.8e13}, 'Kaplan et al. 2020, equation 1.1'
    ),
    'kaplan_d': Published(
        'power', {'alpha': 0.095, 'x_c': 5.4e13}, 'Kaplan et al. 2020, equation 1.2'
    ),
    'kaplan_c': Published(
        'power', {'alpha': 0.050, 'x_c': 3.1e8 * PF_DAY}, 'Kaplan et al. 2020, equation 1.3'
    ),
    'kaplan': Published(
        'kaplan',
        {'alpha_N': 0.076, 'alpha_D': 0.103, 'N_c': 6.4e13, 'D_c': 1.8e13},
        'Kaplan et al. 2020, table 2',
    ),
    # Tokens that are best in a batch, over the loss: B = (x_c / L)^alpha.
    'kaplan_batch': Published(
        'power', {'alpha': 1 / 0.21, 'x_c': 2e8**0.21}, 'Kaplan et al. 2020, equation 1.4'
    ),
    'gpt3': Published(
        'power',
        {'alpha': 0.048, 'x_c': 2.57 ** (1 / 0.048) * PF_DAY},
        'Brown et al. 2020, figure 3.1: 2.57 C^-0.048, C in PF-days',
    ),
    # Unrounded, from the paper's TeX; 1.69, 406.4, 410.7, 0.34, 0.28 as printed.
    'chinchilla': Published(
        'chinchilla',
        {
            'E': float(np.exp(0.5267228)),
            'A': float(np.exp(6.0073404)),
            'B': float(np.exp(6.0179186)),
            'alpha': 0.33917084,
            'beta': 0.2849083,
        },
        'Hoffmann et al. 2022, section D.3',
    ),
    'besiroglu': Published(
        'chinchilla',
        {'E': 1.81686, 'A': 482.006, 'B': 2085.434, 'alpha': 0.34781, 'beta': 0.36585},
        'Besiroglu et al. 2024 (arXiv 2404.10102v2)',
    ),
}


def loss(name: str, *columns: laws.Values) -> laws.Values:
    """What a published law says: nats a token, or tokens of kaplan_batch."""
    found = LAWS[name]
    return laws.LAWS[found.law].loss(found.numbers, *columns)
