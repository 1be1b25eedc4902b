# SPDX-License-Identifier: Apache-2.0
"""What a model says of a task's prompts: one row an item, as soon as it is known."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from gptjax.configs import base
from gptjax.evals import fewshot
from gptjax.evals.tasks import cloze
from gptjax.sampling import decode, options, router, score, texts
from gptjax.sampling import loaded as loaded_lib

Row = dict[str, Any]
WINDOW = 2048  # tokens of windows, of models that can read any number
FREE_FORM = {'num_beams': 4, 'length_penalty': 0.6}  # GPT-3, section 2.4
_PLAIN = {'do_sample': False, 'temperature': 1.0}  # whatever people's defaults are


@dataclasses.dataclass(frozen=True)
class Window:
    """A part of a whole text that is scored at once."""

    number: int
    of: int  # the text's prompt
    item: fewshot.Item
    query: score.Query
    share: float  # of the text's tokens, so of its words and bytes

    def row(self) -> Row:
        """What its row says whatever the model."""
        text = self.item.context
        units = {
            'words': self.item.words,
            'bytes': len(text.encode('utf-8')),
            'characters': len(text),
        }
        return {
            'i': self.number,
            'of': self.of,
            'tokens': len(self.query.target),
            **{name: number * self.share for name, number in units.items()},
        }


@dataclasses.dataclass(frozen=True)
class Respondent:
    """A model ready to be asked.

    batch_tokens: scored at a time. multiple: of rows, in a batch. n_ctx: the most tokens of a
    prompt and its answer; 0 = no limit. stride: of rolling windows, 0 = without overlap.
    batch_prompts: texts generated side by side.
    """

    loaded: loaded_lib.Loaded
    batch_tokens: int
    multiple: int
    n_ctx: int
    stride: int
    batch_prompts: int

    @property
    def tokenizer(self) -> Any:
        return self.loaded.tokenizer

    def scorer(self, banned: frozenset[int] = frozenset()) -> score.Scorer:
        decoder, params = self.loaded.decoder, self.loaded.params
        return score.Scorer(decoder, params, self.batch_tokens, self.multiple, banned, self.n_ctx)

    @functools.cached_property
    def _length(self) -> Callable[[str], int]:
        return functools.lru_cache(65536)(lambda text: len(self.tokenizer.encode(text)))

    def units(
        self, task: fewshot.Task, prompts: Sequence[fewshot.Prompt]
    ) -> Sequence[fewshot.Prompt] | Sequence[Window]:
        """What is asked one by one: prompts; of whole texts their windows.

        The first token of a text is conditioned on end-of-text, else on the tokenizer's prefix.
        """
        if task.kind != 'rolling':
            return prompts
        first = texts.prompt_ids(self.tokenizer, '')[-1:]
        found: list[Window] = []
        for prompt in prompts:
            ids = self.tokenizer.encode(prompt.item.context)
            for query in score.windows((*first, *ids), self.n_ctx or WINDOW, self.stride):
                share = len(query.target) / len(ids)
                found.append(Window(len(found), prompt.number, prompt.item, query, share))
        return found

    def rows(
        self,
        task: fewshot.Task,
        units: Sequence[fewshot.Prompt] | Sequence[Window],
        seed: int,
    ) -> Iterator[list[Row]]:
        """Rows of what units() gave, in an order that suits the model; 'i' is the unit's number.

        What is drawn is f(seed, item): neither the batch nor a resume changes it.

        A row has what evals.measures reads, and of how it came about: 'dropped' (examples that did
        not fit), 'truncated' (the context lost its beginning), 'straddles' (a token has characters
        of context and answer).
        """
        if task.kind == 'generate':
            yield from self._texts(task, units, seed)
            return
        ask = {'choice': self._choices, 'cloze': self._clozes, 'rolling': self._rolling}
        yield from ask[task.kind](task, units)

    def _pair(self, prompt: fewshot.Prompt, context: str, target: str) -> tuple[texts.Pair, int]:
        """Tokens of a context behind its examples; the first examples go where all do not fit."""
        dropped = 0
        if self.n_ctx and prompt.shots:
            rest = self._length(prompt.head) + self._length(context) + self._length(target) + 2
            sizes = [self._length(shot) for shot in prompt.shots]
            while dropped < len(sizes) and rest + sum(sizes[dropped:]) > self.n_ctx:
                dropped += 1
        pair = texts.pair(self.tokenizer, prompt.text(dropped) + context, target)
        return pair, dropped

    def _scored(
        self, asked: Sequence[Sequence[score.Query]], scorer: score.Scorer | None = None
    ) -> Iterator[list[tuple[int, list[score.Score]]]]:
        """(item, its scores) once all of its queries are scored."""
        flat = [(item, j) for item, some in enumerate(asked) for j in range(len(some))]
        found: list[list[Any]] = [[None] * len(some) for some in asked]
        left = [len(some) for some in asked]
        queries = [query for some in asked for query in some]
        for batch in (scorer or self.scorer()).score(queries):
            done = []
            for number, one in batch:
                item, j = flat[number]
                found[item][j] = one
                left[item] -= 1
                if not left[item]:
                    done.append((item, found[item]))
            yield done

    def _choices(
        self, task: fewshot.Task, prompts: Sequence[fewshot.Prompt]
    ) -> Iterator[list[Row]]:
        asked, notes = [], []
        for prompt in prompts:
            item = prompt.item
            contexts = item.contexts or (item.context,) * len(item.answers)
            answers = item.answers * len(contexts) if item.contexts else item.answers
            pairs = [
                self._pair(prompt, context, task.separator + answer)
                for context, answer in zip(contexts, answers, strict=True)
            ]
            queries = [score.Query(tuple(p.context), tuple(p.target)) for p, _ in pairs]
            if task.answer_context:
                alone = (
                    texts.pair(self.tokenizer, task.answer_context, task.separator + answer)
                    for answer in answers
                )
                queries += [score.Query(tuple(p.context), tuple(p.target)) for p in alone]
            asked.append(queries)
            notes.append(_notes(pairs))
        for done in self._scored(asked):
            rows = []
            for i, scores in done:
                n = len(scores) // 2 if task.answer_context else len(scores)
                row = {
                    'i': prompts[i].number,
                    'gold': list(prompts[i].item.gold),
                    'log_probs': [one.log_prob for one in scores[:n]],
                    'tokens': [one.tokens for one in scores[:n]],
                    'together': prompts[i].item.together,
                    'number': prompts[i].item.number,
                    **notes[i],
                    'truncated': any(one.truncated for one in scores[:n]),
                }
                if task.answer_context:
                    row['unconditional'] = [one.log_prob for one in scores[n:]]
                rows.append(row)
            yield rows

    def _clozes(self, task: fewshot.Task, prompts: Sequence[fewshot.Prompt]) -> Iterator[list[Row]]:
        """The whole word; its last token by itself and with stop words forbidden, where asked."""
        pairs = [self._pair(p, p.item.context, task.separator + p.item.answers[0]) for p in prompts]
        by_token = any('last_token' in m or 'stop_words' in m for m in task.metrics)
        asked, last = [], []
        for pair, _ in pairs:
            context, target = tuple(pair.context), tuple(pair.target)
            last.append(score.Query((*context, *target[:-1]), target[-1:]))
            asked.append([score.Query(context, target), *([last[-1]] if by_token else [])])
        filtering = None
        if 'accuracy_stop_words' in task.metrics:
            filtering = self.scorer(self._stop_words)
        for done in self._scored(asked):
            rows = []
            for i, scores in done:
                row = {
                    'i': prompts[i].number,
                    'log_prob': scores[0].log_prob,
                    'tokens': scores[0].tokens,
                    'greedy': scores[0].greedy,
                    **_notes([pairs[i]]),
                    'truncated': scores[0].truncated,
                }
                if by_token:
                    row |= {'last_log_prob': scores[1].log_prob, 'last_greedy': scores[1].greedy}
                rows.append(row)
            if filtering is not None and done:
                found = filtering.scores([last[i] for i, _ in done])
                for row, (i, _), one in zip(rows, done, found, strict=True):
                    stopped = prompts[i].item.answers[0].lower() in cloze.STOP_WORDS
                    row['filtered'] = one.greedy and not stopped
            yield rows

    @functools.cached_property
    def _stop_words(self) -> frozenset[int]:
        """Tokens that are a stop word behind a space."""
        words = (f' {word}' for word in cloze.STOP_WORDS)
        cased = (form for word in words for form in (word, word.title()))
        found = (self.tokenizer.encode(f'x{word}')[1:] for word in cased)
        return frozenset(ids[0] for ids in found if len(ids) == 1)

    def _rolling(self, task: fewshot.Task, windows: Sequence[Window]) -> Iterator[list[Row]]:
        del task
        for done in self._scored([[window.query] for window in windows]):
            yield [windows[i].row() | {'log_prob': scores[0].log_prob} for i, scores in done]

    def _texts(
        self, task: fewshot.Task, prompts: Sequence[fewshot.Prompt], seed: int
    ) -> Iterator[list[Row]]:
        """Free-form answers: beams of four unless the task says otherwise."""
        settings = (
            FREE_FORM
            | task.decode
            | {
                'max_new_tokens': task.max_new_tokens,
                'stop_strings': task.stop,
                'eos_token_id': self.loaded.defaults.get('eos_token_id', ()),
            }
        )
        asked = options.make(base.get_config().decode.to_dict() | _PLAIN, settings | {'seed': seed})
        ready = []
        for prompt in prompts:
            pair, dropped = self._pair(prompt, prompt.item.context + task.separator.rstrip(' '), '')
            ids, most = pair.context, self.n_ctx and self.n_ctx - task.max_new_tokens
            cut = bool(self.n_ctx) and len(ids) > most
            while cut and dropped < len(prompt.shots):
                dropped += 1
                whole = prompt.text(dropped) + prompt.item.context + task.separator.rstrip(' ')
                ids = texts.prompt_ids(self.tokenizer, whole)
                cut = len(ids) > most
            ready.append((ids[-most:] if cut else ids, dropped, cut))
        self.loaded.prepare()
        sender = router.Router(self.loaded)
        order = sorted(range(len(prompts)), key=lambda i: -len(ready[i][0]))
        for start in range(0, len(order), self.batch_prompts):
            some = order[start : start + self.batch_prompts]
            places = [prompts[i].number for i in some]
            found = sender.texts([(ready[i][0], asked) for i in some], places)
            yield [
                {
                    'i': prompts[i].number,
                    'text': self._text(ready[i][0], said[0], task.stop),
                    'answers': list(prompts[i].item.answers),
                    'word': prompts[i].item.word,
                    'gold': list(prompts[i].item.gold),
                    'dropped': ready[i][1],
                    'truncated': ready[i][2],
                    'straddles': False,
                }
                for i, said in zip(some, found, strict=True)
            ]

    def _text(self, before: Sequence[int], said: decode.Text, stop: tuple[str, ...]) -> str:
        return texts.before_stop(self.tokenizer, before, said.tokens, stop).strip()


def _notes(pairs: Sequence[tuple[texts.Pair, int]]) -> Row:
    return {
        'dropped': max(dropped for _, dropped in pairs),
        'straddles': any(pair.straddles for pair, _ in pairs),
    }
