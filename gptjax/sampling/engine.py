# SPDX-License-Identifier: Apache-2.0
"""Continuous batching: requests come and go while others decode, in a fixed number of slots.

Memory is bounded: the cache of all slots is made at the start, and submit() refuses what does not
fit a slot or a full queue. A prompt is read in chunks, between decoding steps of the others
(Agrawal et al. 2023, chunked prefill). What a slot still holds of an earlier text is not read again
where a prompt begins alike. Clients are served in turn, each one's requests in order.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.configs import errors
from gptjax.models import quantize
from gptjax.runtime import mesh as mesh_lib
from gptjax.sampling import decode, options, processors, requests, texts
from gptjax.text import tokenizer as tokenizer_lib

_WORTH = 16  # tokens of a common beginning that are worth copying from another slot


@dataclasses.dataclass(frozen=True)
class Config:
    """The engine section of configs/base.py."""

    slots: int
    max_tokens: int
    chunk_tokens: int
    steps: int
    weights: quantize.Weights
    dtype: str
    cache_dtype: str
    draft: str
    draft_tokens: int

    def __post_init__(self) -> None:
        errors.require_between(self, 1, 2**16, 'slots')
        errors.require_between(self, 1, 2**30, 'chunk_tokens', 'steps')
        errors.require_between(self, 0, 2**30, 'max_tokens')
        errors.require_between(self, 1, 1024, 'draft_tokens')
        errors.require_choice(self, 'weights', quantize.WEIGHTS)
        errors.require_choice(self, 'dtype', ('', 'float32', 'bfloat16', 'float16'))
        errors.require_choice(self, 'cache_dtype', ('', 'int8'))


@dataclasses.dataclass
class _Slot:
    """A place in the batch: its request, and which tokens its cache holds."""

    request: requests.Request | None = None
    held: list[int] = dataclasses.field(default_factory=list)  # at positions 0, 1, ...
    to_read: list[int] = dataclasses.field(default_factory=list)
    offset: int = 0  # of position 0 in prompt and text
    used: int = 0  # when it was given away last


class Engine:
    """Decodes requests side by side; step() is one round, run() goes on until nothing is left.

    submit() and cancel() may be called from any thread; step() and run() from one at a time.
    """

    def __init__(
        self,
        decoder: decode.Decoder,
        params: Any,
        config: Config,
        tokenizer: tokenizer_lib.Tokenizer | None = None,
        max_waiting: int = 1024,
    ) -> None:
        """Makes the cache of all slots.

        Args:
          tokenizer: for stop strings, and the text given to callbacks.
          max_waiting: requests that may wait for a slot.
        """
        self.decoder, self.params = decoder, params
        self._config, self._tokenizer = config, tokenizer
        self._stops = texts.Stops(tokenizer) if tokenizer else None
        most = decoder.most_tokens
        self.max_tokens = config.max_tokens or most or 4096  # of prompt and text together
        room = decode.width(self.max_tokens)
        self._context = room if most is None else min(room, most)
        self._slots = [_Slot() for _ in range(config.slots)]
        self._queue = requests.Queue(max_waiting)
        self._n_top, self._sizes, self._clock = 0, (0, 0, 0, 0), 0
        self._state = decode.empty(decoder, config.slots, room, self._context, 0)
        self._settings: list[options.Options | None] = [None] * config.slots
        self._rows: decode.Rows | None = None
        self._chunks = sorted({min(32, config.chunk_tokens), config.chunk_tokens})

    def submit(
        self,
        prompt: Sequence[int],
        asked: options.Options,
        *,
        copy: int = 0,
        client: str = '',
        on_text: Callable[[str, list[int]], None] | None = None,
    ) -> requests.Request:
        """Queues a request.

        Args:
          prompt: token ids.
          asked: options without beams; num_return_sequences is not looked at.
          copy: which of several texts of the same request this is; it enters the draws.
          client: whom it is for; clients take turns.
          on_text: is given every piece of text, with its tokens, as soon as it is certain.

        Raises:
          InputError: as check(), or there are stop strings and no tokenizer.
          requests.QueueFull: too many are waiting.
        """
        check(self.decoder, prompt, asked, self.max_tokens)
        texts.check_stops(self._stops, asked.stop_strings)
        stream = None
        if on_text is not None and self._tokenizer is not None:
            stream = texts.Stream(self._tokenizer, prompt, asked.stop_strings)
        request = requests.Request(prompt, asked, copy, client, on_text, stream)
        self._queue.push(request)
        return request

    def load(self, params: Any) -> None:
        """Goes on with other weights of the same model; what slots hold of the old is forgotten.

        Raises:
          InputError: requests are being decoded, or wait.
        """
        if self.busy:
            raise errors.InputError('an engine takes other weights only when it is done; run() it')
        self.params = params
        for slot in self._slots:
            slot.held = []

    @property
    def busy(self) -> bool:
        """Whether a request waits or is being decoded."""
        return bool(self._queue) or any(slot.request for slot in self._slots)

    def run(self) -> None:
        """Rounds until nothing waits and nothing is decoded."""
        while self.step():
            pass

    def step(self) -> bool:
        """One round: free slots are filled, a chunk of a prompt is read, the others decode.

        Returns whether there is anything left to do.
        """
        self._admit()
        reading = [b for b, slot in enumerate(self._slots) if slot.to_read]
        if reading:
            self._read(min(reading, key=lambda b: self._slots[b].used))
        number = 1 if len(reading) > 1 else self._config.steps
        if any(slot.request and not slot.to_read for slot in self._slots):
            self._state = decode.steps(
                self.decoder, self.params, self._rows, self._state, np.array(number, np.int32)
            )
            self._settle()
        return self.busy

    def _admit(self) -> None:
        for request in self._queue.drop_cancelled():
            request.finish(_nothing())
        for b, slot in enumerate(self._slots):
            if slot.to_read and slot.request.cancelled:
                self._free(b, mesh_lib.fetched(self._state._replace(cache=None)), -1)
        changed = False
        while any(slot.request is None for slot in self._slots) and (request := self._queue.pop()):
            self._place(request)
            changed = True
        if changed:
            self._make_rows()

    def _place(self, request: requests.Request) -> None:
        """Gives a request a free slot, best one whose cache begins with its prompt."""
        prompt, asked = request.prompt, request.asked
        offset = decode.read_last(np.array(prompt), self.decoder.most_tokens)
        prompt = prompt[offset:]
        common = [_common(slot.held, prompt) for slot in self._slots]
        free = [b for b, slot in enumerate(self._slots) if slot.request is None]
        b = max(free, key=lambda b: (common[b], -self._slots[b].used))
        best = max(range(len(common)), key=common.__getitem__)
        if not self.decoder.has_slots:  # no positions in that cache: only whole texts fit
            self._state = _clear(self.decoder, self._state, b)
            common = [0] * len(common)
        elif common[best] >= common[b] + _WORTH:
            self._state = _copy(self._state, best, b)
            self._slots[b].held = self._slots[best].held[: common[best]]
            common[b] = common[best]
        request.reused = min(common[b], len(prompt) - 1)  # the last one makes the first token
        self._clock += 1
        slot = self._slots[b]
        slot.request, slot.used, slot.offset = request, self._clock, offset
        slot.held, slot.to_read = slot.held[: request.reused], prompt[request.reused :]
        self._settings[b] = asked
        n_top = options.MOST_LOGPROBS if asked.logprobs > 0 else 0
        self._state = _begin(
            self._state, b, np.array(request.prompt, np.int32), offset, max(n_top, self._n_top)
        )
        self._n_top = max(n_top, self._n_top)

    def _make_rows(self) -> None:
        """The options of all slots as the programs take them."""
        filler = next(one for one in self._settings if one is not None)
        asked = [one or filler for one in self._settings]
        active = [slot.request for slot in self._slots]
        prompts = [len(request.prompt) if request else 1 for request in active]
        limits = [
            one.limit(n) if r else n + 1 for one, n, r in zip(asked, prompts, active, strict=True)
        ]
        settings = processors.settings(asked, prompts, limits, self._sizes)
        self._sizes = settings.sizes
        copies = [request.copy if request else 0 for request in active]
        sizes = np.array(prompts, np.int32), np.array(limits, np.int32)
        keys = decode.keys([one.seed for one in asked], copies)
        self._rows = decode.Rows(*jax.device_put((settings, *sizes)), keys)

    def _read(self, b: int) -> None:
        """One chunk of the prompt of slot b."""
        slot = self._slots[b]
        left = min(len(slot.to_read), self._context - len(slot.held))
        size = next((n for n in self._chunks if n >= left), self._chunks[-1])
        size = min(size, self._context)
        chunk, slot.to_read = slot.to_read[:size], slot.to_read[size:]
        tokens = np.zeros((1, size), np.int32)
        tokens[0, : len(chunk)] = chunk
        self._state = _read_slot(
            self.decoder,
            self.params,
            self._rows,
            self._state,
            np.array(b, np.int32),
            tokens,
            np.array([len(slot.held)], np.int32),
            np.array([len(chunk)], np.int32),
            np.array([not slot.to_read]),
        )
        slot.held += chunk

    def _settle(self) -> None:
        """Tells callers what is new, and frees the slots of what has ended."""
        state = mesh_lib.fetched(self._state._replace(cache=None))
        for b, slot in enumerate(self._slots):
            request = slot.request
            if request is None or slot.to_read:
                continue
            whole, status = state.tokens_BxT[b, : state.length_B[b]], state.status_B[b]
            new = whole[len(request.prompt) :].tolist()
            slot.held = whole[slot.offset : -1].tolist()  # the last one is not in the cache yet
            kept = -1
            if request.asked.stop_strings:
                kept = self._stops(request.prompt, new, request.asked.stop_strings)
            if kept >= 0 or request.cancelled or status in (decode.STOP, decode.LENGTH):
                self._free(b, state, kept)
            elif status == decode.FULL:
                slot.offset = decode.read_last(whole, self.decoder.most_tokens)
                slot.held, slot.to_read = [], whole[slot.offset :].tolist()
                self._state = _begin(self._state, b, whole, slot.offset, self._n_top)
                request.tell(new, finished=False)
            else:
                request.tell(new, finished=False)

    def _free(self, b: int, state: decode.State, kept: int) -> None:
        """Ends the request of slot b; a stop string keeps so many of its tokens, -1 = all."""
        slot = self._slots[b]
        request, slot.request = slot.request, None
        text = decode.text_of(state, b, len(request.prompt), request.asked)
        ended = state.status_B[b] in (decode.STOP, decode.LENGTH) and not slot.to_read
        slot.to_read = []
        if kept >= 0:
            text = decode.cut(text, kept)
        elif request.cancelled and not ended:
            text = text._replace(reason='cancelled')
        self._state = _end(self._state, b)
        request.finish(text)


def check(
    decoder: decode.Decoder,
    prompt: Sequence[int],
    asked: options.Options,
    max_tokens: int,
) -> None:
    """Raises InputError where an engine with slots of max_tokens cannot serve a request."""
    errors.require(
        not asked.by_itself,
        'the engine serves requests without beams, echo, guidance and prompt lookup',
    )
    limit = decode.check(decoder, prompt, asked)
    errors.require(
        limit <= max_tokens,
        f'a prompt of {len(prompt)} tokens and {limit - len(prompt)} new ones exceed the '
        f'{max_tokens} tokens of a slot; lower max_new_tokens or raise '
        '--config.engine.max_tokens',
    )


def _nothing() -> decode.Text:
    return decode.Text([], 'cancelled', [], [], [], [], 0.0)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    size = min(len(a), len(b))
    differing = np.flatnonzero(np.asarray(a[:size]) != np.asarray(b[:size]))
    return int(differing[0]) if len(differing) else size


@functools.partial(jax.jit, static_argnames='decoder', donate_argnames='state')
def _read_slot(
    decoder: decode.Decoder,
    params: Any,
    rows: decode.Rows,
    state: decode.State,
    b: jax.Array,
    tokens_1xL: jax.Array,
    start_1: jax.Array,
    count_1: jax.Array,
    last_1: jax.Array,
) -> decode.State:
    """prefill() of one slot."""

    def one(x: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, b, 1)

    def back(x: jax.Array, new: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(x, new, b, 0)

    new = decode.prefill(
        decoder,
        params,
        jax.tree.map(one, rows),
        jax.tree.map(one, state),
        tokens_1xL,
        start_1,
        count_1,
        last_1,
    )
    return jax.tree.map(back, state, new)


def _begin(state: decode.State, b: int, text: np.ndarray, offset: int, n_top: int) -> decode.State:
    """Slot b with a text that is to be read; room for alternatives where they are asked for."""
    missing = n_top - state.top_token_BxTxN.shape[2]
    if missing:
        spare = ((0, 0), (0, 0), (0, missing))
        state = state._replace(
            top_logprob_BxTxN=jnp.pad(state.top_logprob_BxTxN, spare),
            top_token_BxTxN=jnp.pad(state.top_token_BxTxN, spare),
        )
    row = np.zeros(state.tokens_BxT.shape[1], np.int32)
    row[: len(text)] = text
    return _set_row(state, b, row, offset, len(text))


@functools.partial(jax.jit, donate_argnums=0)
def _set_row(
    state: decode.State, b: jax.Array, row_T: jax.Array, offset: jax.Array, length: jax.Array
) -> decode.State:
    return state._replace(
        tokens_BxT=state.tokens_BxT.at[b].set(row_T),
        offset_B=state.offset_B.at[b].set(offset),
        length_B=state.length_B.at[b].set(length),
        status_B=state.status_B.at[b].set(decode.LENGTH),
    )


@functools.partial(jax.jit, donate_argnums=0)
def _end(state: decode.State, b: jax.Array) -> decode.State:
    return state._replace(status_B=state.status_B.at[b].set(decode.LENGTH))


@functools.partial(jax.jit, donate_argnums=0)
def _copy(state: decode.State, source: jax.Array, target: jax.Array) -> decode.State:
    """What slot `source` holds in the cache, in slot `target`, too."""
    return state._replace(cache=jax.tree.map(lambda x: x.at[target].set(x[source]), state.cache))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _clear(decoder: decode.Decoder, state: decode.State, b: jax.Array) -> decode.State:
    """Slot b of the cache as before any text."""
    empty = decoder.empty_cache(1, 1)
    return state._replace(
        cache=jax.tree.map(lambda x, new: x.at[b].set(new[0]), state.cache, empty)
    )
