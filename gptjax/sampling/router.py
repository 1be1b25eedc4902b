# SPDX-License-Identifier: Apache-2.0
"""Sends a request the way that it asks for: beams, drafts, a batch, or the engine.

The one place that decides, for the program, the Python call, evaluations and servers.
"""

import collections
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

from gptjax.configs import errors
from gptjax.runtime import peers, program
from gptjax.sampling import batch, beam, decode, engine, options, requests, speculative, texts
from gptjax.sampling import loaded as loaded_lib

_rounds = itertools.count()  # of decoding in this process: the same on all hosts
_AHEAD = 2  # texts a slot that are begun before the first of them is given out

Job = tuple[Sequence[int], options.Options]  # a prompt's ids, and what is asked of it


def _stops() -> bool:
    return peers.here().stops(next(_rounds), program.stop_requested())


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

    def __init__(self, loaded: loaded_lib.Loaded, draft: speculative.Draft | None = None) -> None:
        self._loaded, self._draft = loaded, draft

    def by_itself(self, asked: options.Options) -> bool:
        """Whether the engine cannot serve it among others."""
        return asked.by_itself or self._draft is not None

    def check(
        self, prompt: Sequence[int], asked: options.Options, config: engine.Config, streamed: bool
    ) -> None:
        """Raises InputError where each(), or streamed(), cannot answer a request."""
        decoder, stops = self._loaded.decoder, self._loaded.stops
        texts.check_stops(stops, asked.stop_strings)
        errors.require(
            not (streamed and self.by_itself(asked)),
            'a stream is for text, decoded without beams, echo, guidance and drafts',
        )
        if proposer := self._proposer(asked):
            speculative.check(decoder, proposer, prompt, asked)
        elif asked.by_itself:
            decode.check(decoder, prompt, asked)
        else:
            room = config.max_tokens or asked.limit(len(prompt))
            engine.check(decoder, prompt, asked, room)

    def texts(
        self, jobs: Sequence[Job], places: Sequence[int] | None = None
    ) -> list[list[decode.Text]]:
        """The texts of prompts, decoded together; they ask for the same beams and proposals.

        Args:
          places: the number of each prompt among all of one seed; it enters the draws, which depend
            on nothing else that is decoded. None = each has a seed of its own.

        Raises:
          InputError: as decode.check(), and speculative.check() where there are proposals.
        """
        loaded, first = self._loaded, jobs[0][1]
        proposer, places = self._proposer(first), places or [0] * len(jobs)
        if first.num_beams > 1:
            prompts, asked = zip(*jobs, strict=True)
            arguments = (loaded.decoder, loaded.params, prompts, asked, loaded.stops)
            return beam.search(*arguments, places)
        copies = [
            place * asked.num_return_sequences + copy
            for place, (_, asked) in zip(places, jobs, strict=True)
            for copy in range(asked.num_return_sequences)
        ]
        rows = [job for job in jobs for _ in range(job[1].num_return_sequences)]
        arguments = (loaded.decoder, loaded.params, *map(list, zip(*rows, strict=True)))
        if proposer is None:
            found = batch.generate(*arguments, copies, loaded.stops)
        else:
            found, _ = speculative.generate(*arguments, proposer, copies, loaded.stops)
        left = iter(found)
        return [[*itertools.islice(left, asked.num_return_sequences)] for _, asked in jobs]

    def each(self, jobs: Sequence[Job], config: engine.Config) -> Iterator[list[decode.Text]]:
        """The texts of every prompt, in order: side by side in an engine where it can serve them.

        Others are decoded when their turn comes, while the engine keeps what is behind them.

        Raises:
          program.Preempted: a signal came.
        """
        served = self._engine(jobs, config)
        left, ahead = collections.deque(jobs), 0
        waiting: collections.deque[tuple[Job, list[requests.Request]]] = collections.deque()
        while left or waiting:
            while left and ahead < _AHEAD * config.slots:
                prompt, asked = job = left.popleft()
                alone, copies = self.by_itself(asked), range(asked.num_return_sequences)
                begun = [] if alone else [served.submit(prompt, asked, copy=i) for i in copies]
                waiting.append((job, begun))
                ahead += len(copies)
            job, begun = waiting[0]
            if all(request.done for request in begun):
                waiting.popleft()
                ahead -= job[1].num_return_sequences
                done = [request.result() for request in begun]
                yield done if begun else self.texts([job])[0]
            else:
                served.step()
            if _stops():
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
                    if _stops() and not request.done:
                        raise program.Preempted
                found.append(request.result())
                stream.end()
            yield found
            if _stops():
                raise program.Preempted

    def _proposer(self, asked: options.Options) -> speculative.Draft | speculative.Lookup | None:
        """What proposes tokens of a request, if anything does."""
        errors.require(
            asked.num_beams == 1 or self._draft is None, 'a draft is for decoding without beams'
        )
        if asked.prompt_lookup_num_tokens:
            return speculative.Lookup(asked.prompt_lookup_num_tokens)
        return self._draft

    def _engine(self, jobs: Sequence[Job], config: engine.Config) -> engine.Engine:
        """An engine with as many slots, as long, as these jobs can use."""
        plain = [(prompt, asked) for prompt, asked in jobs if not self.by_itself(asked)]
        longest = max((asked.limit(len(prompt)) for prompt, asked in plain), default=1)
        copies = [asked.num_return_sequences for _, asked in plain] or [1]
        most_waiting = _AHEAD * config.slots + max(copies)
        config = dataclasses.replace(
            config,
            max_tokens=config.max_tokens or longest,
            slots=min(config.slots, sum(copies)),
        )
        loaded = self._loaded
        return engine.Engine(loaded.decoder, loaded.params, config, loaded.tokenizer, most_waiting)
