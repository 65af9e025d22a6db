"""Every message between processes: one immutable type for each hop.

Arrays are numpy columns, one entry per sequence or per token, and travel as packed bytes. Knows nothing of
how a message is encoded (`tprt.transport.codec`) or carried. Each message carries the epoch of the worker
group where it can be stale.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from tprt.errors import InvalidRequestError

Int32Array = NDArray[np.int32]
Int64Array = NDArray[np.int64]
Float32Array = NDArray[np.float32]
UInt8Array = NDArray[np.uint8]

MAX_LOGPROBS = 20
_NO_INT32 = np.empty(0, np.int32)
_NO_FLOAT32 = np.empty(0, np.float32)


class FinishReason(IntEnum):
    """Why a request ended; `NONE` while it runs."""

    NONE = 0
    STOP = 1
    LENGTH = 2
    ABORT = 3


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of one request are chosen and when they end.

    Attributes:
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of tokens whose probability reaches this.
        min_p: drop tokens less likely than this share of the most likely one.
        seed: noise is a function of (seed, position); None draws a seed for the request.
        max_tokens: most tokens to generate.
        ignore_eos: go on past the end-of-sequence tokens of the model.
        stop: strings that end the output; they are not part of it.
        stop_token_ids: further token ids that end the output.
        logprobs: number of most likely tokens to report with each token, besides the chosen one; None: none.

    Raises:
        InvalidRequestError: a value is out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int = 16
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        self._check("temperature", self.temperature, 0.0 <= self.temperature < 1e4, "from 0 to 10000")
        self._check("top_k", self.top_k, 0 <= self.top_k < 2**31, "0 (all tokens) or more")
        self._check("top_p", self.top_p, 0.0 < self.top_p <= 1.0, "above 0, at most 1")
        self._check("min_p", self.min_p, 0.0 <= self.min_p <= 1.0, "from 0 to 1")
        self._check("max_tokens", self.max_tokens, self.max_tokens >= 1, "1 or more")
        self._check("seed", self.seed, self.seed is None or 0 <= self.seed < 2**63, "from 0 to 2**63 - 1")
        logprobs_ok = self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS
        self._check("logprobs", self.logprobs, logprobs_ok, f"from 0 to {MAX_LOGPROBS}")
        self._check("stop", self.stop, all(self.stop), "strings that are not empty")

    @staticmethod
    def _check(name: str, value: object, ok: bool, expected: str) -> None:
        if not ok:
            raise InvalidRequestError(f"sampling parameter {name} is {value!r}; expected {expected}")


@dataclass(frozen=True, slots=True)
class Hello:
    """Client to coordinator: tell me when you are ready (answered by `EngineReady`)."""


@dataclass(frozen=True, slots=True)
class AddRequest:
    """Client to coordinator: generate from `prompt_token_ids` `[P]`; `request_id` is the client's own."""

    request_id: int
    prompt_token_ids: Int32Array
    sampling: SamplingParams


@dataclass(frozen=True, slots=True)
class AbortRequest:
    """Client to coordinator: forget the request, whatever state it is in."""

    request_id: int


@dataclass(frozen=True, slots=True)
class Shutdown:
    """Client to coordinator, and coordinator to workers: finish nothing more and exit."""

    reason: str = ""


@dataclass(frozen=True, slots=True)
class StepInput:
    """Coordinator to workers: one scheduled batch of `S` sequences with `T` query tokens in all.

    Complete: a worker needs its weights, its KV blocks and the tokens it sampled last, nothing else.
    Decodes (one query token, sampled) come first.

    Attributes:
        epoch: the worker group that this step is for.
        step: sequence number; the first one of an epoch is 0.
        num_decodes: leading sequences that are decodes.
        seq_slots: `[S]` place of each sequence among the running ones, stable while it runs.
        query_lens: `[S]` tokens of each sequence in this step.
        context_lens: `[S]` KV tokens of each sequence after this step.
        token_ids: `[T]` input tokens; -1 stands for the token that the worker sampled last for that slot.
        block_ids: the block table of each sequence, `ceil(context_lens / block_size)` ids, end to end.
        samples: `[S]` 1 where a token is to be sampled from the sequence's last position.
        temperatures, top_ks, top_ps, min_ps, seeds, num_logprobs: `[S]` sampling parameters;
            `num_logprobs` is -1 where none are wanted.
    """

    epoch: int
    step: int
    num_decodes: int
    seq_slots: Int32Array
    query_lens: Int32Array
    context_lens: Int32Array
    token_ids: Int32Array
    block_ids: Int32Array
    samples: UInt8Array
    temperatures: Float32Array
    top_ks: Int32Array
    top_ps: Float32Array
    min_ps: Float32Array
    seeds: Int64Array
    num_logprobs: Int32Array


@dataclass(frozen=True, slots=True)
class StepOutput:
    """Rank 0 to coordinator: what one step sampled, in the order of `StepInput` sequences with `samples` 1.

    Attributes:
        token_ids: `[n]` sampled tokens.
        logprobs: `[n]` their log-probabilities, or empty when no sequence wants any.
        top_token_ids, top_logprobs: `[n * num_top]` most likely tokens, best first.
        num_top: entries per sequence in the two arrays above.
    """

    epoch: int
    step: int
    token_ids: Int32Array
    logprobs: Float32Array = field(default_factory=lambda: _NO_FLOAT32)
    top_token_ids: Int32Array = field(default_factory=lambda: _NO_INT32)
    top_logprobs: Float32Array = field(default_factory=lambda: _NO_FLOAT32)
    num_top: int = 0


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """Coordinator to client: the news of one step for `n` of this client's requests.

    Attributes:
        request_ids: `[n]` the client's ids.
        token_ids: `[n]` the new token, or -1 where a request ended without one (abort).
        finish_reasons: `[n]` a `FinishReason`.
        num_cached_tokens: `[n]` prompt tokens that came from the prefix cache.
        logprobs, top_token_ids, top_logprobs, num_top: as in `StepOutput`.
    """

    request_ids: Int64Array
    token_ids: Int32Array
    finish_reasons: UInt8Array
    num_cached_tokens: Int32Array
    logprobs: Float32Array = field(default_factory=lambda: _NO_FLOAT32)
    top_token_ids: Int32Array = field(default_factory=lambda: _NO_INT32)
    top_logprobs: Float32Array = field(default_factory=lambda: _NO_FLOAT32)
    num_top: int = 0


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


@dataclass(frozen=True, slots=True)
class WorkerReady:
    """A rank to the coordinator, on the control lane: weights are loaded and KV blocks allocated."""

    epoch: int
    rank: int
    num_blocks: int
    weight_bytes: int
    kv_bytes: int
    load_s: float


@dataclass(frozen=True, slots=True)
class WorkerFailed:
    """A rank to the coordinator, on the control lane, at any time: it cannot go on."""

    epoch: int
    rank: int
    phase: str
    error: str
    traceback: str


@dataclass(frozen=True, slots=True)
class StartGroup:
    """Coordinator to supervisor: start the ranks of a new epoch."""

    epoch: int


@dataclass(frozen=True, slots=True)
class GroupReady:
    """Coordinator to supervisor: every rank of the epoch is ready; from now on its end need not be the end."""

    epoch: int


@dataclass(frozen=True, slots=True)
class EndGroup:
    """Coordinator to supervisor: kill the ranks of the epoch, which failed of `cause`; see `GroupEnded`."""

    epoch: int
    cause: str


@dataclass(frozen=True, slots=True)
class GroupEnded:
    """Supervisor to coordinator: every process of the epoch is gone.

    Attributes:
        epoch: the worker group.
        cause: what came first, with traceback and last log lines.
        kind: a `CauseKind` of the coordinator's.
        is_input_error: nothing but the user can put it right.
        is_from_outside: a signal that nobody in the group raises by itself.
    """

    epoch: int
    cause: str
    kind: int
    is_input_error: bool
    is_from_outside: bool


Message = (
    Hello
    | AddRequest
    | AbortRequest
    | Shutdown
    | StepInput
    | StepOutput
    | RequestOutput
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
