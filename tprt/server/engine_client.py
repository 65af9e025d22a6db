"""The client side of a coordinator's request lane: sends requests, keeps their completions up to date.

One client serves one thread. Knows nothing of HTTP, of other replicas and of how the coordinator was started.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

from tprt.errors import EngineDeadError, InvalidRequestError
from tprt.messages import (
    AbortRequest,
    AddRequest,
    EngineFailed,
    EngineReady,
    EngineStats,
    FinishReason,
    GetStats,
    Hello,
    Message,
    PromptLogprobs,
    RequestFailed,
    RequestOutput,
    SamplingParams,
    Shutdown,
)
from tprt.server.completion import Completion, TokenLogprobs
from tprt.server.tokenizer import Tokenizer
from tprt.transport.channel import Buffer
from tprt.transport.codec import decode, encode

_NOT_FINISHED = int(FinishReason.NONE)
_STOP = int(FinishReason.STOP)
# Outputs end long before most of what max_tokens allows.
_MAX_TO_COME = 256


class RequestLane(Protocol):
    """What the client needs of its connection."""

    def send(self, parts: Sequence[Buffer]) -> None: ...

    def receive(self, timeout_s: float) -> bytes | None: ...

    def close(self, flush: bool = True) -> None: ...


def _ignore(request_id: int) -> None:
    """Take no note of news."""


class EngineClient:
    """Requests in flight over one lane, by the ids that this client gave them.

    Attributes:
        load: tokens of the requests that have not ended: prompt, output so far and, up to a bound, what may
            come. Without the last a replica that is slow, and so has few tokens, would seem idle.
        stats: what the engine has said last of how it does.
        num_received: messages that have come.
        num_news: those of them that were about requests.
    """

    def __init__(
        self,
        lane: RequestLane,
        tokenizer: Tokenizer | None,
        on_news: Callable[[int], None] = _ignore,
        ids: Iterator[int] | None = None,
    ) -> None:
        """Assign only.

        Args:
            lane: the connection to the coordinator.
            tokenizer: turns tokens into text; None where the checkpoint has none.
            on_news: called by `poll` for each token, end or refusal, with the request's id; its completion has
                been brought up to date.
            ids: where the requests get their ids from; none: they are counted.
        """
        self.load = 0
        self.stats: EngineStats | None = None
        self.num_received = self.num_news = 0
        self._lane = lane
        self._tokenizer = tokenizer
        self._on_news = on_news
        self._ids = itertools.count() if ids is None else ids
        self._running: dict[int, Completion] = {}

    @property
    def num_running(self) -> int:
        """Requests that have not ended."""
        return len(self._running)

    def hello(self) -> None:
        """Ask to be told when the engine is ready."""
        self._send(Hello())

    def ask_for_stats(self) -> None:
        """Ask the engine how it does; `poll` brings `stats`."""
        self._send(GetStats())

    def add(self, prompt_token_ids: list[int], sampling: SamplingParams) -> tuple[int, Completion]:
        """Send a request; `poll` brings its tokens.

        Raises:
            InvalidRequestError: see `check`.
        """
        self.check(prompt_token_ids, sampling)
        request_id = next(self._ids)
        completion = Completion(prompt_token_ids, sampling)
        self._hold(request_id, completion)
        self._send(AddRequest(request_id, np.array(prompt_token_ids, np.int32), sampling))
        return request_id, completion

    def check(self, prompt_token_ids: list[int], sampling: SamplingParams) -> None:
        """Refuse what cannot be sent.

        Raises:
            InvalidRequestError: a stop string was given, and there is no tokenizer to find it with; or a token
                id cannot be one.
        """
        if sampling.stop and self._tokenizer is None:
            raise InvalidRequestError("stop strings need a tokenizer, and this checkpoint has none")
        if prompt_token_ids and not are_token_ids(prompt_token_ids):
            raise InvalidRequestError(
                "prompt token ids must be whole numbers from 0 to the size of the vocabulary"
            )

    def hand_over(self) -> dict[int, Completion]:
        """Return the requests that have not ended, by id, and know nothing of them any more."""
        running, self._running = self._running, {}
        self.load = 0
        return running

    def take_over(self, request_id: int, completion: Completion) -> None:
        """Go on with a request that another client has handed over, from the tokens that it has."""
        self._hold(request_id, completion)
        if not completion.token_ids:
            # The prompt is scored again, from its beginning.
            completion.prompt_parts.clear()
        prompt, output = (
            np.array(ids, np.int32) for ids in (completion.prompt_token_ids, completion.token_ids)
        )
        self._send(AddRequest(request_id, prompt, completion.sampling, output))

    def abort(self, request_id: int) -> None:
        """Give the request up; it ends with finish reason `abort`."""
        completion = self._let_go(request_id)
        if completion is not None:
            completion.finish(FinishReason.ABORT, self._tokenizer)
            self._send(AbortRequest(request_id))

    def poll(self, timeout_s: float) -> EngineReady | None:
        """Take in what has come, waiting up to `timeout_s` for the first message.

        Returns:
            The engine's greeting when that was among it.

        Raises:
            EngineDeadError: the coordinator says that the engine cannot go on.
        """
        ready = None
        payload = self._lane.receive(timeout_s)
        while payload is not None:
            self.num_received += 1
            message = decode(payload)
            if isinstance(message, EngineReady):
                ready = message
            else:
                self._take(message)
            payload = self._lane.receive(0.0)
        return ready

    def shut_down(self, reason: str) -> None:
        """Tell the engine to end."""
        self._send(Shutdown(reason))

    def close(self, flush: bool = True) -> None:
        """Close the lane; `flush`: once what was sent has left, or a second has passed."""
        self._lane.close(flush)

    def _send(self, message: Message) -> None:
        self._lane.send(encode(message))

    def _take(self, message: Message) -> None:
        self.num_news += isinstance(message, RequestOutput | RequestFailed | PromptLogprobs)
        if isinstance(message, RequestFailed):
            completion = self._let_go(message.request_id)
            if completion is not None:
                completion.error = message.message
                self._on_news(message.request_id)
        elif isinstance(message, EngineFailed):
            raise EngineDeadError(message.message)
        elif isinstance(message, RequestOutput):
            self._take_rows(message)
        elif isinstance(message, EngineStats):
            self.stats = message
        elif isinstance(message, PromptLogprobs):
            completion = self._running.get(message.request_id)
            if completion is not None:
                completion.prompt_parts.append(message)
        else:
            raise EngineDeadError(f"the coordinator sent {type(message).__name__}, which no client expects")

    def _take_rows(self, output: RequestOutput) -> None:
        if len(output.queue_s):
            self._take_queue_times(output)
        # As lists, since one element of an array after another takes longer than all the rest of this.
        columns = (output.request_ids, output.token_ids, output.finish_reasons, output.num_cached_tokens)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        for row, (request_id, token_id, reason, num_cached_tokens) in enumerate(rows):
            completion = self._running.get(request_id)
            if completion is None:
                continue
            completion.num_cached_tokens = num_cached_tokens
            if token_id >= 0:
                if completion.sampling.logprobs is not None:
                    completion.logprobs.append(_logprobs(output, row, completion.sampling.logprobs))
                # One that may come has come; beyond the bound another takes its place.
                self.load += _is_bounded(completion)
                completion.append(token_id, self._tokenizer, reason == _STOP)
            if reason != _NOT_FINISHED or completion.finished:
                self._end(request_id, completion, FinishReason(reason))
            self._on_news(request_id)

    def _take_queue_times(self, output: RequestOutput) -> None:
        for request_id, queue_s in zip(output.request_ids.tolist(), output.queue_s.tolist(), strict=True):
            completion = self._running.get(request_id)
            if completion is not None and queue_s >= 0:
                completion.queue_s = queue_s

    def _end(self, request_id: int, completion: Completion, reason: FinishReason) -> None:
        """End a request that the engine has finished, or that has found a stop string and must tell it."""
        if reason == FinishReason.NONE:
            self._send(AbortRequest(request_id))
        self._let_go(request_id)
        completion.finish(reason, self._tokenizer)

    def _hold(self, request_id: int, completion: Completion) -> None:
        self._running[request_id] = completion
        self.load += _tokens_of(completion)

    def _let_go(self, request_id: int) -> Completion | None:
        completion = self._running.pop(request_id, None)
        if completion is not None:
            self.load -= _tokens_of(completion)
        return completion


def are_token_ids(token_ids: Sequence[int]) -> bool:
    """Tell whether there are some, and a conversion to int32 leaves them as they are: 0 or more."""
    tokens = np.array(token_ids)
    return tokens.dtype.kind in "iu" and bool(tokens.min() >= 0 and tokens.max() < 2**31)


def _is_bounded(completion: Completion) -> bool:
    """Tell whether more may come than counts."""
    return completion.sampling.max_tokens - len(completion.token_ids) > _MAX_TO_COME


def _tokens_of(completion: Completion) -> int:
    num_tokens = len(completion.token_ids)
    to_come = min(completion.sampling.max_tokens - num_tokens, _MAX_TO_COME)
    return len(completion.prompt_token_ids) + num_tokens + to_come


def _logprobs(output: RequestOutput, row: int, num_top: int) -> TokenLogprobs:
    first = row * output.num_top
    ids = output.top_token_ids[first : first + num_top].tolist()
    values = output.top_logprobs[first : first + num_top].tolist()
    return TokenLogprobs(
        int(output.token_ids[row]), float(output.logprobs[row]), tuple(zip(ids, values, strict=True))
    )
