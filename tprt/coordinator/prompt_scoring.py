"""Log-probabilities of prompt tokens: what a step must find of them, and for whom what it has found is.

A prompt is scored as it is computed, from its first position to the last but one; how far that has come is
raised when a step is back, so what a preemption or a failed group undoes is neither lost nor sent twice. Knows
nothing of policy and of clients.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np

from tprt.coordinator.sequence import SequenceTable, Slots
from tprt.messages import Int32Array, PromptLogprobs, ScoredStepOutput, StepInput, StepOutput


def gather_prompt_rows(
    table: SequenceTable, slots: Slots, query_lens: Int32Array, context_lens: Int32Array
) -> dict[str, Any]:
    """Return the fields of `StepInput` that name the prompt tokens to score; none where there are none."""
    rows: list[Int32Array] = []
    targets: list[Int32Array] = []
    num_top = 0
    # Row of the step minus position in the sequence.
    shifts = np.cumsum(query_lens) - context_lens
    for row in np.flatnonzero(table.is_scored[slots]).tolist():
        slot = int(slots[row])
        sequence = table.sequence(slot)
        wanted = sequence.positions_to_score
        start, end = int(context_lens[row] - query_lens[row]), min(wanted.stop, int(context_lens[row]))
        # A step ahead has the last token alone, and begins behind all that the step in flight will have scored.
        first = max(wanted.start, start)
        if first < end:
            assert first == wanted.start, "a position to be scored has been left out"
            rows.append(np.arange(first, end, dtype=np.int32) + np.int32(shifts[row]))
            targets.append(table.token_ids[slot, first + 1 : end + 1])
            num_top = max(num_top, sequence.sampling.prompt_logprobs or 0)
    if not rows:
        return {}
    return {
        "prompt_rows": np.concatenate(rows),
        "prompt_row_targets": np.concatenate(targets),
        "num_prompt_top": num_top,
    }


def find_scored_slots(slots: Slots, step: StepInput) -> Slots:
    """Return whose each prompt row of `step` is, `[R]`, as slots of the table."""
    owners: Slots = slots[np.searchsorted(np.cumsum(step.query_lens), step.prompt_rows, side="right")]
    return owners


def take_prompt_logprobs(
    table: SequenceTable, scored_slots: Slots, output: StepOutput
) -> tuple[tuple[Hashable, PromptLogprobs], ...]:
    """Return what is to be sent to each request, by its key, and take note that it is sent.

    Sequences that ended before the step did get nothing.
    """
    assert isinstance(output, ScoredStepOutput), "an output without log-probabilities of prompts"
    assert len(output.prompt_logprobs) == len(scored_slots), "an output of the wrong length"
    firsts = np.flatnonzero(np.diff(scored_slots, prepend=-1)).tolist()
    news = []
    for first, end in zip(firsts, [*firsts[1:], len(scored_slots)], strict=True):
        slot = int(scored_slots[first])
        if not table.ended[slot]:
            news.append((table.keys[slot], _cut(table, slot, output, slice(first, end))))
            table.note_scored(slot, end - first)
    return tuple(news)


def _cut(table: SequenceTable, slot: int, output: ScoredStepOutput, rows: slice) -> PromptLogprobs:
    sequence = table.sequence(slot)
    num_top = sequence.sampling.prompt_logprobs or 0
    shape = (len(output.prompt_logprobs), output.num_prompt_top)
    return PromptLogprobs(
        request_id=sequence.request_id,
        logprobs=output.prompt_logprobs[rows],
        top_token_ids=output.prompt_top_token_ids.reshape(shape)[rows, :num_top].ravel(),
        top_logprobs=output.prompt_top_logprobs.reshape(shape)[rows, :num_top].ravel(),
        num_top=num_top,
    )
