# SPDX-License-Identifier: Apache-2.0
"""Sends a request the way that it asks for: beams, drafts, a batch, or the engine.

The one place that decides, for the program, the Python call, evaluations and servers.
"""

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal, Protocol, runtime_checkable

from gptjax.configs import errors
from gptjax.runtime import program
from gptjax.sampling import batch, beam, decode, engine, options, requests, speculative
from gptjax.sampling import loaded as loaded_lib

Way = Literal['beams', 'lookup', 'draft', 'plain']
Job = tuple[Sequence[int], options.Options]  # a prompt's ids, and what is asked of it


@runtime_checkable
class Stream(Protocol):
    """Who is told of texts as they come, one after another."""

    def begin(self) -> None:
        """A text begins: the next one of the same prompt, or the first of the next."""

    def text(self, piece: str, tokens: list[int]) -> None:
        """More of it, with its new tokens."""

    def end(self) -> None:
        """It is whole."""


class Router:
    """Texts of a model, and of a draft where there is one."""

    def __init__(
        self,
        loaded: loaded_lib.Loaded,
        draft: speculative.Draft | None = None,
        draft_tokens: int = 0,
    ) -> None:
        """Args: draft_tokens: that the draft proposes at a time."""
        self._loaded, self._draft, self._draft_tokens = loaded, draft, draft_tokens

    def way(self, asked: options.Options) -> Way:
        """How a request is decoded.

        Raises:
          UsageError: beams are asked for, and there is a draft.
        """
        if asked.num_beams > 1:
            errors.require(self._draft is None, 'a draft is for decoding without beams')
            return 'beams'
        if asked.prompt_lookup_num_tokens:
            return 'lookup'
        return 'plain' if self._draft is None else 'draft'

    def by_itself(self, asked: options.Options) -> bool:
        """Whether the engine cannot serve it among others."""
        return self.way(asked) != 'plain' or asked.echo

    def check(self, prompt: Sequence[int], asked: options.Options, streamed: bool) -> None:
        """Raises InputError where a request cannot be answered, or not as a stream."""
        decode.check(self._loaded.decoder, prompt, asked)
        errors.require(
            not (streamed and self.by_itself(asked)),
            'a stream is for text, decoded without beams, echo and drafts',
        )

    def texts(
        self, prompts: Sequence[Sequence[int]], asked: options.Options, places: Sequence[int]
    ) -> list[list[decode.Text]]:
        """The texts of prompts that ask for the same, decoded together.

        Args:
          places: the number of each prompt among all there are; it enters the draws, so that these
            do not depend on which prompts are decoded together.

        Raises:
          InputError: as decode.check(), and speculative.generate() where there are proposals.
        """
        loaded, way, n = self._loaded, self.way(asked), asked.num_return_sequences
        if way == 'beams':
            each = [asked] * len(prompts)
            arguments = (loaded.decoder, loaded.params, prompts, each, loaded.stops)
            return beam.search(*arguments, list(places))
        rows = [prompt for prompt in prompts for _ in range(n)]
        copies = [place * n + copy for place in places for copy in range(n)]
        arguments = (loaded.decoder, loaded.params, rows, [asked] * len(rows))
        if way == 'plain':
            found = batch.generate(*arguments, copies, loaded.stops)
        else:
            number = asked.prompt_lookup_num_tokens or self._draft_tokens
            draft = self._draft if way == 'draft' else None
            found, _ = speculative.generate(*arguments, draft, number, copies, loaded.stops)
        return [found[i : i + n] for i in range(0, len(found), n)]

    def each(self, jobs: Sequence[Job], config: engine.Config) -> Iterator[list[decode.Text]]:
        """The texts of every prompt, in order: side by side in an engine where it can serve them.

        Raises:
          program.Preempted: a signal came.
        """
        served = self._engine(jobs, config)
        left = collections.deque(jobs)
        waiting: collections.deque[list[_Begun]] = collections.deque()
        while left or waiting:
            while left and len(waiting) < 2 * config.slots:
                waiting.append(self._begin(served, *left.popleft()))
            served.step()
            while waiting and _done(waiting[0]):
                yield _texts(waiting.popleft())
            if program.stop_requested():
                raise program.Preempted

    def streamed(
        self, jobs: Sequence[Job], config: engine.Config, stream: Stream
    ) -> Iterator[list[decode.Text]]:
        """The same, one text after another, told as it comes.

        Raises:
          program.Preempted: a signal came.
        """
        served = self._engine(jobs, dataclasses.replace(config, slots=1))
        for prompt, asked in jobs:
            found = []
            for copy in range(asked.num_return_sequences):
                stream.begin()
                request = served.submit(prompt, asked, copy=copy, on_text=stream.text)
                while not request.done:
                    served.step()
                    if program.stop_requested() and not request.done:
                        raise program.Preempted
                found.append(request.result())
                stream.end()
            yield found

    def _begin(
        self, served: engine.Engine, prompt: Sequence[int], asked: options.Options
    ) -> list['_Begun']:
        """A job's texts: in the engine, or made now where that cannot serve it."""
        if self.by_itself(asked):
            return self.texts([prompt], asked, [0])[0]
        copies = range(asked.num_return_sequences)
        return [served.submit(prompt, asked, copy=copy) for copy in copies]

    def _engine(self, jobs: Sequence[Job], config: engine.Config) -> engine.Engine:
        """An engine with as many slots, as long, as these jobs can use."""
        plain = [(prompt, asked) for prompt, asked in jobs if not self.by_itself(asked)]
        longest = max((asked.limit(len(prompt)) for prompt, asked in plain), default=1)
        number = sum(asked.num_return_sequences for _, asked in plain)
        config = dataclasses.replace(
            config,
            max_tokens=config.max_tokens or longest,
            slots=max(1, min(config.slots, number)),
        )
        loaded = self._loaded
        return engine.Engine(loaded.decoder, loaded.params, config, loaded.tokenizer)


_Begun = requests.Request | decode.Text


def _done(begun: list[_Begun]) -> bool:
    return all(isinstance(one, decode.Text) or one.done for one in begun)


def _texts(begun: list[_Begun]) -> list[decode.Text]:
    return [one if isinstance(one, decode.Text) else one.result() for one in begun]
