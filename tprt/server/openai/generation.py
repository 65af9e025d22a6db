"""The sequences of one request: handed to the engine together, read together, given up together.

Knows nothing of the form of an answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

from tprt.messages import EngineReady, SamplingParams
from tprt.server.completion import Completion, FinishName, TokenLogprobs
from tprt.server.http.context import ServerContext
from tprt.server.http.errors import ApiError, not_ready
from tprt.server.http.event_stream import Emit
from tprt.server.http.request_log import RequestRecord
from tprt.server.openai.logprobs import logprobs_length
from tprt.server.openai.prompts import off_loop
from tprt.server.openai.sampling import for_choice

if TYPE_CHECKING:
    from tprt.server.async_engine import Delta, RequestStream


@dataclass(frozen=True, slots=True)
class PromptJob:
    """A prompt, and how to go on from it; `drops_output` where the prompt alone is of interest."""

    prompt_token_ids: list[int]
    sampling: SamplingParams
    drops_output: bool = False


@dataclass(frozen=True, slots=True)
class Output:
    """What one sequence has come to: its text, tokens, their log-probabilities, and why it ended.

    `prompt` has the log-probabilities of its prompt; None where they were not asked for.
    """

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    finish_reason: FinishName
    prompt: Completion | None


class ChoiceStream(Protocol):
    """Makes the events of one choice."""

    def events(self, delta: Delta, usage: Mapping[str, object] | None = None) -> bytes:
        """Return the events that tell of `delta`, or none."""
        ...


class Generation:
    """`num_choices` sequences for each prompt; choice `c` of prompt `p` has the index `p * num_choices + c`."""

    def __init__(self, context: ServerContext, record: RequestRecord, response_id: str) -> None:
        self._engine = context.engine
        self._record = record
        self._id = response_id
        self._streams: list[RequestStream] = []
        self._jobs: Sequence[PromptJob] = ()
        self._num_choices = 1
        # For each prompt: its first choice has got a token, so all that is to be known of the prompt is there.
        self._prompt_is_known: list[asyncio.Event] = []

    @asynccontextmanager
    async def running(self, jobs: Sequence[PromptJob], num_choices: int) -> AsyncIterator[None]:
        """Submit everything; what has not ended is aborted at the end.

        Raises:
            InvalidRequestError, EngineBusyError, EngineDeadError: the engine does not take it.
        """
        self._jobs, self._num_choices = jobs, num_choices
        self._prompt_is_known = [asyncio.Event() for _ in jobs]
        self._record.sampling, self._record.num_choices = jobs[0].sampling, num_choices
        self._record.num_prompt_tokens = sum(len(job.prompt_token_ids) for job in jobs)
        count = len(jobs) * num_choices
        async with AsyncExitStack() as stack:
            try:
                self._engine.require_places(count)
                for index in range(count):
                    job, choice = jobs[index // num_choices], index % num_choices
                    name = f"{self._id}-{index}" if count > 1 else self._id
                    sampling = for_choice(job.sampling, choice)
                    stream = self._engine.submit(job.prompt_token_ids, sampling, name)
                    self._streams.append(await stack.enter_async_context(stream))
                yield
            finally:
                self._note_in_record()

    async def stream(self, choices: Sequence[ChoiceStream], emit: Emit, with_usage: bool) -> None:
        """Emit the events that `choices` make of the news of each sequence, until all have ended.

        Args:
            choices: one for each sequence.
            emit: takes events.
            with_usage: hand the counts so far to `choices` as well.

        Raises:
            ApiError, InvalidRequestError, EngineBusyError, EngineDeadError: a sequence cannot be served.
        """
        if len(choices) == 1:
            await self._stream_one(0, choices[0], emit, with_usage)
            return
        try:
            async with asyncio.TaskGroup() as group:
                for index, choice in enumerate(choices):
                    group.create_task(self._stream_one(index, choice, emit, with_usage))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _stream_one(self, index: int, choice: ChoiceStream, emit: Emit, with_usage: bool) -> None:
        async for delta in self._news(index):
            self._look_at(index, delta)
            make = partial(choice.events, delta, self.usage() if with_usage else None)
            events = make() if delta.prompt is None else await off_loop(logprobs_length(delta.prompt), make)
            if events:
                await emit(events)

    async def collect(self) -> list[Output]:
        """Return all outputs once they are complete; raises what `stream` raises."""
        # One after the other: the engine fills all of them meanwhile.
        return [await self._collect_one(index) for index in range(len(self._streams))]

    async def _collect_one(self, index: int) -> Output:
        texts: list[str] = []
        logprobs: list[TokenLogprobs] = []
        prompt: Completion | None = None
        reason: FinishName | None = None
        async for delta in self._news(index):
            self._look_at(index, delta)
            if prompt is None:
                prompt = delta.prompt
            texts.append(delta.text)
            logprobs.extend(delta.logprobs)
            reason = delta.finish_reason
        assert reason is not None, "a stream has ended without a reason"
        token_ids = [] if self._job(index).drops_output else self._streams[index].completion.token_ids
        return Output("".join(texts), token_ids, logprobs, reason, prompt)

    def _job(self, index: int) -> PromptJob:
        return self._jobs[index // self._num_choices]

    def _news(self, index: int) -> AsyncIterator[Delta]:
        job = self._job(index)
        if job.drops_output or job.sampling.prompt_logprobs is not None:
            return self._news_with_prompt(index)
        return self._streams[index]

    async def _news_with_prompt(self, index: int) -> AsyncIterator[Delta]:
        """Yield the news of a sequence, the first with what is to be known of its prompt, as its job has it."""
        job = self._job(index)
        wants_prompt = job.sampling.prompt_logprobs is not None
        async for delta in self._streams[index]:
            if wants_prompt and delta.token_ids:
                delta = replace(delta, prompt=await self._scored_prompt(index))
                wants_prompt = False
            if job.drops_output and delta.token_ids:
                delta = replace(delta, text="", token_ids=(), logprobs=(), finish_reason="length")
            yield delta

    async def _scored_prompt(self, index: int) -> Completion:
        """Return the first choice of a prompt once it has scored that; the choice that asks has a token."""
        number, choice = divmod(index, self._num_choices)
        if choice == 0:
            self._prompt_is_known[number].set()
        else:
            await self._prompt_is_known[number].wait()
        return self._streams[index - choice].completion

    def _look_at(self, index: int, delta: Delta) -> None:
        """Note the first token; an output that the server ends before it has any is an error.

        Raises:
            ApiError: that is so.
        """
        if delta.token_ids and self._record.first_token_s is None:
            self._record.on_token()
        if delta.finish_reason == "abort" and not self._streams[index].completion.token_ids:
            raise _aborted()

    def usage(self) -> dict[str, object]:
        """Return the counts of tokens so far; a prompt counts once for all its choices."""
        completions = [stream.completion for stream in self._streams]
        num_output = self._num_output_tokens()
        num_prompt = num_cached = 0
        for first in range(0, len(completions), self._num_choices):
            choices = completions[first : first + self._num_choices]
            num_prompt += len(choices[0].prompt_token_ids)
            # Later choices find in the cache what the first one has put there.
            num_cached += min(completion.num_cached_tokens for completion in choices)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_output,
            "total_tokens": num_prompt + num_output,
            "prompt_tokens_details": {"cached_tokens": num_cached},
        }

    def _num_output_tokens(self) -> int:
        return sum(
            len(stream.completion.token_ids)
            for index, stream in enumerate(self._streams)
            if not self._job(index).drops_output
        )

    def _note_in_record(self) -> None:
        completions = [stream.completion for stream in self._streams]
        self._record.num_output_tokens = self._num_output_tokens()
        if completions:
            self._record.queue_s = completions[0].queue_s
        reasons = {completion.finish_reason or "abort" for completion in completions}
        self._record.finish_reason = ",".join(sorted(reasons)) or None


def _aborted() -> ApiError:
    """Return the error of a sequence that the server has given up, as it does when it ends."""
    return ApiError(503, "the server has ended this request before it was complete", code="aborted")


def finish_name(reason: FinishName) -> str:
    """Return OpenAI's name of a finish reason; an output that the server ends is cut short, as by a limit."""
    return "length" if reason == "abort" else reason


def require_ready(context: ServerContext) -> EngineReady:
    """Return the engine's greeting.

    Raises:
        ApiError: there was none so far.
    """
    ready = context.engine.ready
    if ready is None:
        raise not_ready("the model is being loaded")
    return ready


def require_model(context: ServerContext, name: str | None) -> None:
    """Refuse a model that is not the one that there is.

    Raises:
        ApiError: 404, as OpenAI has it.
    """
    if name is not None and name != context.model_name:
        message = f"The model `{name[:200]}` does not exist or you do not have access to it."
        raise ApiError(404, message, code="model_not_found")
