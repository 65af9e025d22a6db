"""Attention by Triton kernels of our own: any CUDA GPU that Triton compiles for, no package beyond torch's own.

Knows nothing of what the kernels do inside (`triton_kernels.py`) and how their tiles are cut
(`triton_tiles.py`).
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from tprt.attention.backend import AttentionBackend
from tprt.attention.triton_decode import decode_kernel, merge_kernel
from tprt.attention.triton_kernels import prefill_kernel, store_kernel
from tprt.attention.triton_tiles import Traits, decode_tile, num_splits, padded, prefill_tile, prepares_heads
from tprt.context import Context
from tprt.kernels.dependent_launch import dependent_options
from tprt.kernels.preparation import Preparation


def store_kv(key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
    """Store keys and values `[T, kv, D]` at their slots of `kv_cache`; those of slot -1 nowhere."""
    if len(slot_mapping) == 0:
        return
    key, value = _end_to_end(key), _end_to_end(value)
    key_cache, value_cache = kv_cache.unbind()
    size = key.shape[1] * key.shape[2]
    store_kernel[(len(slot_mapping),)](
        *(key, value, key_cache, value_cache, slot_mapping),
        *(key.stride(0), value.stride(0), key_cache.stride(1)),
        num_elements=size,
        padded_elements=padded(size),
    )


# What a program that has all of a sequence's tokens fetches while the kernel before still runs.
_TILES_AHEAD = 2


class TritonBackend(AttentionBackend):
    """Paged attention with split-KV decode."""

    name: ClassVar[str] = "triton"
    capturable: ClassVar[bool] = True

    def __init__(self, scale: float) -> None:
        self._scale_log2 = scale * math.log2(math.e)
        self._traits: Traits | None = None

    def write_kv(self, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        store_kv(key, value, kv_cache, slot_mapping)

    def prefill(self, qkv: tuple[Tensor, Tensor, Tensor], kv_cache: Tensor, context: Context) -> Tensor:
        assert context.cu_seqlens_q is not None
        query, n = _end_to_end(qkv[0]), context.num_decodes
        output = _empty(query)
        if n:
            self._decode(output[:n], query[:n], kv_cache, context)
        if len(context.cu_seqlens_q) - 1 > n:
            self._chunks(output, (query, qkv[1], qkv[2]), kv_cache, context)
        return output

    def decode(self, query: Tensor, kv_cache: Tensor, context: Context) -> Tensor:
        output = _empty(query)
        self._decode(output, _end_to_end(query), kv_cache, context)
        return output

    def prepares(self, num_seqs: int, kv_cache: Tensor) -> bool:
        return prepares_heads(num_seqs, kv_cache.shape[3], self._traits_of(kv_cache.device).processors)

    def prepare_and_decode(self, heads: Tensor, how: Preparation, kv_cache: Tensor, context: Context) -> Tensor:
        (num_seqs, num_heads, head_dim), kv_heads = heads.shape, kv_cache.shape[3]
        output = heads.new_empty(num_seqs, num_heads - 2 * kv_heads, head_dim)
        self._decode(output, heads, kv_cache, context, how)
        return output

    def _decode(
        self, output: Tensor, query: Tensor, kv_cache: Tensor, context: Context, how: Preparation | None = None
    ) -> None:
        """Attend with one token of each sequence over its tokens in `splits` parts, and merge the parts.

        `query` `[S, h, D]`, or with `how` they become that all projected heads `[S, h + 2 kv, D]`.
        """
        assert context.block_tables is not None
        (num_seqs, heads, head_dim), (block_size, kv_heads) = output.shape, kv_cache.shape[2:4]
        traits = self._traits_of(query.device)
        splits, prepares = num_splits(num_seqs, kv_heads, traits.processors), how is not None
        tile = decode_tile(heads // kv_heads, head_dim, query.element_size(), traits, prepares)
        partial = lse = output
        if splits > 1:
            partial = output.new_empty(num_seqs, heads, splits, head_dim, dtype=torch.float32)
            lse = output.new_empty(num_seqs, heads, splits, dtype=torch.float32)
        key_cache, value_cache = kv_cache.unbind()
        decode_kernel[(kv_heads, splits, num_seqs)](
            *(partial, lse, query, key_cache, value_cache, context.block_tables, context.context_lens),
            *_tables_and_weights(query, how),
            *(self._scale_log2, query.stride(0), key_cache.stride(1), context.block_tables.stride(0)),
            group=heads // kv_heads,
            rows=tile.rows,
            head_dim=head_dim,
            padded_dim=padded(head_dim),
            block_size=block_size,
            tile=tile.tokens,
            num_splits=splits,
            prepares=prepares,
            norms=how is not None and how.norms is not None,
            ahead=_TILES_AHEAD * tile.tokens if prepares and splits == 1 else 0,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            **dependent_options(query.device),
        )
        if splits > 1:
            merge_kernel[(heads, num_seqs)](
                *(output, partial, lse, context.context_lens),
                head_dim=head_dim,
                padded_dim=padded(head_dim),
                tile=tile.tokens,
                num_splits=splits,
                **dependent_options(query.device),
            )

    def _chunks(
        self, output: Tensor, qkv: tuple[Tensor, Tensor, Tensor], kv_cache: Tensor, context: Context
    ) -> None:
        """Attend with the sequences behind the decodes, into their rows of `output` `[T, h, D]`."""
        assert context.cu_seqlens_q is not None
        assert context.cu_seqlens_k is not None
        query, n = qkv[0], context.num_decodes
        (_, heads, head_dim), kv_heads = query.shape, qkv[1].shape[1]
        tables, keys, values, block_size = _where_keys_are(qkv, kv_cache, context)
        traits = self._traits_of(query.device)
        tile = prefill_tile(context.max_seqlen_q, head_dim, query.element_size(), traits)
        num_seqs = len(context.cu_seqlens_q) - 1 - n
        prefill_kernel[(-(-context.max_seqlen_q // tile.rows), heads, num_seqs)](
            *(output, query, keys, values, tables, context.cu_seqlens_q[n:], context.cu_seqlens_k[n:]),
            *(self._scale_log2, query.stride(0), keys.stride(-3), values.stride(-3), tables.stride(0)),
            group=heads // kv_heads,
            head_dim=head_dim,
            padded_dim=padded(head_dim),
            block_size=block_size,
            rows=tile.rows,
            tile=tile.tokens,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )

    def _traits_of(self, device: torch.device) -> Traits:
        if self._traits is None:
            self._traits = Traits.of(device)
        return self._traits


def _where_keys_are(
    qkv: tuple[Tensor, Tensor, Tensor], kv_cache: Tensor, context: Context
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Return block tables, keys, values and block size of the chunks; 0 where they are this step's own."""
    if context.block_tables is None:
        assert context.cu_seqlens_q is not None
        # The kernel takes a table and does not look at it.
        return context.cu_seqlens_q, _end_to_end(qkv[1]), _end_to_end(qkv[2]), 0
    key_cache, value_cache = kv_cache.unbind()
    return context.block_tables[context.num_decodes :], key_cache, value_cache, kv_cache.shape[2]


def _tables_and_weights(query: Tensor, how: Preparation | None) -> tuple[Tensor | float, ...]:
    """Return what the kernel prepares heads with. What it is told not to look at may be any tensor."""
    if how is None:
        return (query,) * 4 + (0.0,)
    return how.cos, how.signed_sin, *how.weights(query)


def _end_to_end(heads: Tensor) -> Tensor:
    """Return `[T, heads, D]` so that the heads of one token follow one another."""
    same = heads.stride(2) == 1 and heads.stride(1) == heads.shape[2]
    return heads if same else heads.contiguous()


def _empty(query: Tensor) -> Tensor:
    return torch.empty(query.shape, dtype=query.dtype, device=query.device)
