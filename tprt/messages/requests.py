"""Clients to coordinator and back: requests, their news, and how the engine is doing."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

from tprt.messages.arrays import NO_FLOAT32, NO_INT32, Float32Array, Int32Array, Int64Array, UInt8Array
from tprt.messages.sampling import SamplingParams

QUEUE_BOUNDS_S = (
    *(0.001, 0.01, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
"""How waiting times are told apart, in seconds."""


class FinishReason(IntEnum):
    """Why a request ended; `NONE` while it runs."""

    NONE = 0
    STOP = 1
    LENGTH = 2
    ABORT = 3


@dataclass(frozen=True, slots=True)
class Hello:
    """Client to coordinator: tell me when you are ready (answered by `EngineReady`), and when that changes.

    When ranks fail, whoever has said hello gets `EngineStats` that say so, and `EngineReady` of the next group.
    """


@dataclass(frozen=True, slots=True)
class AddRequest:
    """Client to coordinator: generate a continuation.

    Attributes:
        request_id: the client's own.
        prompt_token_ids: `[P]` what to continue.
        sampling: how.
        output_token_ids: `[n]` the first tokens of the output, where the client has them from another engine.
    """

    request_id: int
    prompt_token_ids: Int32Array
    sampling: SamplingParams
    output_token_ids: Int32Array = field(default_factory=lambda: NO_INT32)


@dataclass(frozen=True, slots=True)
class AbortRequest:
    """Client to coordinator: forget the request, whatever state it is in."""

    request_id: int


@dataclass(frozen=True, slots=True)
class Shutdown:
    """Client to coordinator, and coordinator to workers: finish nothing more and exit."""

    reason: str = ""


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """Coordinator to client: the news of one step for `n` of this client's requests.

    Attributes:
        request_ids: `[n]` the client's ids.
        token_ids: `[n]` the new token, or -1 where a request ended without one (abort).
        finish_reasons: `[n]` a `FinishReason`.
        num_cached_tokens: `[n]` prompt tokens that came from the prefix cache.
        queue_s: `[n]` how long each waited before it first ran, where that was not told before, else -1; empty
            where it was for all.
        logprobs, top_token_ids, top_logprobs, num_top: as in `StepOutput`.
    """

    request_ids: Int64Array
    token_ids: Int32Array
    finish_reasons: UInt8Array
    num_cached_tokens: Int32Array
    queue_s: Float32Array = field(default_factory=lambda: NO_FLOAT32)
    logprobs: Float32Array = field(default_factory=lambda: NO_FLOAT32)
    top_token_ids: Int32Array = field(default_factory=lambda: NO_INT32)
    top_logprobs: Float32Array = field(default_factory=lambda: NO_FLOAT32)
    num_top: int = 0


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Coordinator to client: what a step has found of the next `m` tokens of one request's prompt.

    The first token of a prompt has none. All come once, in order, and before the first token of the output.

    Attributes:
        request_id: the client's id.
        logprobs: `[m]` log-probabilities of those tokens.
        top_token_ids, top_logprobs: `[m * num_top]` most likely tokens in their places, best first.
        num_top: as many as the request wants.
    """

    request_id: int
    logprobs: Float32Array
    top_token_ids: Int32Array
    top_logprobs: Float32Array
    num_top: int


@dataclass(frozen=True, slots=True)
class GetStats:
    """Client to coordinator: answer with `EngineStats`."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Coordinator to client: the engine just now; counters count since the start.

    Attributes:
        epoch: number of the worker group; as many were replaced before it.
        is_serving: all ranks of it are ready.
        num_running, num_waiting: requests.
        oldest_waiting_s: how long the first in the queue has waited; 0 when none does.
        num_free_blocks, num_blocks: KV blocks.
        num_preemptions: sequences sent back to the queue for want of blocks.
        num_prompt_tokens, num_cached_tokens: tokens of prompts that ran, and those found in the prefix cache.
        num_generated_tokens: tokens sampled.
        num_steps: steps brought to their end.
        last_step_s: time since the last one ended.
        queue_counts: requests by how long they waited before they first ran: up to each of `QUEUE_BOUNDS_S` and
            longer than the one before, and in the end those that waited longer than all.
        queue_sum_s: what they have waited together.
    """

    epoch: int
    is_serving: bool
    num_running: int
    num_waiting: int
    oldest_waiting_s: float
    num_free_blocks: int
    num_blocks: int
    num_preemptions: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_generated_tokens: int
    num_steps: int
    last_step_s: float
    queue_counts: tuple[int, ...] = ()
    queue_sum_s: float = 0.0


@dataclass(frozen=True, slots=True)
class RequestFailed:
    """Coordinator to client: this one request cannot be served; the message says why."""

    request_id: int
    message: str


@dataclass(frozen=True, slots=True)
class EngineFailed:
    """Coordinator to client: the engine cannot go on, and none of the client's requests will be served."""

    message: str


@dataclass(frozen=True, slots=True)
class EngineReady:
    """Coordinator to client: the worker group is up."""

    epoch: int
    world_size: int
    num_blocks: int
    block_size: int
    max_model_len: int
