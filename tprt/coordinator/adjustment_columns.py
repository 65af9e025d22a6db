"""The columns of a step that say what is done to logits, gathered from the sequences that want it.

Knows nothing of how it is done.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np

from tprt.coordinator.logit_adjuster import LogitAdjuster
from tprt.coordinator.sequence import SequenceTable, Slots
from tprt.messages import Int32Array, StepInput

_Row = tuple[int, LogitAdjuster]


def gather_adjustments(table: SequenceTable, slots: Slots, context_lens: Int32Array) -> dict[str, Any]:
    """Return those columns of `StepInput` that are not empty, by name.

    Args:
        table: its sequences take in their newest tokens.
        slots: `[S]` rows of the step.
        context_lens: `[S]` their KV tokens after it; a row is sampled if those are all its tokens.
    """
    wanted = table.is_adjusted[slots] & (context_lens == table.num_tokens[slots])
    rows: list[_Row] = []
    for row in wanted.nonzero()[0].tolist():
        slot = int(slots[row])
        adjuster = table.sequence(slot).adjuster
        assert adjuster is not None
        if adjuster.needs_newest:
            adjuster.take(table.token_ids[slot, : table.num_tokens[slot]])
        rows.append((row, adjuster))
    return {
        **_biases(rows, context_lens),
        **_penalties(rows, len(slots)),
        **_grammars(rows, context_lens),
    }


def failed_grammars(table: SequenceTable, step: StepInput) -> list[tuple[Hashable, str]]:
    """Return the key of each sequence of `step`, which is in flight, whose grammar cannot go on, and why."""
    failed = []
    for slot in step.seq_slots[step.grammar_rows].tolist():
        sequence = table.sequence(slot)
        assert sequence.adjuster is not None
        assert sequence.adjuster.grammar is not None
        if error := sequence.adjuster.grammar.error:
            failed.append((sequence.key, f"the output cannot go on in its grammar: {error}"))
    return failed


def _biases(rows: list[_Row], context_lens: Int32Array) -> dict[str, Any]:
    counts = np.zeros(len(context_lens), np.int32)
    token_ids, values = [], []
    for row, adjuster in rows:
        ids, added = adjuster.biases(int(context_lens[row]))
        counts[row] = len(ids)
        token_ids.append(ids)
        values.append(added)
    if not counts.any():
        return {}
    return {
        "bias_counts": counts,
        "bias_token_ids": np.concatenate(token_ids),
        "bias_values": np.concatenate(values),
    }


def _penalties(rows: list[_Row], num_rows: int) -> dict[str, Any]:
    counted = [
        (row, adjuster.penalties, adjuster.counts) for row, adjuster in rows if adjuster.counts is not None
    ]
    if not any(len(tokens.token_ids) for _, _, tokens in counted):
        return {}
    columns = np.zeros((3, num_rows), np.float32)
    columns[2] = 1.0
    columns[:, [row for row, _, _ in counted]] = np.array([penalties for _, penalties, _ in counted]).T
    counts = np.zeros(num_rows, np.int32)
    counts[[row for row, _, _ in counted]] = [len(tokens.token_ids) for _, _, tokens in counted]
    return {
        "penalty_counts": counts,
        "penalty_token_ids": np.concatenate([tokens.token_ids for _, _, tokens in counted]),
        "penalty_output_counts": np.concatenate([tokens.output_counts for _, _, tokens in counted]),
        "presence_penalties": columns[0],
        "frequency_penalties": columns[1],
        "repetition_penalties": columns[2],
    }


def _grammars(rows: list[_Row], context_lens: Int32Array) -> dict[str, Any]:
    states = [(row, adjuster, adjuster.grammar) for row, adjuster in rows if adjuster.grammar is not None]
    if not states:
        return {}
    masks = states[0][2].compiler.masks([state for _, _, state in states])
    for mask, (row, adjuster, _) in zip(masks, states, strict=True):
        adjuster.restrict(mask, int(context_lens[row]))
    return {"grammar_rows": np.array([row for row, _, _ in states], np.int32), "token_masks": masks.ravel()}
