# SPDX-License-Identifier: Apache-2.0
"""What the papers print, to stand beside our scores: percent, perplexity or bits as there.

GPT-2: Radford et al. 2019, Table 3 and sections 3.4 to 3.8. GPT-3: Brown et al. 2020, Tables 3.1 to
3.10 (the text gives 3D+ as 80.2 and, of another seed, other scrambling scores) and, by size, the
curves behind figures 3.1 and 3.2. K is 0, 1, or FEW: each task's own.
"""

from collections.abc import Mapping

FEW = -1
_SIZES = ('125M', '350M', '760M', '1.3B', '2.7B', '6.7B', '13B', '175B')
_GPT2 = ('117M', '345M', '762M', '1542M')

# (task, metric) -> zero, one and few shots of the 175B model; None = not printed.
_GPT3: dict[tuple[str, str], tuple[float | None, ...]] = {
    ('ptb', 'word_perplexity'): (20.50, None, None),
    ('lambada', 'accuracy'): (76.2, 72.5, 86.4),
    ('lambada', 'perplexity'): (3.00, 3.35, 1.92),
    ('hellaswag', 'accuracy'): (78.9, 78.1, 79.3),
    ('storycloze', 'accuracy'): (83.2, 84.7, 87.7),
    ('triviaqa', 'exact_match'): (64.3, 68.0, 71.2),
    ('natural_questions', 'exact_match'): (14.6, 23.0, 29.9),
    ('webquestions', 'exact_match'): (14.4, 25.3, 41.5),
    ('arithmetic_2d_plus', 'exact'): (76.9, 99.6, 100.0),
    ('arithmetic_2d_minus', 'exact'): (58.0, 86.4, 98.9),
    ('arithmetic_3d_plus', 'exact'): (34.2, 65.5, 80.4),
    ('arithmetic_3d_minus', 'exact'): (48.3, 78.7, 94.2),
    ('arithmetic_4d_plus', 'exact'): (4.0, 14.0, 25.5),
    ('arithmetic_4d_minus', 'exact'): (7.5, 14.0, 26.8),
    ('arithmetic_5d_plus', 'exact'): (0.7, 3.5, 9.3),
    ('arithmetic_5d_minus', 'exact'): (0.8, 3.8, 9.9),
    ('arithmetic_2d_times', 'exact'): (19.8, 27.4, 29.2),
    ('arithmetic_1dc', 'exact'): (9.8, 14.3, 21.3),
    ('cycled_letters', 'exact'): (3.66, 21.7, 37.9),
    ('anagrams_1', 'exact'): (2.28, 8.62, 15.1),
    ('anagrams_2', 'exact'): (8.91, 25.9, 39.7),
    ('random_insertion', 'exact'): (8.26, 45.4, 67.2),
    ('reversed_words', 'exact'): (0.09, 0.48, 0.44),
}
# (task, metric, K) -> all eight sizes.
_BY_SIZE: dict[tuple[str, str, int], tuple[float, ...]] = {
    ('lambada', 'accuracy', 0): (42.7, 54.3, 60.4, 63.6, 67.1, 70.3, 72.5, 76.2),
    ('hellaswag', 'accuracy', 0): (33.7, 43.6, 51.0, 54.7, 62.8, 67.4, 70.9, 78.9),
    ('hellaswag', 'accuracy', FEW): (33.5, 43.1, 51.3, 54.9, 62.9, 67.3, 71.3, 79.3),
    ('piqa', 'accuracy', FEW): (64.3, 69.4, 72.0, 74.3, 75.4, 77.8, 79.9, 82.3),
    ('arc_easy', 'accuracy', FEW): (42.7, 51.0, 58.1, 59.1, 62.1, 65.8, 69.1, 70.1),
}
# (task, metric) -> all four sizes, zero shots.
_GPT2_TABLE: dict[tuple[str, str], tuple[float, ...]] = {
    ('gpt2_lambada', 'last_token_perplexity'): (35.13, 15.60, 10.87, 8.63),
    ('gpt2_lambada', 'accuracy_stop_words'): (45.99, 55.48, 60.12, 63.24),
    ('cbt_cn', 'accuracy'): (87.65, 92.35, 93.45, 93.30),
    ('cbt_ne', 'accuracy'): (83.4, 87.1, 88.0, 89.05),
    ('wikitext2', 'word_perplexity'): (29.41, 22.76, 19.93, 18.34),
    ('ptb', 'word_perplexity'): (65.85, 47.33, 40.31, 35.76),
    ('enwik8', 'bits_per_byte'): (1.16, 1.01, 0.97, 0.93),
    ('text8', 'bits_per_character'): (1.17, 1.06, 1.02, 0.98),
    ('wikitext103', 'word_perplexity'): (37.50, 26.37, 22.05, 17.48),
    ('lm1b', 'word_perplexity'): (75.20, 55.72, 44.575, 42.16),
}
# (task, metric) -> the largest GPT-2.
_GPT2_LARGEST: dict[tuple[str, str], float] = {
    ('gpt2_lambada', 'accuracy_last_token'): 52.66,
    ('gpt2_winograd_partial', 'accuracy'): 70.70,
    ('gpt2_coqa', 'f1'): 55.0,
    ('gpt2_cnn_dailymail', 'rouge1'): 29.34,
    ('gpt2_cnn_dailymail', 'rouge2'): 8.27,
    ('gpt2_cnn_dailymail', 'rougeL'): 26.58,
    ('gpt2_cnn_dailymail_no_hint', 'rouge1'): 21.58,
    ('gpt2_cnn_dailymail_no_hint', 'rouge2'): 4.03,
    ('gpt2_cnn_dailymail_no_hint', 'rougeL'): 19.47,
    ('gpt2_wmt_en_fr', 'bleu'): 5.0,
    ('gpt2_wmt_fr_en', 'bleu'): 11.5,
    ('gpt2_natural_questions', 'exact_match'): 4.1,
}
PARAMETERS = {
    'GPT-3': dict(
        zip(
            _SIZES,
            (125.2e6, 355.9e6, 760.3e6, 1315.7e6, 2651.6e6, 6658.4e6, 12853.4e6, 174604.3e6),
            strict=True,
        )
    ),
    'GPT-2': dict(zip(_GPT2, (124439808, 354823168, 774030080, 1557611200), strict=True)),
}


def printed(task: str, metric: str, k: int, few: int) -> Mapping[str, float]:
    """Scores of the papers' models on a task: name of the model -> value; {} = none printed.

    Args:
      k: examples shown.
      few: the task's few-shot K, which the papers' few-shot scores are of.
    """
    found: dict[str, float] = {}
    kinds = [kind for kind, number in ((0, 0), (1, 1), (FEW, few)) if number == k]
    for kind in kinds[:1] if k == 0 else kinds[-1:]:
        by_size = _BY_SIZE.get((task, metric, kind))
        if by_size:
            found |= {f'GPT-3 {s}': v for s, v in zip(_SIZES, by_size, strict=True)}
        value = _GPT3.get((task, metric), (None,) * 3)[kind]
        if value is not None:
            found['GPT-3 175B'] = value
    if k in (0, few):
        if (task, metric) in _GPT2_TABLE:
            row = zip(_GPT2, _GPT2_TABLE[task, metric], strict=True)
            found |= {f'GPT-2 {s}': v for s, v in row}
        if (task, metric) in _GPT2_LARGEST:
            found['GPT-2 1542M'] = _GPT2_LARGEST[task, metric]
    return found
