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


@dataclass(frozen=True, slots=True)
class InputBatch:
    """What one step feeds to the model; `T` tokens, `S` sequences of which `n` are sampled.

    Attributes:
        token_ids, positions: `[T]` int64.
        context: for attention and LM head.
        sampling: None when no sequence is sampled.
        sampled_slots: `[n]` int64, the slots whose last token this step replaces.
    """

    token_ids: Tensor
    positions: Tensor
    context: Context
    sampling: SamplingBatch | None
    sampled_slots: Tensor


class InputBuilder:
    """Builds the batches of one worker, and keeps the token that each slot sampled last."""

    def __init__(self, block_size: int, max_num_seqs: int, device: torch.device) -> None:
        self._block_size = block_size
        self._device = device
        self._last_token_ids = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)

    def build(self, step: StepInput) -> InputBatch:
        """Build the tensors of `step`."""
        num_blocks = -(-step.context_lens // self._block_size)
        positions = _positions(step)
        tables = _padded_block_tables(step.block_ids, num_blocks)
        sampled = np.flatnonzero(step.samples)
        return InputBatch(
            token_ids=self._token_ids(step),
            positions=self._to_device(positions),
            context=self._context(step, positions, tables),
            sampling=self._sampling(step, sampled) if len(sampled) else None,
            sampled_slots=self._to_device(step.seq_slots[sampled].astype(np.int64)),
        )

    def keep_sampled(self, batch: InputBatch, token_ids: Tensor) -> None:
        """Remember `token_ids` `[n]` as the last tokens of the slots that were sampled."""
        self._last_token_ids.index_copy_(0, batch.sampled_slots, token_ids)

    def _token_ids(self, step: StepInput) -> Tensor:
        token_ids = self._to_device(step.token_ids.astype(np.int64))
        if len(step.token_ids) == 0 or step.token_ids.min() >= 0:
            return token_ids
        slots = self._to_device(np.repeat(step.seq_slots, step.query_lens).astype(np.int64))
        return torch.where(token_ids < 0, self._last_token_ids[slots], token_ids)

    def _context(self, step: StepInput, positions: Int64Array, tables: Int32Array) -> Context:
        slot_mapping = self._to_device(self._slot_mapping(step, positions, tables))
        longest = int(step.context_lens.max())
        if step.num_decodes == len(step.query_lens):
            return Context(
                slot_mapping=slot_mapping,
                context_lens=self._to_device(step.context_lens),
                block_tables=self._to_device(tables),
                max_seqlen_k=longest,
            )
        n = step.num_decodes
        ends = np.cumsum(step.query_lens)
        # Without tables a prefill attends to its own tokens alone; decodes always read from blocks.
        from_cache = n > 0 or bool((step.context_lens > step.query_lens).any())
        return Context(
            is_prefill=True,
            cu_seqlens_q=self._to_device(_running_sum(step.query_lens)),
            cu_seqlens_k=self._to_device(_running_sum(step.context_lens)),
            max_seqlen_q=int(step.query_lens.max()),
            max_seqlen_k=longest,
            slot_mapping=slot_mapping,
            context_lens=self._to_device(step.context_lens[:n]) if n else None,
            block_tables=self._to_device(tables) if from_cache else None,
            num_decodes=n,
            logits_indices=self._to_device((ends - 1)[step.samples != 0].astype(np.int64)),
        )

    def _slot_mapping(self, step: StepInput, positions: Int64Array, tables: Int32Array) -> Int64Array:
        sequence = np.repeat(np.arange(len(step.query_lens)), step.query_lens)
        block = tables[sequence, positions // self._block_size].astype(np.int64)
        return block * self._block_size + positions % self._block_size

    def _sampling(self, step: StepInput, sampled: NDArray[np.intp]) -> SamplingBatch:
        temperatures = step.temperatures[sampled]
        top_ks, top_ps, min_ps = step.top_ks[sampled], step.top_ps[sampled], step.min_ps[sampled]
        truncates = (top_ks > 0) | (top_ps < 1) | (min_ps > 0)
        num_logprobs = step.num_logprobs[sampled]
        return SamplingBatch(
            temperatures=self._to_device(temperatures),
            top_ks=self._to_device(top_ks.astype(np.int64)),
            top_ps=self._to_device(top_ps),
            min_ps=self._to_device(min_ps),
            noise_keys=self._to_device(noise_keys(step.seeds[sampled], step.context_lens[sampled])),
            num_top=int(num_logprobs.max()) if (num_logprobs >= 0).any() else None,
            any_random=bool((temperatures > 0).any()),
            # A greedy row is its own maximum, truncated or not.
            any_truncated=bool((truncates & (temperatures > 0)).any()),
        )

    def _to_device(self, column: NDArray[np.generic]) -> Tensor:
        tensor = torch.from_numpy(column if column.flags.writeable else column.copy())
        return tensor.to(self._device, non_blocking=True)


def _positions(step: StepInput) -> Int64Array:
    """Return the position of every query token: the last `query_len` of each sequence's `context_len`."""
    if step.num_decodes == len(step.query_lens):
        return step.context_lens.astype(np.int64) - 1
    ends = np.cumsum(step.query_lens)
    shift = step.context_lens.astype(np.int64) - ends
    return np.arange(ends[-1], dtype=np.int64) + np.repeat(shift, step.query_lens)


def _padded_block_tables(block_ids: Int32Array, num_blocks: Int32Array) -> Int32Array:
    """Lay the end-to-end tables out as rows, padded with block 0: `[S, B]`."""
    used = np.arange(num_blocks.max()) < num_blocks[:, None]
    tables = np.zeros(used.shape, np.int32)
    tables[used] = block_ids
    return tables


def _running_sum(lens: Int32Array) -> Int32Array:
    sums = np.zeros(len(lens) + 1, np.int32)
    np.cumsum(lens, out=sums[1:])
    return sums
