# SPDX-License-Identifier: Apache-2.0
"""A suite of tasks: every (task, K, seed) scored once, kept item by item, and summed up.

Items are kept as they are scored, so that a stopped suite goes on in the middle of a task.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from gptjax.configs import errors
from gptjax.data.labelled import sets
from gptjax.evals import answers, contamination, fewshot, measures, papers
from gptjax.evals import kept as kept_lib
from gptjax.sampling import loaded as loaded_lib
from gptjax.sampling import texts
from gptjax.storage import scratch

ITEMS = 'items'
_CHUNK = 512  # units asked at once
_log = logging.getLogger(__name__)
Row = dict[str, Any]


class Unscorable(errors.InputError):
    """One task cannot be scored with these weights or what is installed; others may."""


@dataclasses.dataclass(frozen=True)
class Config:
    """The suite section of configs/base.py."""

    tasks: tuple[str, ...]
    k: tuple[int, ...]
    seeds: tuple[int, ...]
    limit: int
    n_ctx: int
    stride: int
    batch_tokens: int
    batch_prompts: int
    clean_against: str
    beside: tuple[str, ...]
    keep_texts: bool
    download: bool

    def __post_init__(self) -> None:
        errors.require_between(self, 1, 2**30, 'batch_tokens')
        errors.require_between(self, 1, 2**16, 'batch_prompts')
        errors.require_between(self, 0, 2**60, 'limit', 'n_ctx', 'stride')
        errors.require(bool(self.k) and min(self.k) >= -1, f'suite.k = {self.k}: 0 and more, or -1')
        errors.require(
            bool(self.seeds) and 0 <= min(self.seeds) <= max(self.seeds) < 2**31,
            f'suite.seeds = {self.seeds} names no seed, or one that is not from 0 to 2**31 - 1',
        )
        for name in self.tasks:
            fewshot.find(name)


@dataclasses.dataclass(frozen=True)
class Job:
    """One task at one K with one draw of examples."""

    name: str
    task: fewshot.Task
    k: int
    seed: int

    @property
    def label(self) -> str:
        return f'{self.name}-{self.k}shot-seed{self.seed}'


def jobs(config: Config) -> list[Job]:
    """Every task at every K and seed; without examples there is one seed.

    What generates text comes last: the weights are laid out anew for it.
    """
    found: dict[str, Job] = {}
    for name in config.tasks:
        task = fewshot.find(name)
        for k in config.k:
            k = task.k if k == -1 else k
            k = 0 if task.kind == 'rolling' else k
            for seed in config.seeds if k else config.seeds[:1]:
                job = Job(name, task, k, seed)
                found.setdefault(job.label, job)
    return sorted(found.values(), key=lambda job: job.task.kind == 'generate')


def names(job: Job) -> list[str]:
    """How the scores of a job are called in the log of a run, as eval/copa/0shot/accuracy."""
    return [f'eval/{job.name}/{job.k}shot/{metric}' for metric in _metrics(job.task)]


def respondent(config: Config, loaded: loaded_lib.Loaded, multiple: int) -> answers.Respondent:
    """A model as a suite asks it.

    Args:
      multiple: of rows in a batch; the mesh's data x fsdp.

    Raises:
      UsageError: suite.n_ctx is beyond what the model can read. InputError: no tokenizer.
    """
    if loaded.tokenizer is None:
        raise errors.InputError('these weights have no tokenizer; tasks are text')
    most = loaded.decoder.most_tokens
    errors.require(
        most is None or config.n_ctx <= most,
        f"suite.n_ctx = {config.n_ctx} is beyond the model's n_ctx = {most}",
    )
    return answers.Respondent(
        loaded,
        config.batch_tokens,
        multiple,
        config.n_ctx or most or 0,
        config.stride,
        config.batch_prompts,
    )


def absent(config: Config, data_dir: str) -> dict[str, str]:
    """Tasks whose data is not at hand -> why: to know before the weights are read.

    Raises:
      InputError: the data of one is damaged.
    """
    found = {}
    for name in config.tasks:
        task = fewshot.find(name)
        try:
            fewshot.read(task, task.split, data_dir, config.download)
        except sets.Absent as e:
            found[name] = str(e)
    return found


def load(
    job: Job, respondent: answers.Respondent, config: Config, data_dir: str
) -> fewshot.Prompts:
    """What a job asks.

    Args:
      data_dir: folder of local task files; '' = none.

    Raises:
      sets.Absent: the data is not at hand. Unscorable: these weights, or what is installed, cannot
        do it. InputError: the data is damaged.
    """
    _check(job, respondent)
    try:
        return fewshot.prompts(job.task, job.k, job.seed, data_dir, config.limit, config.download)
    except fewshot.TooFew as e:
        raise Unscorable(str(e)) from e


def run(
    job: Job,
    asked: fewshot.Prompts,
    respondent: answers.Respondent,
    config: Config,
    kept: pathlib.Path | None,
    identity: Row,
    progress: Callable[[int], None] = lambda items: None,
    begun: Callable[[int, int], None] = lambda total, done: None,
    overlaps: contamination.Overlaps | None = None,
) -> list[Row]:
    """The results of a job: a row a metric.

    Args:
      asked: of load().
      kept: folder where items are kept; None = nowhere, as during training.
      identity: what the items depend on beside the job: weights and their form.
      progress: is told the items scored. begun: is told how many there are, and are done already.
      overlaps: of these items with a corpus, to score those without any as well.

    Raises:
      InputError: kept items are of other weights or settings.
    """
    header = identity | {
        'task': job.name,
        'k': job.k,
        'seed': job.seed,
        'limit': config.limit,
        'n_ctx': respondent.n_ctx,
        'stride': config.stride,
        'prompts': digest(asked.prompts),
    }
    units = respondent.units(job.task, asked.prompts)
    also = kept_lib.with_texts(job.task, asked.prompts) if config.keep_texts else dict
    with kept_lib.Items(kept and kept / f'{job.label}.jsonl', header, also) as items:
        done = {row['i'] for row in items.rows}
        begun(len(units), len(done))
        left = [unit for unit in units if unit.number not in done]
        for start in range(0, len(left), _CHUNK):
            for rows in respondent.rows(job.task, left[start : start + _CHUNK], job.seed):
                items.add(rows)
                progress(len(rows))
        rows = sorted(items.rows, key=lambda row: row['i'])
    clean = None
    if overlaps:
        dirty = overlaps.dirty(texts_of(asked))
        numbers = {p.number for p, one in zip(asked.prompts, dirty, strict=True) if not one}
        clean = [row for row in rows if row.get('of', row['i']) in numbers]
    return _results(job, rows, clean, asked, respondent)


def texts_of(asked: fewshot.Prompts) -> list[str]:
    """What of each item is looked for in a corpus."""
    return [contamination.text_of(prompt.item) for prompt in asked.prompts]


def _check(job: Job, respondent: answers.Respondent) -> None:
    """Raises Unscorable where it can be told before anything is scored."""
    task = job.task
    try:
        measures.check(task.metrics)
        if task.kind == 'rolling':
            texts.prompt_ids(respondent.tokenizer, '')
    except errors.InputError as e:
        raise Unscorable(str(e)) from e
    if task.kind == 'generate' and 0 < respondent.n_ctx <= task.max_new_tokens:
        raise Unscorable(f'{task.max_new_tokens} new tokens do not fit n_ctx = {respondent.n_ctx}')


def _metrics(task: fewshot.Task) -> list[str]:
    """A task's own metrics, and the other ways to normalise its choices."""
    if task.kind != 'choice' or 'accuracy' not in task.metrics:
        return list(task.metrics)
    ways = ('sum', 'token', *(('answer_context',) if task.answer_context else ()))
    return [*task.metrics, *(f'accuracy_{way}' for way in ways)]


def _results(
    job: Job,
    rows: list[Row],
    clean: list[Row] | None,
    asked: fewshot.Prompts,
    respondent: answers.Respondent,
) -> list[Row]:
    """Rows of results.jsonl."""
    task, metrics = job.task, _metrics(job.task)
    common = {
        'task': job.name,
        'k': job.k,
        'seed': job.seed,
        'items': asked.total,
        'protocol': protocol(job, asked.shots, respondent),
        **{
            f'n_{name}': sum(bool(row.get(name)) for row in rows)
            for name in ('straddles', 'truncated', 'dropped')
            if task.kind != 'rolling'
        },
    }
    if task.kind == 'rolling':
        common['n_tokenised_lines'] = sum(p.item.tokenised_lines for p in asked.prompts)
    found = []
    for metric in metrics:
        one = measures.measure(metric, rows, task.normalise)
        row = common | {
            'metric': metric,
            'value': _number(one.value),
            'stderr': _number(one.stderr),
            'n': one.n,
        }
        row['paper'] = dict(papers.printed(job.name, metric, job.k, task.k))
        if clean is not None:
            row['n_clean'] = len(clean)
            row['clean'] = _number(
                measures.measure(metric, clean, task.normalise).value if clean else math.nan
            )
        found.append(row)
    return found


def protocol(job: Job, shots: str, respondent: answers.Respondent) -> str:
    """How a score came about, in one line."""
    task = job.task
    said = [task.source, f'{job.k}-shot: {shots}', f'{task.split} split']
    if task.kind == 'choice':
        ways = {
            'sum': 'log-likelihoods summed',
            'token': 'log-likelihoods a token',
            'answer_context': f'log p(answer | context) - log p(answer | {task.answer_context!r})',
        }
        said += [ways[task.normalise], 'ties share the point']
    if task.kind == 'generate':
        how = answers.FREE_FORM | task.decode
        if how['num_beams'] == 1:
            del how['length_penalty']
        said.append(
            ', '.join(f'{k} {v}' for k, v in how.items())
            + f', at most {task.max_new_tokens} new tokens'
        )
    if task.kind == 'rolling':
        n_ctx = respondent.n_ctx or answers.WINDOW
        stride = respondent.stride or n_ctx
        said.append(
            f'windows of {n_ctx} tokens, stride {stride}; the first token is '
            'conditioned on end-of-text (else the prefix)'
        )
    said.append(task.notes)
    return '; '.join(filter(None, said))


def over_seeds(rows: Sequence[Row]) -> list[Row]:
    """One row for every task, K and metric: the mean over seeds, where there are several.

    The standard error is of the items, as if the seeds had the same; seed_std says what the draw
    of examples makes. A number that one of the seeds has not is None.
    """
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row['task'], row['k'], row['metric']), []).append(row)
    found = []
    for some in groups.values():
        if len(some) == 1:
            found.append(some[0])
            continue
        numbers = [name for name in ('value', 'stderr', 'clean') if name in some[0]]
        found.append(
            some[0]
            | {name: _over(np.mean, some, name) for name in numbers}
            | {
                'seed': [row['seed'] for row in some],
                'seed_std': _over(functools.partial(np.std, ddof=1), some, 'value'),
            }
        )
    return found


def _over(how: Callable[..., Any], rows: Sequence[Row], name: str) -> float | None:
    values = [row[name] for row in rows]
    return None if None in values else float(how(values))


def compared(ours: pathlib.Path, theirs: pathlib.Path, tasks: Sequence[Job]) -> Iterator[Row]:
    """Paired bootstrap of the jobs that two workdirs both have, on the items both scored."""
    for job in tasks:
        paths = [folder / ITEMS / f'{job.label}.jsonl' for folder in (ours, theirs)]
        if not all(path.exists() for path in paths):
            continue
        found = [kept_lib.read(path) for path in paths]
        if found[0][0].get('prompts') != found[1][0].get('prompts'):
            _log.warning('%s is not compared: %s was asked other items or examples', *paths)
            continue
        both = [{row['i']: row for row in rows} for _, rows in found]
        same = sorted(both[0].keys() & both[1].keys())
        metric = job.task.metrics[0]
        if metric in measures.OVERALL or metric == 'group_accuracy' or len(same) < 2:
            continue
        values = [
            measures.per_item(metric, [rows[i] for i in same], job.task.normalise) for rows in both
        ]
        difference, low, high, p = measures.paired(*values)
        yield {
            'task': job.name,
            'k': job.k,
            'seed': job.seed,
            'metric': metric,
            'n': len(same),
            'difference': difference,
            'low': low,
            'high': high,
            'p': p,
            'beside': scratch.told(str(theirs)),
        }


def digest(prompts: Sequence[fewshot.Prompt]) -> str:
    """Equal where the same is asked."""
    hashed = hashlib.sha256()
    for prompt in prompts:
        item = prompt.item  # a field added later changes nothing while it has its default
        values = ((field, getattr(item, field.name)) for field in dataclasses.fields(item))
        said = {field.name: value for field, value in values if value != field.default}
        hashed.update(json.dumps([prompt.number, prompt.text(), said], sort_keys=True).encode())
    return hashed.hexdigest()[:16]


def _number(value: float) -> float | None:
    """JSON has no nan."""
    return None if math.isnan(value) else value
