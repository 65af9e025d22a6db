"""One step of the running sequences: which rows it holds, its `StepInput`, and what is kept until it returns.

Knows nothing of policy: the rows are chosen elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tprt.coordinator.adjustment_columns import gather_adjustments
from tprt.coordinator.prompt_scoring import find_scored_slots, gather_prompt_rows
from tprt.coordinator.sequence import NO_SLOTS, PENDING_TOKEN, SequenceTable, Slots
from tprt.messages import Int32Array, StepInput


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows of one step, decodes first.

    Attributes:
        slots: `[S]` rows of the table.
        query_lens: `[S]` tokens of each.
        num_decodes: leading rows that have one token, from which the next is sampled.
    """

    slots: Slots
    query_lens: Int32Array
    num_decodes: int


@dataclass(frozen=True, slots=True)
class StepInFlight:
    """What is needed to make use of a step's output, whatever happens to its sequences meanwhile.

    Attributes:
        step: its sequence number.
        slots, context_lens: `[S]` its rows and their KV tokens after it.
        sampled_slots, sampled_positions: `[n]` where its tokens go.
        scored_slots: `[R]` whose prompt rows it has.
    """

    step: int
    slots: Slots
    context_lens: Int32Array
    sampled_slots: Slots
    sampled_positions: Int32Array
    scored_slots: Slots


def make_batch(table: SequenceTable, slots: Slots, query_lens: Int32Array) -> Batch:
    """Bring decodes to the front; both groups stay in order."""
    # A chunk of one token that does not end its prompt is no decode.
    is_decode = (query_lens == 1) & (table.num_computed_tokens[slots] + 1 == table.num_tokens[slots])
    num_decodes = int(np.count_nonzero(is_decode))
    if num_decodes < len(slots):
        order = np.argsort(~is_decode, kind="stable")
        slots, query_lens = slots[order], query_lens[order]
    return Batch(slots, query_lens, num_decodes)


def build_step_input(table: SequenceTable, batch: Batch, block_size: int, epoch: int, step: int) -> StepInput:
    """Gather what the workers need to run `batch`; the table's rows stay as they are."""
    slots = batch.slots
    context_lens = table.num_computed_tokens[slots] + batch.query_lens
    return StepInput(
        epoch=epoch,
        step=step,
        num_decodes=batch.num_decodes,
        seq_slots=slots.astype(np.int32),
        query_lens=batch.query_lens,
        context_lens=context_lens,
        token_ids=_gather_token_ids(table, batch, context_lens),
        block_ids=table.block_ids(slots, -(-context_lens // block_size)),
        samples=(context_lens == table.num_tokens[slots]).view(np.uint8),
        temperatures=table.temperatures[slots],
        top_ks=table.top_ks[slots],
        top_ps=table.top_ps[slots],
        min_ps=table.min_ps[slots],
        seeds=table.seeds[slots],
        num_logprobs=table.num_logprobs[slots],
        **(gather_adjustments(table, slots, context_lens) if table.num_adjusted else {}),
        **(gather_prompt_rows(table, slots, batch.query_lens, context_lens) if table.num_scored else {}),
    )


def advance(table: SequenceTable, slots: Slots, step: StepInput) -> StepInFlight:
    """Move the rows past `step`, with a pending token wherever one will be sampled."""
    sampled = slots[step.samples != 0]
    positions = table.num_tokens[sampled]
    table.num_computed_tokens[slots] = step.context_lens
    table.token_ids[sampled, positions] = PENDING_TOKEN
    table.num_tokens[sampled] += 1
    table.in_flight[slots] += 1
    scored = find_scored_slots(slots, step) if len(step.prompt_rows) else NO_SLOTS
    return StepInFlight(step.step, slots, step.context_lens, sampled, positions, scored)


def _gather_token_ids(table: SequenceTable, batch: Batch, context_lens: Int32Array) -> Int32Array:
    n = batch.num_decodes
    decodes = table.token_ids[batch.slots[:n], context_lens[:n] - 1]
    if n == len(batch.slots):
        return decodes
    ends, lens = context_lens[n:].tolist(), batch.query_lens[n:].tolist()
    rows = zip(batch.slots[n:].tolist(), ends, lens, strict=True)
    chunks = [table.token_ids[slot, end - length : end] for slot, end, length in rows]
    return np.concatenate([decodes, *chunks])


def share_budget(lens: Int32Array, budget: int) -> Int32Array:
    """Cut `lens` `[S]`, in place, to what each row computes next; decodes always get their one."""
    is_prefill = lens > 1
    if is_prefill.any():
        wanted = lens[is_prefill]
        budget -= len(lens) - len(wanted)
        before = np.cumsum(wanted) - wanted
        lens[is_prefill] = np.clip(budget - before, 0, wanted)
    return lens
