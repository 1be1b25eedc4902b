# SPDX-License-Identifier: Apache-2.0
"""GPT-2's evaluations without fine-tuning (Radford et al. 2019, section 3, Table 3).

Command: python -m gptjax.evaluate --config=experiments/gpt2/eval.py --config.init_from=PATH \
    --config.data_dir=DATA --workdir=runs/scores
Expected time: not measured
Expected number: the paper's, in the last column of results.md
"""

import ml_collections

from experiments.gpt3 import eval as gpt3
from gptjax.configs import cli

VARIANTS = ()
TASKS = (
    'gpt2_lambada',
    'lambada_last_word',
    'cbt_cn',
    'cbt_ne',
    'wikitext2',
    'ptb',
    'enwik8',
    'text8',
    'wikitext103',
    'lm1b',
    'gpt2_winograd_full',
    'gpt2_winograd_partial',
    'gpt2_coqa',
    'gpt2_cnn_dailymail',
    'gpt2_cnn_dailymail_no_hint',
    'gpt2_wmt_en_fr',
    'gpt2_wmt_fr_en',
    'gpt2_natural_questions',
)


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Argument: limit=0 items of each task."""
    arg = cli.parse_arg(arg, limit=0)
    return gpt3.get_config(f'tasks={"+".join(TASKS)},k=few,limit={arg.limit}')
