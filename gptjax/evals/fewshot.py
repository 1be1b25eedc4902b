# SPDX-License-Identifier: Apache-2.0
"""Tasks as a model is shown them: K examples, then the item itself (GPT-3, section 2.4)."""

import dataclasses
import difflib
import functools
import json
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from gptjax.configs import errors, lookup
from gptjax.data.labelled import sets

Record = dict[str, Any]


Kind = Literal['choice', 'cloze', 'generate', 'rolling']
PACKAGE = 'gptjax.evals.tasks'


class TooFew(errors.InputError):
    """There are fewer than K examples to show."""


@dataclasses.dataclass(frozen=True)
class Item:
    """One question as text.

    answers: of a choice all of them; of a cloze the one; of a generation those that are accepted.
    gold: which of a choice's answers are right. contexts: where the context varies with the answer
    and one continuation, answers[0], is scored behind each (partial evaluation). shown: the item as
    an example; '' = context, separator, right answer. passage: what it asks about, where an example
    shows all of it. together: items that are right only together. number: how much people said
    applies. word: that the answer must use. words, tokenised_lines: of a whole text, its units and
    the lines whose de-tokenisation does not invert.
    """

    context: str
    answers: tuple[str, ...] = ()
    gold: tuple[int, ...] = (0,)
    contexts: tuple[str, ...] = ()
    shown: str = ''
    passage: str = ''
    together: str = ''
    number: float = 0.0
    word: str = ''
    words: int = 0
    tokenised_lines: int = 0


@dataclasses.dataclass(frozen=True)
class Task:
    """How a set is turned into prompts, and how what the model says is judged."""

    set: str  # a key of data.labelled.sets.SETS; '' = made from a seed by `make`
    form: Callable[[Record, int], list[Item]]  # (record, K) -> items
    source: str  # paper, section, figure
    kind: Kind = 'choice'
    split: str = 'validation'
    shots_from: str = 'train'  # split; 'self' = the evaluated one
    k: int = 0  # the paper's K of few-shot
    metrics: tuple[str, ...] = ('accuracy',)  # the first is the task's own
    normalise: Literal['sum', 'token', 'answer_context'] = 'token'
    answer_context: str = ''  # what stands before an answer whose unconditional probability counts
    instruction: str = ''
    instruction_from: int = 0  # the least K it stands before
    delimiter: str = '\n\n'
    separator: str = ' '  # between context and answer
    stop: tuple[str, ...] = ('\n',)
    max_new_tokens: int = 32
    decode: dict[str, Any] = dataclasses.field(default_factory=dict)  # else beam 4, alpha 0.6
    make: Callable[[str, int], list[Record]] | None = None  # (split, seed) -> records
    notes: str = ''  # of the protocol: what is ours


def find(name: str) -> Task:
    """The task of a name. Raises UsageError where there is none; the message lists what exists."""
    known = every()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f'; did you mean {near[0]!r}?' if near else ''
        raise errors.UsageError(f'no task {name!r}{hint} There are: {", ".join(known)}')
    return known[name]


@functools.cache
def every() -> dict[str, Task]:
    """All tasks, by name."""
    found: dict[str, Task] = {}
    for name in lookup.names(PACKAGE):
        found |= lookup.module(PACKAGE, name).TASKS
    return dict(sorted(found.items()))


@dataclasses.dataclass(frozen=True)
class Prompt:
    """An item behind its examples, and which item of the set it is."""

    number: int
    head: str  # the instruction
    shots: tuple[str, ...]  # examples, each with the delimiter behind it
    item: Item

    def text(self, without: int = 0) -> str:
        """What stands before the item's own context, the first examples left out."""
        return self.head + ''.join(self.shots[without:])


@dataclasses.dataclass(frozen=True)
class Prompts:
    """What a task asks at some K, and where its examples came from."""

    prompts: list[Prompt]
    total: int  # items of the whole split
    shots: str  # of the protocol


def prompts(
    task: Task, k: int, seed: int, data_dir: str, limit: int = 0, download: bool = False
) -> Prompts:
    """The items of a task, each behind K examples of its own draw.

    Args:
      k: examples; drawn at random for each item, without it, from task.shots_from where that split
        is there, else from the evaluated split.
      seed: of the draws.
      limit: only so many items, drawn with seed 0; 0 = all.

    Raises:
      sets.Absent: the data is not at hand. TooFew: there are fewer than K examples.
    """
    records = read(task, task.split, data_dir, download)
    items = [item for record in records for item in _items(task, record, k)]
    chosen = range(len(items))
    if limit and limit < len(items):
        chosen = sorted(random.Random(0).sample(chosen, limit))
    pool, said = _pool(task, k, items, data_dir, download)
    head = task.instruction if k >= task.instruction_from else ''
    found = []
    for i in chosen:
        drawn = _draw(random.Random(f'{seed} {i}'), pool, k, items[i])
        shots = tuple(shown(task, shot) + task.delimiter for shot in drawn)
        found.append(Prompt(i, head, shots, items[i]))
    return Prompts(found, len(items), said)


def read(task: Task, split: str, data_dir: str, download: bool = False) -> list[Record]:
    """The records of a task's split; made ones have seed 0, whatever the seed of the draws."""
    if task.set:
        try:
            return sets.load(task.set, split, data_dir, download)
        except sets.Absent:
            if task.make is None:
                raise
    try:
        return task.make(split, 0)
    except errors.InputError as e:  # without the word list
        raise sets.Absent(str(e)) from e


def _items(task: Task, record: Record, k: int) -> list[Item]:
    """The items of a record. Raises InputError where its fields make none."""
    try:
        found = list(task.form(record, k))
        for item in found if task.kind == 'choice' else ():
            choices = range(len(item.contexts or item.answers))
            if not all(type(place) is int and place in choices for place in item.gold):
                raise ValueError(f'its answer {item.gold} is none of {len(choices)} choices')
    except errors.InputError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as e:
        raise errors.InputError(
            f'a record of {task.set} is damaged ({type(e).__name__}: {e}): '
            f'{json.dumps(record, default=str)[:200]}'
        ) from e
    return found


def _pool(
    task: Task, k: int, items: Sequence[Item], data_dir: str, download: bool
) -> tuple[list[Item], str]:
    """(items to draw examples from, what to say of it)."""
    if not k:
        return [], 'no examples'
    if task.shots_from not in ('self', task.split):
        try:
            records = read(task, task.shots_from, data_dir, download)
            pool = [i for record in records for i in _items(task, record, k) if i.gold]
            return pool, f'{k} examples drawn for each item from {task.shots_from}'
        except sets.Absent:
            pass
    why = '' if task.shots_from in ('self', task.split) else f' ({task.shots_from} is absent)'
    pool = [item for item in items if item.gold]
    return pool, f'{k} examples drawn for each item from {task.split} itself{why}'


def _draw(rng: random.Random, pool: Sequence[Item], k: int, asked: Item) -> list[Item]:
    """K different items, none of them the one that is asked; of each passage one.

    Raises:
      TooFew: there are fewer.
    """
    drawn: list[Item] = []
    passages = {asked.passage} if asked.shown else set()
    question = (asked.context or asked.answers, asked.contexts)
    for place in _places(rng, len(pool)) if k else ():
        shot = pool[place]
        same = (shot.context or shot.answers, shot.contexts) == question
        if same or (shot.shown and shot.passage in passages):
            continue
        if shot.shown:
            passages.add(shot.passage)
        drawn.append(shot)
        if len(drawn) == k:
            break
    if len(drawn) < k:
        raise TooFew(f'{len(drawn)} examples can be drawn, not {k}; lower K')
    return drawn


def _places(rng: random.Random, number: int) -> Iterator[int]:
    """0 .. number - 1 in random order, drawn as they are wanted."""
    seen: set[int] = set()
    while len(seen) < number:
        place = rng.randrange(number)
        if place not in seen:
            seen.add(place)
            yield place


def shown(task: Task, item: Item) -> str:
    """An item as an example, with its right answer."""
    if item.shown:
        return item.shown
    if item.contexts:
        return item.contexts[item.gold[0]] + task.separator + item.answers[0]
    return item.context + task.separator + item.answers[item.gold[0]]
