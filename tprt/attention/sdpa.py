"""Attention in plain torch: for CPUs, and the oracle that every other backend is tested against.

Blocks are gathered into contiguous keys and values first, then `scaled_dot_product_attention` runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from tprt.attention.backend import AttentionBackend
from tprt.context import Context

# Batched decode pads every sequence to the longest; beyond this ratio of padded to real tokens a loop over
# sequences reads less.
_MAX_PADDING = 2.0


@dataclass(frozen=True, slots=True)
class _Step:
    context: Context
    chunks: list[tuple[int, int, int, int]]
    """Sequence, first and last token, and KV length of each prefill chunk."""
    decode_lens: list[int]
    decode_mask: Tensor | None


class SdpaBackend(AttentionBackend):
    """`torch.nn.functional.scaled_dot_product_attention` over gathered blocks."""

    name: ClassVar[str] = "sdpa"
    capturable: ClassVar[bool] = False

    def __init__(self, scale: float) -> None:
        self._scale = scale
        self._step: _Step | None = None

    def write_kv(self, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        flat = kv_cache.flatten(1, 2)
        flat[0].index_copy_(0, slot_mapping, key)
        flat[1].index_copy_(0, slot_mapping, value)

    def prefill(self, qkv: tuple[Tensor, Tensor, Tensor], kv_cache: Tensor, context: Context) -> Tensor:
        query, key, value = qkv
        step, n = self._prepare(context), context.num_decodes
        output = torch.empty_like(query)
        if n:
            output[:n] = self.decode(query[:n], kv_cache, context)
        for i, start, stop, k_len in step.chunks:
            if context.block_tables is None:
                k, v = key[start:stop], value[start:stop]
            else:
                k, v = _gather(kv_cache, context.block_tables[i], k_len)
            output[start:stop] = self._causal(query[start:stop], k, v)
        return output

    def decode(self, query: Tensor, kv_cache: Tensor, context: Context) -> Tensor:
        assert context.block_tables is not None
        step, num_seqs = self._prepare(context), query.shape[0]
        longest = max(step.decode_lens)
        if num_seqs > 1 and num_seqs * longest > _MAX_PADDING * sum(step.decode_lens):
            return self._decode_one_by_one(query, kv_cache, context)
        tables = context.block_tables[:num_seqs, : -(-longest // kv_cache.shape[2])]
        blocks = (cache.index_select(0, tables.flatten()) for cache in kv_cache.unbind())
        k, v = (b.view(num_seqs, -1, *b.shape[2:])[:, :longest].transpose(1, 2) for b in blocks)
        # The query heads of a KV group become rows of one matrix: keys and values are read once for them.
        grouped = query.reshape(num_seqs, k.shape[1], -1, query.shape[-1])
        result = functional.scaled_dot_product_attention(
            grouped, k, v, attn_mask=step.decode_mask, scale=self._scale
        )
        return result.reshape(query.shape)

    def _decode_one_by_one(self, query: Tensor, kv_cache: Tensor, context: Context) -> Tensor:
        assert context.block_tables is not None
        rows = [
            self._causal(query[i : i + 1], *_gather(kv_cache, context.block_tables[i], length))
            for i, length in enumerate(self._prepare(context).decode_lens)
        ]
        return torch.cat(rows)

    def _prepare(self, context: Context) -> _Step:
        """Return what all layers of this step share, made by the first of them."""
        if self._step is None or self._step.context is not context:
            self._step = _Step(context, *_chunks_and_decodes(context), _padding_mask(context))
        return self._step

    def _causal(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend with the last `Q` of `K` tokens: `[Q, h, D]` over `[K, kv, D]`."""
        num_q, num_k = query.shape[0], key.shape[0]
        mask = None
        if 1 < num_q < num_k:
            rows = torch.arange(num_k - num_q, num_k, device=query.device).unsqueeze(1)
            mask = torch.arange(num_k, device=query.device).unsqueeze(0) <= rows
        result = functional.scaled_dot_product_attention(
            query.transpose(0, 1).unsqueeze(0),
            key.transpose(0, 1).unsqueeze(0),
            value.transpose(0, 1).unsqueeze(0),
            attn_mask=mask,
            is_causal=num_q == num_k and num_q > 1,
            scale=self._scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return result.squeeze(0).transpose(0, 1)


def _gather(kv_cache: Tensor, block_table: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Collect the first `length` keys and values `[length, kv, D]` of one sequence."""
    num_blocks = -(-length // kv_cache.shape[2])
    key, value = (cache.index_select(0, block_table[:num_blocks]).flatten(0, 1) for cache in kv_cache.unbind())
    return key[:length], value[:length]


def _chunks_and_decodes(context: Context) -> tuple[list[tuple[int, int, int, int]], list[int]]:
    decode_lens = [] if context.context_lens is None else context.context_lens.tolist()
    if not context.is_prefill:
        return [], decode_lens
    assert context.cu_seqlens_q is not None
    assert context.cu_seqlens_k is not None
    starts, k_lens = context.cu_seqlens_q.tolist(), context.cu_seqlens_k.diff().tolist()
    chunks = [(i, starts[i], starts[i + 1], k_lens[i]) for i in range(context.num_decodes, len(k_lens))]
    return chunks, decode_lens


def _padding_mask(context: Context) -> Tensor | None:
    """Hide what lies after each decode's tokens, `[S, 1, 1, K]`; None when all are equally long."""
    if context.context_lens is None:
        return None
    lens = context.context_lens.unsqueeze(1)
    shown = torch.arange(int(lens.max()), device=lens.device).unsqueeze(0) < lens
    return None if bool(shown.all()) else shown[:, None, None, :]
