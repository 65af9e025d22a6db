"""Log-probabilities of prompt tokens: where a step wants them, and how they are made from its hidden states.

They are made in parts that have no more rows than a step can sample, and each part leaves the device before the
next: however long a prompt is, its logits take no more memory than those of the sampled tokens, which are gone
by then. Rows of logits are gathered from all ranks, so any number of ranks has the same.

Knows nothing of sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tprt.context import Context, reset_context, set_context
from tprt.layers.sampler import Sampled, Sampler
from tprt.messages import StepInput
from tprt.models import DecoderForCausalLM

Stage = Callable[[NDArray[np.generic]], Tensor]


@dataclass(frozen=True, slots=True)
class PromptRows:
    """`R` places of prompts.

    Attributes:
        indices: `[R]` int64, tokens of the step.
        targets: `[R]` int64, the tokens that follow them.
        num_top: most likely tokens to report at each place.
    """

    indices: Tensor
    targets: Tensor
    num_top: int


def make_prompt_rows(step: StepInput, stage: Stage) -> PromptRows:
    """Return the places of `step` on the device that `stage` brings columns to."""
    indices, targets = step.prompt_rows.astype(np.int64), step.prompt_row_targets.astype(np.int64)
    return PromptRows(stage(indices), stage(targets), step.num_prompt_top)


def prompt_row_bytes(step: StepInput) -> int:
    """Return the bytes of the columns that `make_prompt_rows` stages."""
    return 2 * np.int64().itemsize * len(step.prompt_rows)


def compute_prompt_logprobs(
    model: DecoderForCausalLM, sampler: Sampler, hidden: Tensor, rows: PromptRows, most_rows: int
) -> Sampled:
    """Return the log-probabilities of `rows`, on the host, from `hidden` `[T, H]`, `most_rows` at a time."""
    cut = zip(torch.split(rows.indices, most_rows), torch.split(rows.targets, most_rows), strict=True)
    parts = [_compute_part(model, sampler, hidden, PromptRows(*part, rows.num_top)) for part in cut]
    return Sampled(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def _compute_part(
    model: DecoderForCausalLM, sampler: Sampler, hidden: Tensor, rows: PromptRows
) -> tuple[Tensor, ...]:
    set_context(Context(logits_indices=rows.indices))
    try:
        scored = sampler.score(model.compute_logits(hidden), rows.targets, rows.num_top)
    finally:
        reset_context()
    assert scored.logprobs is not None
    assert scored.top_token_ids is not None
    assert scored.top_logprobs is not None
    columns = (scored.token_ids, scored.logprobs, scored.top_token_ids, scored.top_logprobs)
    return tuple(column.cpu() for column in columns)
