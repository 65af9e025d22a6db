"""Every message between processes: one immutable type for each hop.

Arrays are numpy columns, one entry per sequence or per token, and travel as packed bytes. Knows nothing of
how a message is encoded (`tprt.transport.codec`) or carried. Each message carries the epoch of the worker
group where it can be stale.
"""

from __future__ import annotations

from tprt.messages.arrays import NO_FLOAT32, NO_INT32, Float32Array, Int32Array, Int64Array, UInt8Array
from tprt.messages.requests import (
    QUEUE_BOUNDS_S,
    AbortRequest,
    AddRequest,
    EngineFailed,
    EngineReady,
    EngineStats,
    FinishReason,
    GetStats,
    Hello,
    PromptLogprobs,
    RequestFailed,
    RequestOutput,
    Shutdown,
)
from tprt.messages.sampling import MAX_GRAMMAR_CHARS, MAX_LOGPROBS, Grammar, SamplingParams
from tprt.messages.steps import ScoredStepOutput, StepInput, StepOutput
from tprt.messages.workers import (
    EndGroup,
    GroupEnded,
    GroupReady,
    StartGroup,
    WorkerFailed,
    WorkerReady,
)

Message = (
    Hello
    | AddRequest
    | AbortRequest
    | GetStats
    | EngineStats
    | Shutdown
    | StepInput
    | StepOutput
    | ScoredStepOutput
    | RequestOutput
    | PromptLogprobs
    | RequestFailed
    | EngineFailed
    | EngineReady
    | WorkerReady
    | WorkerFailed
    | StartGroup
    | GroupReady
    | EndGroup
    | GroupEnded
)

__all__ = [
    "MAX_GRAMMAR_CHARS",
    "MAX_LOGPROBS",
    "NO_FLOAT32",
    "NO_INT32",
    "QUEUE_BOUNDS_S",
    "AbortRequest",
    "AddRequest",
    "EndGroup",
    "EngineFailed",
    "EngineReady",
    "EngineStats",
    "FinishReason",
    "Float32Array",
    "GetStats",
    "Grammar",
    "GroupEnded",
    "GroupReady",
    "Hello",
    "Int32Array",
    "Int64Array",
    "Message",
    "PromptLogprobs",
    "RequestFailed",
    "RequestOutput",
    "SamplingParams",
    "ScoredStepOutput",
    "Shutdown",
    "StartGroup",
    "StepInput",
    "StepOutput",
    "UInt8Array",
    "WorkerFailed",
    "WorkerReady",
]
