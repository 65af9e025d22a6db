"""From a `StepInput` to the tensors of one forward pass: tokens, positions, context, sampling parameters.

All index arithmetic is numpy over whole columns. Knows nothing of the model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tprt.context import Context
from tprt.layers.noise import noise_keys
from tprt.layers.sampler import SamplingBatch
from tprt.messages import Int32Array, Int64Array, StepInput
from tprt.sharding import Range
from tprt.worker.adjustment_input import NUM_COLUMNS, adjustment_bytes, make_adjustments
from tprt.worker.prompt_logprobs import PromptRows, make_prompt_rows, prompt_row_bytes
from tprt.worker.step_transfer import StepTransfer, staged_bytes


@dataclass(frozen=True, slots=True)
class InputBatch:
    """What one step feeds to the model; `T` tokens, `S` sequences of which `n` are sampled.

    Attributes:
        token_ids, positions: `[T]` int64.
        context: for attention and LM head.
        sampling: None when no sequence is sampled.
        sampled_slots: `[n]` int64, the slots whose last token this step replaces.
        prompt_rows: where log-probabilities of prompt tokens are wanted; None when nowhere.
    """

    token_ids: Tensor
    positions: Tensor
    context: Context
    sampling: SamplingBatch | None
    sampled_slots: Tensor
    prompt_rows: PromptRows | None


@dataclass(frozen=True, slots=True)
class _SampledRows:
    """The sampled sequences of a step, as far as the next step with the same ones has them too.

    Attributes:
        rows: `[n]` which sequences of the step.
        slots: `[n]` their slots.
        seeds: `[n]` their seeds.
        sampling: their parameters, with noise keys of 0; None when there are none.
    """

    rows: NDArray[np.intp]
    slots: Tensor
    seeds: Int64Array
    sampling: SamplingBatch | None


class InputBuilder:
    """Builds the batches of one worker, and keeps the token that each slot sampled last."""

    def __init__(self, block_size: int, max_num_seqs: int, device: torch.device, vocab_rows: Range) -> None:
        """Start with nothing sampled; `vocab_rows` are the tokens that this rank has logits of."""
        self._block_size = block_size
        self._vocab_rows = vocab_rows
        self._transfer = StepTransfer(device)
        # One more than there are slots: padding of captured batches reads and writes the last.
        self.last_token_ids = torch.zeros(max_num_seqs + 1, dtype=torch.int64, device=device)
        self._sampled: _SampledRows
        self._sampled_key: tuple[bytes, ...] = ()

    def build(self, step: StepInput) -> InputBatch:
        """Build the tensors of `step`; those of the sampling parameters may be shared with other steps."""
        positions = token_positions(step)
        self._transfer.begin(_most_bytes(step, self._block_size))
        stage = self._transfer.stage
        token_ids = stage(step.token_ids.astype(np.int64))
        slots = None
        if len(step.token_ids) and step.token_ids.min() < 0:
            slots = stage(np.repeat(step.seq_slots, step.query_lens).astype(np.int64))
        positions_there = stage(positions)
        context = self._context(step, positions)
        sampled = self._sampled_rows(step)
        sampling = self._sampling_now(sampled, step)
        prompt_rows = make_prompt_rows(step, stage) if len(step.prompt_rows) else None
        self._transfer.flush()
        if slots is not None:
            token_ids = torch.where(token_ids < 0, self.last_token_ids[slots], token_ids)
        return InputBatch(token_ids, positions_there, context, sampling, sampled.slots, prompt_rows)

    def sampling_of(self, step: StepInput) -> tuple[SamplingBatch | None, Tensor]:
        """Return the sampling parameters of `step` and the slots that are sampled, and nothing else of it."""
        self._transfer.begin(_most_bytes(step, self._block_size))
        sampled = self._sampled_rows(step)
        sampling = self._sampling_now(sampled, step)
        self._transfer.flush()
        return sampling, sampled.slots

    def keep_sampled(self, sampled_slots: Tensor, token_ids: Tensor) -> None:
        """Remember `token_ids` `[n]` as the last tokens of the slots that were sampled."""
        self.last_token_ids.index_copy_(0, sampled_slots, token_ids)

    def _context(self, step: StepInput, positions: Int64Array) -> Context:
        num_blocks, starts = block_table_bounds(step, self._block_size)
        stage = self._transfer.stage
        slot_mapping = stage(slot_mapping_of(step, positions, starts, self._block_size))
        longest = int(step.context_lens.max())
        if step.num_decodes == len(step.query_lens):
            return Context(
                slot_mapping=slot_mapping,
                context_lens=stage(step.context_lens),
                block_tables=stage(padded_block_tables(step.block_ids, starts, num_blocks)),
                max_seqlen_k=longest,
            )
        n = step.num_decodes
        query_ends = np.cumsum(step.query_lens)
        # Without tables a prefill attends to its own tokens alone; decodes always read from blocks.
        from_cache = n > 0 or bool((step.context_lens > step.query_lens).any())
        tables = padded_block_tables(step.block_ids, starts, num_blocks) if from_cache else None
        return Context(
            is_prefill=True,
            cu_seqlens_q=stage(_running_sum(step.query_lens)),
            cu_seqlens_k=stage(_running_sum(step.context_lens)),
            max_seqlen_q=int(step.query_lens.max()),
            max_seqlen_k=longest,
            slot_mapping=slot_mapping,
            context_lens=stage(step.context_lens[:n]) if n else None,
            block_tables=None if tables is None else stage(tables),
            num_decodes=n,
            logits_indices=stage((query_ends - 1)[step.samples != 0].astype(np.int64)),
        )

    def _sampled_rows(self, step: StepInput) -> _SampledRows:
        """Return the sampled sequences; those of the last step when they and their parameters are the same."""
        columns = (
            *(step.samples, step.seq_slots, step.temperatures, step.top_ks, step.top_ps, step.min_ps),
            *(step.seeds, step.num_logprobs),
        )
        key = tuple(column.tobytes() for column in columns)
        if key != self._sampled_key:
            self._sampled = self._make_sampled_rows(step)
            self._sampled_key = key
        return self._sampled

    def _make_sampled_rows(self, step: StepInput) -> _SampledRows:
        rows, stage = np.flatnonzero(step.samples), self._transfer.stage
        return _SampledRows(
            rows=rows,
            slots=stage(step.seq_slots[rows].astype(np.int64)),
            seeds=step.seeds[rows],
            sampling=self._sampling(step, rows) if len(rows) else None,
        )

    def _sampling(self, step: StepInput, rows: NDArray[np.intp]) -> SamplingBatch:
        stage = self._transfer.stage
        temperatures = step.temperatures[rows]
        top_ks, top_ps, min_ps = step.top_ks[rows], step.top_ps[rows], step.min_ps[rows]
        num_logprobs = step.num_logprobs[rows]
        return SamplingBatch(
            temperatures=stage(temperatures),
            top_ks=stage(top_ks.astype(np.int64)),
            top_ps=stage(top_ps),
            min_ps=stage(min_ps),
            noise_keys=stage(np.zeros(len(rows), np.int64)),
            num_top=int(num_logprobs.max()) if (num_logprobs >= 0).any() else None,
            any_random=bool((temperatures > 0).any()),
            any_truncated=bool(truncated_rows(step)[rows].any()),
        )

    def _sampling_now(self, sampled: _SampledRows, step: StepInput) -> SamplingBatch | None:
        """Return the sampling parameters and what is this step's alone; nothing reads a greedy batch's keys."""
        same, stage = sampled.sampling, self._transfer.stage
        if same is None or not (same.any_random or step.adjusts_logits):
            return same
        return SamplingBatch(
            temperatures=same.temperatures,
            top_ks=same.top_ks,
            top_ps=same.top_ps,
            min_ps=same.min_ps,
            noise_keys=stage(noise_keys(sampled.seeds, step.context_lens[sampled.rows])),
            num_top=same.num_top,
            any_random=same.any_random,
            any_truncated=same.any_truncated,
            adjustments=make_adjustments(step, sampled.rows, self._vocab_rows, stage),
        )


def _most_bytes(step: StepInput, block_size: int) -> int:
    """Return a bound on the bytes of all columns that `build` stages."""
    num_tokens, num_seqs = len(step.token_ids), len(step.query_lens)
    longest = int(step.context_lens.max(initial=0))
    table_bytes = num_seqs * -(-longest // block_size) * 4
    # Four columns of 8 bytes a token; at most twelve of up to 8 bytes a sequence, some with one more entry.
    num_bytes = 32 * num_tokens + 96 * (num_seqs + 1) + table_bytes
    num_bytes += adjustment_bytes(step) + prompt_row_bytes(step)
    return staged_bytes(num_bytes, num_columns=22 + NUM_COLUMNS)


def truncated_rows(step: StepInput) -> NDArray[np.bool_]:
    """Return which rows `[S]` choose among a part of the tokens; a greedy one is its own maximum anyway."""
    truncates = (step.top_ks > 0) | (step.top_ps < 1) | (step.min_ps > 0)
    return truncates & (step.temperatures > 0)


def block_table_bounds(step: StepInput, block_size: int) -> tuple[Int32Array, Int64Array]:
    """Return the number of blocks of each table `[S]`, and where it begins in `step.block_ids`."""
    num_blocks = -(-step.context_lens // block_size)
    ends: Int64Array = num_blocks.cumsum(dtype=np.int64)
    return num_blocks, np.subtract(ends, num_blocks)


def slot_mapping_of(step: StepInput, positions: Int64Array, starts: Int64Array, block_size: int) -> Int64Array:
    """Return the KV slot of every query token; `starts` `[S]` is where each block table begins."""
    first_block = starts.repeat(step.query_lens)
    block: Int64Array = step.block_ids[first_block + positions // block_size].astype(np.int64)
    return block * block_size + positions % block_size


def token_positions(step: StepInput) -> Int64Array:
    """Return the position of every query token: the last `query_len` of each sequence's `context_len`."""
    if step.num_decodes == len(step.query_lens):
        return step.context_lens.astype(np.int64) - 1
    ends = np.cumsum(step.query_lens)
    shift = step.context_lens.astype(np.int64) - ends
    return np.arange(ends[-1], dtype=np.int64) + np.repeat(shift, step.query_lens)


def padded_block_tables(block_ids: Int32Array, starts: Int64Array, num_blocks: Int32Array) -> Int32Array:
    """Lay the end-to-end tables, which begin at `starts`, out as rows padded with block 0: `[S, B]`."""
    shortest, width = int(num_blocks.min()), int(num_blocks.max())
    if shortest == width:
        return block_ids.reshape(-1, width)
    # A row for each entry, of that entry and those after it: rows that overlap in memory. Copying whole rows
    # takes a third of the time of an assignment through a mask, which goes entry by entry.
    padded = np.concatenate([block_ids, np.zeros(width, np.int32)])
    windows: Int32Array = np.ndarray((len(block_ids), width), np.int32, padded, 0, padded.strides * 2)
    tables = windows[starts]
    # The head of the next table is behind that of a shorter one.
    tables[:, shortest:][np.arange(shortest, width, dtype=np.int32) >= num_blocks[:, None]] = 0
    return tables


def _running_sum(lens: Int32Array) -> Int32Array:
    sums = np.zeros(len(lens) + 1, np.int32)
    np.cumsum(lens, out=sums[1:])
    return sums
