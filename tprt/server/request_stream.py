"""One request's news as they come, for the task that serves it.

The reader takes what there is: tokens that came while it was busy are one `Delta`, so a slow reader costs no
more memory than the tokens themselves. Knows nothing of lanes and of how a request is ended in the engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from types import TracebackType
from typing import Protocol

from tprt.errors import EngineDeadError, InvalidRequestError, TprtError
from tprt.server.completion import Completion, FinishName, TokenLogprobs


class RequestMeter(Protocol):
    """Who counts the tokens of one request."""

    def on_tokens(self, count: int) -> None:
        """Take note of `count` new tokens."""

    def on_end(self, reason: str) -> None:
        """Take note of the end: a `FinishName`, or `error`."""


@dataclass(frozen=True, slots=True)
class Delta:
    """What is new of a request; one or several tokens, or its end alone.

    Attributes:
        text: safe to show: what may be the beginning of a stop string comes later, or never.
        token_ids: the new tokens; their text may come with a later one.
        logprobs: one entry for each of them where they were asked for.
        finish_reason: None while the request runs; nothing comes after one that is not.
        prompt: has the log-probabilities of the prompt, where the answer has them; who reads the news puts it
            into the first.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: FinishName | None
    prompt: Completion | None = None


class RequestStream:
    """The news of one request, for one reader: `async with stream: async for delta in stream: ...`.

    Leaving the block before the end aborts the request in the engine at once.

    Attributes:
        name: what the client calls the request.
        completion: all there is of it so far.
        started_s: when it was submitted, on the monotonic clock.
        meter: who counts its tokens.
    """

    def __init__(
        self, name: str, completion: Completion, meter: RequestMeter, leave: Callable[[], None]
    ) -> None:
        """Assign only; `AsyncEngine.submit` makes streams."""
        self.name = name
        self.completion = completion
        self.started_s = monotonic()
        self.meter = meter
        self._leave = leave
        self._num_read = 0
        self._num_counted = 0
        self._end_was_read = False
        self._failure: TprtError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def on_news(self) -> None:
        """Let the reader go on: the completion has changed."""
        if count := len(self.completion.token_ids) - self._num_counted:
            self._num_counted += count
            self.meter.on_tokens(count)
        self._wake()

    def fail(self, error: TprtError) -> None:
        """Raise `error` in the reader, once it has read what had come."""
        self._failure = error
        self._wake()

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> Delta:
        """Return the news, once there are any.

        Raises:
            InvalidRequestError: the engine has refused the request.
            EngineBusyError: it had no token at its deadline.
            EngineDeadError: the engine cannot go on; carries the cause.
        """
        while (delta := self._take()) is None:
            if self._end_was_read:
                raise StopAsyncIteration
            if self.completion.error is not None:
                lost = self.completion.was_lost
                raise (EngineDeadError if lost else InvalidRequestError)(self.completion.error)
            if self._failure is not None:
                raise self._failure
            await self._wait()
        return delta

    async def __aenter__(self) -> RequestStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Abort the request unless it has ended; idempotent."""
        self._leave()

    def _take(self) -> Delta | None:
        completion, begin = self.completion, self._num_read
        end = len(completion.token_ids)
        reason = completion.finish_reason if self._failure is None else None
        if end == begin and (reason is None or self._end_was_read):
            return None
        self._num_read = end
        self._end_was_read = reason is not None
        logprobs = tuple(completion.logprobs[begin:end]) if completion.logprobs else ()
        return Delta(completion.take_text(), tuple(completion.token_ids[begin:end]), logprobs, reason)

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def _wait(self) -> None:
        assert self._waiter is None, "a stream has one reader"
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None
