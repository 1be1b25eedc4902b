# SPDX-License-Identifier: Apache-2.0
"""Texts of a batch of prompts: all rows are read together and decode until the last has ended.

Where a text is guided, every text has a second row in the batch's second half: with the prompt's
last token alone, and the same tokens behind it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from gptjax.runtime import mesh as mesh_lib
from gptjax.sampling import decode, options, processors, texts

_LOOK = 8  # tokens between two looks at stop strings


class Batch:
    """Requests decoded together, from prompts to texts; a handle on rows for callers in between."""

    def __init__(
        self,
        decoder: decode.Decoder,
        params: Any,
        prompts: Sequence[Sequence[int]],
        asked: Sequence[options.Options],
        copies: Sequence[int] = (),
        spare: int = 0,
    ) -> None:
        """Reads the prompts and chooses the first tokens. Arguments and errors as generate().

        Args:
          spare: tokens of room beyond the longest text.
        """
        self.decoder, self.params = decoder, params
        limits = [decode.check(decoder, *pair) for pair in zip(prompts, asked, strict=True)]
        number = 1 << (len(prompts) - 1).bit_length()  # of rows: a power of two
        fill = number - len(prompts)
        n_top = options.MOST_LOGPROBS if max(one.logprobs for one in asked) > 0 else 0
        most = decoder.most_tokens
        room = decode.width(max(limits) + spare)
        self.context = room if most is None else min(room, most)
        self.asked, self.prompts = list(asked), [list(prompt) for prompt in prompts]
        padded = [*asked, *([asked[0]] * fill)]
        copies = [*(copies or [0] * len(prompts)), *([0] * fill)]
        limits += [0] * fill
        wholes = [np.array(prompt, np.int32) for prompt in [*prompts, *([[]] * fill)]]
        self._apart, guidance = number, None  # how far a second row is from the first
        if any(one.guided for one in asked):
            guidance = np.array([one.guidance_scale for one in padded], np.float32)
            padded, copies = padded * 2, copies * 2
            limits += [limit - len(text[:-1]) for limit, text in zip(limits, wholes, strict=True)]
            wholes += [text[-1:] for text in wholes]
        lengths = [*map(len, wholes)]
        self.rows = decode.Rows(
            processors.settings(padded, lengths, limits),
            np.array(lengths, np.int32),
            np.array(limits, np.int32),
            decode.keys([one.seed for one in padded], copies),
            guidance,
        )
        self.state = decode.empty(decoder, len(padded), room, self.context, n_top)
        self._read(wholes, any(one.echo for one in asked))

    def _read(self, wholes: Sequence[np.ndarray], echo: bool = False) -> None:
        """Reads each row's text, or the last half of the context of one that is too long."""
        number = len(self.rows.prompt_B)
        offsets = np.array(mesh_lib.fetched(self.state.offset_B))
        lasts = []
        for b, text in enumerate(wholes):
            if len(text):
                offsets[b] = decode.read_last(text, self.decoder.most_tokens)
            lasts.append(text[offsets[b] :] if len(text) else text)
        tokens = np.zeros((number, decode.width(max(map(len, lasts)), self.context)), np.int32)
        counts = np.zeros(number, np.int32)
        for b, text in enumerate(lasts):
            tokens[b, : len(text)] = text
            counts[b] = len(text)
        whole = np.array(mesh_lib.fetched(self.state.tokens_BxT))
        for b, text in enumerate(wholes):
            whole[b, : len(text)] = text
        self.state = self.state._replace(
            offset_B=jnp.asarray(offsets, jnp.int32), tokens_BxT=jnp.asarray(whole)
        )
        self.state = decode.prefill(
            self.decoder,
            self.params,
            self.rows,
            self.state,
            tokens,
            np.zeros(number, np.int32),
            counts,
            counts > 0,
            echo=echo,
        )

    def advance(self, number: int) -> None:
        """Up to `number` more tokens in every row that runs."""
        self.state = decode.steps(
            self.decoder, self.params, self.rows, self.state, np.array(number, np.int32)
        )
        full = np.flatnonzero(mesh_lib.fetched(self.state.status_B) == decode.FULL)
        if len(full):
            tokens, lengths = mesh_lib.fetched((self.state.tokens_BxT, self.state.length_B))
            lengths = np.where(np.isin(np.arange(len(lengths)), full), lengths, 0)
            self._read([row[:length] for row, length in zip(tokens, lengths, strict=True)])

    @property
    def running(self) -> bool:
        return bool(
            np.isin(mesh_lib.fetched(self.state.status_B), (decode.RUNNING, decode.FULL)).any()
        )

    def stop(self, row: int) -> None:
        """Ends a text, and its second row."""
        status_B = self.state.status_B.at[row :: self._apart].set(decode.STOP)
        self.state = self.state._replace(status_B=status_B)

    def texts(self) -> list[decode.Text]:
        """What the rows have become so far."""
        state = mesh_lib.fetched(self.state._replace(cache=None))
        return [
            decode.text_of(state, b, len(prompt), one)
            for b, (prompt, one) in enumerate(zip(self.prompts, self.asked, strict=True))
        ]


def generate(
    decoder: decode.Decoder,
    params: Any,
    prompts: Sequence[Sequence[int]],
    asked: Sequence[options.Options],
    copies: Sequence[int] = (),
    stops: texts.Stops | None = None,
) -> list[decode.Text]:
    """Texts of token-id prompts, without beams: all rows in one batch.

    Args:
      prompts: one a row.
      asked: the options of each; num_return_sequences is not looked at.
      copies: which text of its request each row is, where several are drawn of one.
      stops: needed where there are stop strings.

    Raises:
      InputError: as decode.check().
    """
    batch = Batch(decoder, params, prompts, asked, copies)
    return finish(batch, batch.advance, stops)


def finish(
    batch: Batch,
    advance: Callable[[int], None],
    stops: texts.Stops | None,
) -> list[decode.Text]:
    """The texts of a batch once all its rows have ended; advance(n) decodes n tokens of each."""
    waiting = {b for b, one in enumerate(batch.asked) if one.stop_strings}
    ended: dict[int, int] = {}
    texts.check_stops(stops, waiting)
    longest = int(np.max(batch.rows.limit_B))
    while True:
        for b, text in enumerate(batch.texts()) if waiting else ():
            strings = batch.asked[b].stop_strings
            if b in waiting and (kept := stops(batch.prompts[b], text.tokens, strings)) >= 0:
                ended[b] = kept
                waiting.discard(b)
                batch.stop(b)
        if not batch.running:
            break
        advance(_LOOK if waiting else longest)
    return [
        decode.cut(text, ended[b]) if b in ended else text for b, text in enumerate(batch.texts())
    ]
