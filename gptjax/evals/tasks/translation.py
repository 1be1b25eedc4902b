# SPDX-License-Identifier: Apache-2.0
"""Translation: GPT-3, section 3.3; GPT-2, section 3.7."""

from gptjax.evals import fewshot

_NAMES = {'en': 'English', 'fr': 'French', 'de': 'German', 'ro': 'Romanian'}


def _pair(source: str, target: str) -> fewshot.Task:
    def form(record: fewshot.Record, k: int) -> list[fewshot.Item]:
        """'sentence =' behind examples; a question without (caption of figure G.36)."""
        sentence, name = record[source], _NAMES[target]
        context = f'{sentence} =' if k else f'Q: What is the {name} translation of {sentence} A:'
        return [fewshot.Item(context, (record[target],))]

    sets = {'fr': 'wmt14_en_fr', 'de': 'wmt16_en_de', 'ro': 'wmt16_en_ro'}
    figures = {
        'de-en': 'G.36',
        'en-de': 'G.37',
        'en-fr': 'G.38',
        'fr-en': 'G.39',
        'en-ro': 'G.40',
        'ro-en': 'G.41',
    }
    other = source if target == 'en' else target
    return fewshot.Task(
        sets[other],
        form,
        f'GPT-3, 3.3, figure {figures[f"{source}-{target}"]}',
        'generate',
        split='test',
        shots_from='validation',
        k=64,
        metrics=('bleu',),
        delimiter='\n',
        max_new_tokens=128,
        notes='BLEU by sacrebleu, tokenize=13a',
    )


def _multi30k(source: str, target: str) -> fewshot.Task:
    """The same form on captions of pictures, which are short."""
    import dataclasses

    other = source if target == 'en' else target
    return dataclasses.replace(
        _pair(source, target),
        set=f'multi30k_en_{other}',
        max_new_tokens=48,
        source='Multi30k (Elliott et al. 2016), in the form of GPT-3, 3.3',
    )


def _gpt2(source: str, target: str) -> fewshot.Task:
    def form(record: fewshot.Record, k: int) -> list[fewshot.Item]:
        del k
        return [fewshot.Item(f'{record[source]} =', (record[target],))]

    return fewshot.Task(
        'wmt14_en_fr',
        form,
        'GPT-2, 3.7',
        'generate',
        split='test',
        shots_from='validation',
        k=5,
        metrics=('bleu',),
        delimiter='\n',
        max_new_tokens=128,
        stop=('\n', '.'),
        decode={'num_beams': 1},
        notes='"english sentence = french sentence" pairs of unstated number (K), greedy, up to '
        'the first sentence end; BLEU by sacrebleu, tokenize=13a',
    )


_PAIRS = (('en', 'fr'), ('fr', 'en'), ('en', 'de'), ('de', 'en'), ('en', 'ro'), ('ro', 'en'))
TASKS = {
    **{f'wmt_{a}_{b}': _pair(a, b) for a, b in _PAIRS},
    **{f'multi30k_{a}_{b}': _multi30k(a, b) for a, b in _PAIRS[:4]},
    **{f'gpt2_wmt_{a}_{b}': _gpt2(a, b) for a, b in _PAIRS[:2]},
}
