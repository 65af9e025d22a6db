"""From a `StepInput` to the adjustments of this rank's logits.

Places are computed here, with numpy, so that the device has nothing to look for. Knows nothing of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tprt.layers.logit_adjustments import LogitAdjustments
from tprt.messages import Int32Array, Int64Array, StepInput
from tprt.sharding import Range

Stage = Callable[[NDArray[Any]], Tensor]
# Columns that are staged, and the bytes of an entry of biases and of penalties.
NUM_COLUMNS = 7
_BIAS_BYTES, _PENALTY_BYTES = 8 + 4, 8 + 4 + 4


def adjustment_bytes(step: StepInput) -> int:
    """Return the most bytes that the adjustments of `step` take."""
    biases, penalties = len(step.bias_token_ids), len(step.penalty_token_ids)
    masks = 8 * len(step.grammar_rows) + step.token_masks.nbytes
    return biases * _BIAS_BYTES + penalties * _PENALTY_BYTES + masks


def make_adjustments(
    step: StepInput, sampled: NDArray[np.intp], vocab_rows: Range, stage: Stage
) -> LogitAdjustments | None:
    """Return what is done to the logits `[n, v]` of the `sampled` sequences `[n]` of `step`, None for nothing.

    Either all ranks have something or none has, though a rank's own columns may be empty.

    Args:
        step: the whole step.
        sampled: which of its sequences are sampled, in their order.
        vocab_rows: the tokens that this rank has logits of.
        stage: takes a column to the device.
    """
    if not step.adjusts_logits:
        return None
    bias_places, is_own = _places(step.bias_counts, step.bias_token_ids, sampled, vocab_rows)
    penalty_places, is_own_penalty = _places(step.penalty_counts, step.penalty_token_ids, sampled, vocab_rows)
    divisors, subtrahends = _penalties(step)
    return LogitAdjustments(
        bias_places=stage(bias_places),
        bias_values=stage(step.bias_values[is_own]),
        penalty_places=stage(penalty_places),
        divisors=stage(divisors[is_own_penalty]),
        subtrahends=stage(subtrahends[is_own_penalty]),
        mask_rows=stage(np.searchsorted(sampled, step.grammar_rows).astype(np.int64)),
        masks=stage(_own_bytes(step, vocab_rows)),
        first_bit=vocab_rows.start % 8,
    )


def _places(
    counts: Int32Array, token_ids: Int32Array, sampled: NDArray[np.intp], vocab_rows: Range
) -> tuple[Int64Array, NDArray[np.bool_]]:
    """Return the place of each of this rank's tokens in its logits, and which of `token_ids` those are."""
    is_own = (token_ids >= vocab_rows.start) & (token_ids < vocab_rows.stop)
    if len(counts) == 0:
        return np.empty(0, np.int64), is_own
    # Only sequences that are sampled have any.
    rows = np.repeat(np.arange(len(sampled)), counts[sampled])[is_own]
    places: Int64Array = rows * vocab_rows.size + (token_ids[is_own] - vocab_rows.start)
    return places, is_own


def _penalties(step: StepInput) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return what each penalised token is divided by, and what is taken off it."""
    repetition, presence, frequency = (
        np.repeat(column, step.penalty_counts)
        for column in (step.repetition_penalties, step.presence_penalties, step.frequency_penalties)
    )
    counts = step.penalty_output_counts
    return repetition, frequency * counts.astype(np.float32) + presence * (counts > 0)


def _own_bytes(step: StepInput, vocab_rows: Range) -> NDArray[np.uint8]:
    """Return the bytes of each mask that hold this rank's tokens, `[G, B]`."""
    num_rows = len(step.grammar_rows)
    if num_rows == 0:
        return np.empty((0, 0), np.uint8)
    masks = step.token_masks.view(np.uint8).reshape(num_rows, -1)
    return np.ascontiguousarray(masks[:, vocab_rows.start // 8 : -(-vocab_rows.stop // 8)])
