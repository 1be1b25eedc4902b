# SPDX-License-Identifier: Apache-2.0
"""GPT-3's evaluations (Brown et al. 2020, section 3 and appendix G), any tasks at any K.

Command: python -m gptjax.evaluate --config=experiments/gpt3/eval.py:tasks=lambada+piqa,k=0 \
    --config.init_from=PATH --config.data_dir=DATA --workdir=runs/scores
Expected time: on two CPU cores and 135M parameters, 5 to 40 items/s, by length
Expected number: the papers' stand in the last column of results.md

Arguments: tasks=a+b (names, or all, synthetic, korean), k=0+1+few (few = each task's own K in the
paper), seeds=0+1 (draws of the examples), limit=N items of each task.
"""

import ml_collections

from gptjax.configs import base, cli, errors

VARIANTS = ('tasks=lambada+piqa,k=0', 'tasks=synthetic,k=0+1+few,seeds=0+1')
SYNTHETIC = """
    arithmetic_2d_plus arithmetic_2d_minus arithmetic_3d_plus arithmetic_3d_minus
    arithmetic_4d_plus arithmetic_4d_minus arithmetic_5d_plus arithmetic_5d_minus
    arithmetic_2d_times arithmetic_1dc cycled_letters anagrams_1 anagrams_2 random_insertion
    reversed_words transposed_letters novel_words
"""
KOREAN = 'nsmc kornli korsts klue_nli ko_en en_ko'
ALL = f"""
    lambada hellaswag storycloze ptb triviaqa webquestions natural_questions
    wmt_en_fr wmt_fr_en wmt_en_de wmt_de_en wmt_en_ro wmt_ro_en winograd winogrande
    piqa arc_easy arc_challenge openbookqa coqa quac drop squad2 race_h race_m
    boolq cb copa rte wic wsc multirc record anli_r1 anli_r2 anli_r3 sat_analogies {SYNTHETIC}
"""
_GROUPS = {'all': ALL, 'synthetic': SYNTHETIC, 'korean': KOREAN}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Argument: tasks=lambada+piqa,k=0+1+few,seeds=0,limit=0."""
    arg = cli.parse_arg(arg, tasks='all', k='0', seeds='0', limit=0)
    config = base.get_config()
    named = [_GROUPS.get(name, name).split() for name in arg.tasks.split('+')]
    config.suite.update(
        tasks=tuple(dict.fromkeys(name for some in named for name in some)),
        k=tuple(-1 if k == 'few' else _count('k', k) for k in arg.k.split('+')),
        seeds=tuple(_count('seeds', seed) for seed in arg.seeds.split('+')),
        limit=arg.limit,
    )
    return config.lock()


def _count(name: str, text: str) -> int:
    errors.require(text.isdecimal(), f'{name}={text!r}: numbers joined by +, as {name}=0+1')
    return int(text)
