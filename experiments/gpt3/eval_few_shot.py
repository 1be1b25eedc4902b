# SPDX-License-Identifier: Apache-2.0
"""GPT-3's few-shot column (Brown et al. 2020, section 3): every task that is built.

Command: python -m gptjax.evaluate --config=experiments/gpt3/eval_few_shot.py \
    --config.init_from=PATH --config.data_dir=DATA --workdir=runs/scores
Expected time: not measured
Expected number: the paper's, in the last column of results.md

Argument: tasks, seeds, limit as in eval.py.
"""

import ml_collections

from experiments.gpt3 import eval as any_shots

VARIANTS = ()


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Argument: tasks=all,seeds=0,limit=0."""
    return any_shots.get_config(','.join(filter(None, (arg, 'k=few'))))
