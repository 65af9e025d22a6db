"""What one step brought, in columns, one row for each sequence that got a token.

Knows nothing of clients: keys are whatever the caller named its requests.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tprt.coordinator.prompt_scoring import take_prompt_logprobs
from tprt.coordinator.sequence import SequenceTable, Slots
from tprt.coordinator.step import StepInFlight
from tprt.messages import (
    NO_FLOAT32,
    FinishReason,
    Float32Array,
    Int32Array,
    Int64Array,
    PromptLogprobs,
    StepOutput,
    UInt8Array,
)

_LENGTH = np.uint8(FinishReason.LENGTH)


@dataclass(frozen=True, slots=True)
class StepResult:
    """The news of one step.

    Attributes:
        keys: `[n]` object array, the keys of `Scheduler.add`.
        request_ids, token_ids, finish_reasons, num_cached_tokens, queue_s, logprobs, top_token_ids,
            top_logprobs, num_top: as in `RequestOutput`.
        prompt_logprobs: what is new of prompts, by key, also of those that got no token.
    """

    keys: NDArray[Any]
    request_ids: Int64Array
    token_ids: Int32Array
    finish_reasons: UInt8Array
    num_cached_tokens: Int32Array
    queue_s: Float32Array
    logprobs: Float32Array
    top_token_ids: Int32Array
    top_logprobs: Float32Array
    num_top: int
    prompt_logprobs: tuple[tuple[Hashable, PromptLogprobs], ...] = ()

    def select(self, rows: NDArray[np.bool_] | NDArray[np.intp]) -> StepResult:
        """Return the chosen rows of every column, and all that is new of prompts."""
        return StepResult(
            keys=self.keys[rows],
            request_ids=self.request_ids[rows],
            token_ids=self.token_ids[rows],
            finish_reasons=self.finish_reasons[rows],
            num_cached_tokens=self.num_cached_tokens[rows],
            queue_s=self.queue_s[rows] if len(self.queue_s) else self.queue_s,
            logprobs=self.logprobs[rows] if len(self.logprobs) else self.logprobs,
            top_token_ids=self._select_top(self.top_token_ids, rows),
            top_logprobs=self._select_top(self.top_logprobs, rows),
            num_top=self.num_top,
            prompt_logprobs=self.prompt_logprobs,
        )

    def _select_top(self, column: NDArray[Any], rows: NDArray[Any]) -> NDArray[Any]:
        if len(column) == 0:
            return column
        selected: NDArray[Any] = column.reshape(len(self.keys), self.num_top)[rows].ravel()
        return selected


def find_finish_reasons(table: SequenceTable, step: StepInFlight, token_ids: Int32Array) -> UInt8Array:
    """Return the `FinishReason` of each sampled row `[n]`; a stop token counts more than the length."""
    slots = step.sampled_slots
    # Booleans turn into codes by a multiplication; rows that stop are few, most steps have none.
    reasons = (step.sampled_positions + 1 >= table.max_tokens[slots]) * _LENGTH
    stops = (table.stop_ids[slots] == token_ids[:, None]).nonzero()[0]
    if len(stops):
        reasons[stops] = FinishReason.STOP
    return reasons


def make_result(
    table: SequenceTable, step: StepInFlight, output: StepOutput, finish_reasons: UInt8Array
) -> StepResult:
    """Return the news of a step, without sequences that had ended before it did.

    Log-probabilities of prompts that are in it count as sent from now on.
    """
    slots, scored = step.sampled_slots, step.scored_slots
    result = StepResult(
        keys=table.keys[slots],
        request_ids=table.request_ids[slots],
        token_ids=output.token_ids,
        finish_reasons=finish_reasons,
        num_cached_tokens=table.num_cached_tokens[slots],
        queue_s=_take_queue_times(table, slots),
        logprobs=output.logprobs,
        top_token_ids=output.top_token_ids,
        top_logprobs=output.top_logprobs,
        num_top=output.num_top,
        prompt_logprobs=take_prompt_logprobs(table, scored, output) if len(scored) else (),
    )
    ended = table.ended[slots]
    return result.select(~ended) if ended.any() else result


def _take_queue_times(table: SequenceTable, slots: Slots) -> Float32Array:
    """Return `queue_s` of the rows, of which each is told once; nothing where none is new, as in most steps."""
    waited_s: Float32Array = table.queue_s[slots]
    if not (waited_s >= 0).any():
        return NO_FLOAT32
    table.queue_s[slots] = -1
    return waited_s
