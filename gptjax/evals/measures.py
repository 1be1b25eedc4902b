# SPDX-License-Identifier: Apache-2.0
"""From what a model said of each item to a score with its standard error.

A row is what the items file keeps of an item. Shares are in percent, as the papers print them.
"""

import collections
import math
import re
import string
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from gptjax.configs import errors

Row = dict[str, Any]
_TIE = 1e-6  # relative: answers this close share the point
_RESAMPLES = 200  # of the bootstrap
_OF_TEXTS = 20  # of metrics that read all texts anew each time


class Measured(NamedTuple):
    value: float
    stderr: float  # nan where there is only one item
    n: int


def measure(metric: str, rows: Sequence[Row], normalise: str = 'sum') -> Measured:
    """A metric over rows.

    Args:
      metric: a name in PER_ITEM or OVERALL.
      normalise: of choices, how answers are compared: sum, token, answer_context.
    """
    if metric in OVERALL:
        found = OVERALL[metric](rows)
        return Measured(found, _bootstrapped(OVERALL[metric], rows), len(rows))
    values = per_item(metric, rows, normalise)
    return Measured(float(values.mean()), _stderr(values), len(values))


def check(metrics: Sequence[str]) -> None:
    """Raises InputError where a metric wants a library that is not installed."""
    for metric in metrics:
        if metric in ('bleu', 'chrf'):
            _needed('sacrebleu')
        elif metric.startswith('rouge'):
            _needed('rouge_score.rouge_scorer')
        elif metric == 'spearman':
            _needed('scipy.stats')


def per_item(metric: str, rows: Sequence[Row], normalise: str = 'sum') -> np.ndarray:
    """The values whose mean the metric is, one an item; of paired comparisons."""
    if metric == 'group_accuracy':
        groups = collections.defaultdict(list)
        for row in rows:
            groups[row['together']].append(credit(row, normalise) == 1)
        return np.array([100.0 * all(right) for right in groups.values()])
    if metric.startswith('rouge'):
        return np.array(_rouge(metric, rows))
    if metric == 'accuracy' and rows and 'log_probs' in rows[0]:
        return np.array([100 * credit(row, normalise) for row in rows])
    return np.array([PER_ITEM[metric](row) for row in rows], float)


def credit(row: Row, normalise: str) -> float:
    """1 where the right answer is the likeliest; of n that tie with it, 1 / n.

    Raises:
      KeyError: the row has no unconditional log-probs to normalise by.
    """
    scores = np.array(row['log_probs'], float)
    if normalise == 'token':
        scores = scores / np.maximum(row['tokens'], 1)
    elif normalise == 'answer_context':
        scores = scores - np.array(row['unconditional'], float)
    best = scores.max()
    tied = np.flatnonzero(scores >= best - _TIE * max(1.0, abs(best)))
    return sum(i in row['gold'] for i in tied) / len(tied)


def normalised(text: str) -> str:
    """SQuAD's: lower case, without punctuation, articles and spare white space."""
    text = ''.join(c for c in text.lower() if c not in string.punctuation)
    return ' '.join(re.sub(r'\b(a|an|the)\b', ' ', text).split())


def f1(text: str, answer: str) -> float:
    """Overlap of words, as in SQuAD."""
    said, right = normalised(text).split(), normalised(answer).split()
    if not said or not right:
        return float(said == right)
    common = sum((collections.Counter(said) & collections.Counter(right)).values())
    if not common:
        return 0.0
    precision, recall = common / len(said), common / len(right)
    return 2 * precision * recall / (precision + recall)


def paired(
    ours: np.ndarray, theirs: np.ndarray, seed: int = 0, resamples: int = 10_000
) -> tuple[float, float, float, float]:
    """Difference of means on the same items, by bootstrap (Koehn 2004).

    Returns:
      (difference, its 2.5 and 97.5 percentiles, two-sided p of no difference).
    """
    difference = np.asarray(ours, float) - np.asarray(theirs, float)
    rng = np.random.default_rng(seed)
    means = np.array(
        [
            difference[rng.integers(0, len(difference), len(difference))].mean()
            for _ in range(resamples)
        ]
    )
    low, high = np.percentile(means, (2.5, 97.5))
    p = 2 * min((means <= 0).mean(), (means >= 0).mean())
    return float(difference.mean()), float(low), float(high), float(min(1.0, p))


def _stderr(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def _bootstrapped(overall: Callable[[Sequence[Row]], float], rows: Sequence[Row]) -> float:
    if len(rows) < 2:
        return math.nan
    rng = np.random.default_rng(0)
    number = _OF_TEXTS if 'text' in rows[0] else _RESAMPLES
    draws = (rng.integers(0, len(rows), len(rows)) for _ in range(number))
    return float(np.std([overall([rows[i] for i in draw]) for draw in draws], ddof=1))


def _perplexity(log_prob: str, units: str | None) -> Callable[[Sequence[Row]], float]:
    """exp of nats a unit; units None = an item is one."""

    def overall(rows: Sequence[Row]) -> float:
        nats = -sum(row[log_prob] for row in rows)
        number = len(rows) if units is None else sum(row[units] for row in rows)
        return math.exp(min(nats / max(number, 1), 700.0))

    return overall


def _bits(units: str) -> Callable[[Sequence[Row]], float]:
    def overall(rows: Sequence[Row]) -> float:
        return -sum(row['log_prob'] for row in rows) / math.log(2) / sum(r[units] for r in rows)

    return overall


def _chosen(row: Row) -> int:
    return int(np.argmax(np.array(row['log_probs']) / np.maximum(row['tokens'], 1)))


def _macro_f1(rows: Sequence[Row]) -> float:
    return 100 * float(
        np.mean(
            [
                _f1_of([_chosen(r) == c for r in rows], [c in r['gold'] for r in rows])
                for c in {g for r in rows for g in r['gold']}
            ]
        )
    )


def _f1a(rows: Sequence[Row]) -> float:
    """F1 of 'this answer is right' over all answers of all questions (MultiRC)."""
    said = [int(np.argmax(row['log_probs'])) == 1 for row in rows]
    return 100 * _f1_of(said, [1 in row['gold'] for row in rows])


def _f1_of(said: Sequence[bool], right: Sequence[bool]) -> float:
    hits = sum(a and b for a, b in zip(said, right, strict=True))
    return 2 * hits / max(sum(said) + sum(right), 1)


def _spearman(rows: Sequence[Row]) -> float:
    """Spearman's rank correlation of log p(second answer) - log p(first) and the number, in %."""
    from scipy import stats

    said = [row['log_probs'][1] - row['log_probs'][0] for row in rows]
    found = stats.spearmanr(said, [row['number'] for row in rows]).statistic
    return 100 * float(found)


def _sacrebleu(name: str) -> Callable[[Sequence[Row]], float]:
    def overall(rows: Sequence[Row]) -> float:
        sacrebleu = _needed('sacrebleu')
        texts = [row['text'] for row in rows]
        return getattr(sacrebleu, name)(texts, [[row['answers'][0] for row in rows]]).score

    return overall


def _rouge(metric: str, rows: Sequence[Row]) -> list[float]:
    scorer = _needed('rouge_score.rouge_scorer').RougeScorer([metric], use_stemmer=True)
    found = []
    for row in rows:
        sentences = re.split(r'(?<=[.!?])\s+', row['text'].strip())[:3]
        score = scorer.score(row['answers'][0], ' '.join(sentences))[metric]
        found.append(100 * score.fmeasure)
    return found


def _needed(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise errors.InputError(f"{name} is needed: pip install 'gptjax[eval]'") from e


def _best(of: Callable[[str, str], float]) -> Callable[[Row], float]:
    return lambda row: 100 * max(of(row['text'], answer) for answer in row['answers'])


def _uses_word(row: Row) -> float:
    """The invented word, an ending allowed, within the sentence."""
    return 100.0 * bool(re.search(rf'\b{re.escape(row["word"])}', row['text'], re.IGNORECASE))


def _agrees(row: Row) -> float:
    """Whether saying the noun, or not, is what the label says (WSC)."""
    said = normalised(row['text']) == normalised(row['answers'][0])
    return 100.0 * (said == bool(row['gold']))


PER_ITEM: dict[str, Callable[[Row], float]] = {
    'accuracy': lambda row: 100.0 * row['greedy'],
    'accuracy_sum': lambda row: 100 * credit(row, 'sum'),
    'accuracy_token': lambda row: 100 * credit(row, 'token'),
    'accuracy_answer_context': lambda row: 100 * credit(row, 'answer_context'),
    'accuracy_last_token': lambda row: 100.0 * row['last_greedy'],
    'accuracy_stop_words': lambda row: 100.0 * row['filtered'],
    'exact_match': _best(lambda text, answer: float(normalised(text) == normalised(answer))),
    'f1': _best(f1),
    'exact': _best(lambda text, answer: float(text.strip() == answer)),
    'uses_word': _uses_word,
    'agreement': _agrees,
    'words': lambda row: float(len(row['text'].split())),
}
OVERALL: dict[str, Callable[[Sequence[Row]], float]] = {
    'perplexity': _perplexity('log_prob', None),
    'token_perplexity': _perplexity('log_prob', 'tokens'),
    'last_token_perplexity': _perplexity('last_log_prob', None),
    'word_perplexity': _perplexity('log_prob', 'words'),
    'bits_per_byte': _bits('bytes'),
    'bits_per_character': _bits('characters'),
    'macro_f1': _macro_f1,
    'f1a': _f1a,
    'spearman': _spearman,
    'bleu': _sacrebleu('corpus_bleu'),
    'chrf': _sacrebleu('corpus_chrf'),
}
