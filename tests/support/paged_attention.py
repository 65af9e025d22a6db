"""Ragged batches over paged KV blocks, for any device and type, with the exact result and its error bound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tprt.attention import AttentionBackend
from tprt.context import Context

# Where no token was written: large enough to be seen in any result that reads it.
_POISON = 1e4
# Weights and the result are rounded once each, by half of eps; float32 sums thousands of terms besides.
_ROUNDINGS = {torch.float32: 128.0, torch.bfloat16: 1.0, torch.float16: 1.0}


@dataclass(frozen=True)
class Shape:
    """What a batch's tensors look like."""

    dtype: torch.dtype = torch.float32
    head_dim: int = 64
    block_size: int = 16
    group: int = 2
    kv_heads: int = 2
    device: str = "cpu"

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype}-d{self.head_dim}-block{self.block_size}-{self.group}x{self.kv_heads}"


class PagedBatch:
    """Sequences with `cached` tokens in their blocks and `new` query tokens each; blocks in any order."""

    def __init__(self, shape: Shape, cached: Sequence[int], new: Sequence[int], seed: int = 0) -> None:
        self.shape = shape
        self.new, self.lens = list(new), [a + b for a, b in zip(cached, new, strict=True)]
        self._generator = torch.Generator().manual_seed(seed)
        kv = (shape.kv_heads, shape.head_dim)
        self.keys = [self.random(n, *kv) for n in self.lens]
        self.values = [self.random(n, *kv) for n in self.lens]
        self.queries = [self.random(n, shape.group * shape.kv_heads, shape.head_dim) for n in self.new]
        self.tables, num_blocks = self._tables()
        cache = torch.full((2, num_blocks, shape.block_size, *kv), _POISON, dtype=shape.dtype)
        self.cache = cache.to(shape.device)

    def random(self, *size: int) -> Tensor:
        """Return normal numbers of the batch's type, on its device."""
        return torch.randn(*size, generator=self._generator).to(self.shape.device, self.shape.dtype)

    def _tables(self) -> tuple[Tensor, int]:
        counts = [-(-n // self.shape.block_size) for n in self.lens]
        num_blocks = sum(counts) + 3
        blocks = torch.randperm(num_blocks, generator=self._generator).int().split([*counts, 3])
        rows = [torch.nn.functional.pad(part, (0, max(counts) - len(part))) for part in blocks[:-1]]
        return torch.stack(rows).to(self.shape.device), num_blocks

    def slots(self, row: int, start: int, stop: int) -> Tensor:
        positions = torch.arange(start, stop, device=self.shape.device)
        size = self.shape.block_size
        return self.tables[row, positions // size].long() * size + positions % size

    def newest_slots(self) -> Tensor:
        """Return where the last token of each sequence belongs, `[S]`."""
        return torch.cat([self.slots(row, n - 1, n) for row, n in enumerate(self.lens)])

    def write(self, backend: AttentionBackend) -> None:
        """Write every sequence with the backend under test: what was cached, then this step's tokens."""
        for is_new in (False, True):
            borders = [(n - q, n) if is_new else (0, n - q) for n, q in zip(self.lens, self.new, strict=True)]
            keys, values = (
                torch.cat([rows[a:b] for rows, (a, b) in zip(tensors, borders, strict=True)])
                for tensors in (self.keys, self.values)
            )
            slots = torch.cat([self.slots(row, a, b) for row, (a, b) in enumerate(borders)])
            if len(slots):
                backend.write_kv(keys, values, self.cache, slots)

    def context(self, num_decodes: int, with_tables: bool = True) -> Context:
        lens = self._int32(self.lens)
        if num_decodes == len(self.lens):
            return Context(context_lens=lens, block_tables=self.tables, max_seqlen_k=max(self.lens))
        return Context(
            is_prefill=True,
            cu_seqlens_q=self._int32([0, *self.new]).cumsum(0).int(),
            cu_seqlens_k=self._int32([0, *self.lens]).cumsum(0).int(),
            max_seqlen_q=max(self.new),
            max_seqlen_k=max(self.lens),
            context_lens=lens[:num_decodes] if num_decodes else None,
            block_tables=self.tables if with_tables else None,
            num_decodes=num_decodes,
        )

    def _int32(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.shape.device)

    def run(self, backend: AttentionBackend, num_decodes: int, with_tables: bool = True) -> Tensor:
        """Write, then attend; queries, keys and values are parts of one tensor, as in a model."""
        self.write(backend)
        context = self.context(num_decodes, with_tables)
        query = torch.cat(self.queries)
        if not context.is_prefill:
            return backend.decode(query, self.cache, context)
        own = [
            torch.cat([rows[n - q :] for rows, n, q in zip(tensors, self.lens, self.new, strict=True)])
            for tensors in (self.keys, self.values)
        ]
        parts = torch.cat([query, *own], dim=1).split([query.shape[1], own[0].shape[1], own[1].shape[1]], dim=1)
        return backend.prefill((parts[0], parts[1], parts[2]), self.cache, context)

    def check(self, result: Tensor) -> None:
        """Compare with the exact result, within what the rounding of weights and result alone may change.

        A weight's rounding moves the result by that part of the mean of |value|, its own by that part of it.
        """
        exact = [attend_exactly(*parts) for parts in zip(self.queries, self.keys, self.values, strict=True)]
        expected, spread = (torch.cat(parts) for parts in zip(*exact, strict=True))
        bound = torch.finfo(self.shape.dtype).eps * _ROUNDINGS[self.shape.dtype] * (expected.abs() + spread)
        assert result.dtype == self.shape.dtype
        error = (result.double() - expected).abs()
        worst = (error / bound).nan_to_num(nan=torch.inf).amax(dim=(1, 2))
        row = int(worst.argmax())
        assert worst[row] <= 1, (
            f"{int((worst > 1).sum())} of {len(worst)} rows are off; row {row} by {worst[row]:.3g} times the"
            f" bound: found {result[row].flatten()[:4].tolist()}, expected"
            f" {expected[row].flatten()[:4].tolist()}; query tokens {self.new}, KV tokens {self.lens}"
        )


def attend_exactly(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Attend with the last `Q` of `K` tokens in float64; return result and weighted mean of |value|."""
    group = query.shape[1] // key.shape[1]
    q, (k, v) = query.double(), (x.double().repeat_interleave(group, dim=1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", q, k) * query.shape[2] ** -0.5
    first = len(key) - len(query)
    hidden = torch.ones(len(query), len(key), dtype=torch.bool, device=query.device).triu(first + 1)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v), torch.einsum("hqk,khd->qhd", weights, v.abs())
