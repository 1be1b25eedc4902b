# SPDX-License-Identifier: Apache-2.0
"""Requests to the engine, and the queue in which they wait."""

import collections
import threading
from collections.abc import Callable, Sequence

from gptjax.configs import errors
from gptjax.sampling import decode, options, texts


class QueueFull(errors.InputError):
    """Raised when as many requests wait as may; try again when some are done."""


class Request:
    """One prompt on its way to one text; what submit() gives.

    Attributes:
      prompt, asked: what was submitted; client: who did.
      text: what became of it, once done.
      reused: tokens of the prompt that did not have to be read.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        asked: options.Options,
        copy: int,
        client: str,
        on_text: Callable[[str, list[int]], None] | None,
        stream: texts.Stream | None,
    ) -> None:
        self.prompt, self.asked, self.copy, self.client = list(prompt), asked, copy, client
        self.text: decode.Text | None = None
        self.reused = 0
        self._on_text, self._stream = on_text, stream
        self._told = 0
        self._cancelled = False
        self._error: Exception | None = None
        self._done = threading.Event()

    @property
    def done(self) -> bool:
        return self._done.is_set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled

    def cancel(self) -> None:
        """Ends it at the next step; what there is by then is its text, its reason 'cancelled'."""
        self._cancelled = True

    def result(self, timeout: float | None = None) -> decode.Text:
        """Waits for the text while another thread runs the engine.

        Raises:
          TimeoutError: it is not done by then.
          Exception: what on_text raised; the request was cancelled for it.
        """
        if not self._done.wait(timeout):
            raise TimeoutError('the request is not done yet')
        if self._error is not None:
            raise self._error
        return self.text

    def tell(self, tokens: Sequence[int], finished: bool) -> None:
        """Hands new tokens and the text that is certain by now to the callback."""
        if self._on_text is None:
            return
        piece = self._stream.push(tokens, finished) if self._stream else ''
        new, self._told = list(tokens[self._told :]), max(self._told, len(tokens))
        try:
            if piece or new:
                self._on_text(piece, new)
        except Exception as e:  # one caller's trouble must not stop the others' texts
            self._error, self._on_text = e, None
            self.cancel()

    def finish(self, text: decode.Text) -> None:
        self.text = text
        self.tell(text.tokens, finished=True)
        self._done.set()


class Queue:
    """Clients are served in turn, each one's requests in order. For any number of threads."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._waiting: dict[str, collections.deque[Request]] = {}  # in the order of turns
        self._lock = threading.Lock()

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def push(self, request: Request) -> None:
        """Raises QueueFull."""
        with self._lock:
            if sum(map(len, self._waiting.values())) >= self._most:
                raise QueueFull(f'{self._most} requests are waiting; try again later')
            self._waiting.setdefault(request.client, collections.deque()).append(request)

    def drop_cancelled(self) -> list[Request]:
        """Takes out and gives those that were cancelled while they waited."""
        with self._lock:
            dropped = [r for queue in self._waiting.values() for r in queue if r.cancelled]
            for request in dropped:
                queue = self._waiting[request.client]
                queue.remove(request)
                if not queue:
                    del self._waiting[request.client]
        return dropped

    def pop(self) -> Request | None:
        """The oldest request of the client whose turn it is; None = nobody waits."""
        with self._lock:
            if not self._waiting:
                return None
            client = next(iter(self._waiting))
            queue = self._waiting.pop(client)
            request = queue.popleft()
            if queue:
                self._waiting[client] = queue  # behind the others
            return request
