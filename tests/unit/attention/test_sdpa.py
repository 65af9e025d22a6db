"""Attention over paged blocks equals attention over the plain sequences."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tprt.attention import make_attention_backend
from tprt.context import Context
from tprt.errors import ConfigError

HEAD_DIM, BLOCK = 8, 4


def exact(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend with the last tokens of one sequence, in float64 and term by term."""
    query, key, value = query.double(), key.double(), value.double()
    group = query.shape[1] // key.shape[1]
    first = len(key) - len(query)
    rows = []
    for i in range(len(query)):
        heads = []
        for head in range(query.shape[1]):
            k, v = key[: first + i + 1, head // group], value[: first + i + 1, head // group]
            heads.append((query[i, head] @ k.T / math.sqrt(HEAD_DIM)).softmax(-1) @ v)
        rows.append(torch.stack(heads))
    return torch.stack(rows).float()


class Batch:
    """Sequences with `cached` tokens in their blocks and `new` query tokens each; blocks in any order."""

    def __init__(self, heads: tuple[int, int], cached: list[int], new: list[int]) -> None:
        torch.manual_seed(0)
        lens = [a + b for a, b in zip(cached, new, strict=True)]
        self.new, self.lens = new, lens
        self.keys = [torch.randn(n, heads[1], HEAD_DIM) for n in lens]
        self.values = [torch.randn(n, heads[1], HEAD_DIM) for n in lens]
        self.queries = [torch.randn(n, heads[0], HEAD_DIM) for n in new]
        counts = [-(-n // BLOCK) for n in lens]
        blocks = torch.randperm(sum(counts) + 3).tolist()
        self.tables = torch.zeros(len(lens), max(counts), dtype=torch.int32)
        for row, count in enumerate(counts):
            self.tables[row, :count] = torch.tensor([blocks.pop() for _ in range(count)])
        self.backend = make_attention_backend("sdpa", HEAD_DIM**-0.5)
        self.cache = torch.full((2, sum(counts) + 3, BLOCK, heads[1], HEAD_DIM), 1e4)
        for row in range(len(lens)):
            self.write(row, 0, cached[row])

    def slots(self, row: int, start: int, stop: int) -> Tensor:
        positions = torch.arange(start, stop)
        return self.tables[row, positions // BLOCK].long() * BLOCK + positions % BLOCK

    def write(self, row: int, start: int, stop: int) -> None:
        part = slice(start, stop)
        slots = self.slots(row, start, stop)
        self.backend.write_kv(self.keys[row][part], self.values[row][part], self.cache, slots)

    def write_new(self) -> None:
        for row, (length, count) in enumerate(zip(self.lens, self.new, strict=True)):
            self.write(row, length - count, length)

    def expected(self) -> Tensor:
        return torch.cat([exact(*parts) for parts in zip(self.queries, self.keys, self.values, strict=True)])

    def context(self, num_decodes: int, with_tables: bool = True) -> Context:
        lens = torch.tensor(self.lens, dtype=torch.int32)
        if num_decodes == len(self.lens):
            return Context(context_lens=lens, block_tables=self.tables, max_seqlen_k=max(self.lens))
        sums = [torch.tensor([0, *x]).cumsum(0).int() for x in (self.new, self.lens)]
        return Context(
            is_prefill=True,
            cu_seqlens_q=sums[0],
            cu_seqlens_k=sums[1],
            max_seqlen_q=max(self.new),
            max_seqlen_k=max(self.lens),
            context_lens=lens[:num_decodes] if num_decodes else None,
            block_tables=self.tables if with_tables else None,
            num_decodes=num_decodes,
        )

    def run(self, context: Context) -> Tensor:
        self.write_new()
        query = torch.cat(self.queries)
        if not context.is_prefill:
            return self.backend.decode(query, self.cache, context)
        new = [(k[-n:], v[-n:]) for k, v, n in zip(self.keys, self.values, self.new, strict=True)]
        key, value = (torch.cat(parts) for parts in zip(*new, strict=True))
        return self.backend.prefill((query, key, value), self.cache, context)


HEADS = [(4, 4), (6, 2), (3, 1)]


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("cached", [[0], [9], [7, 7, 7], [3, 12, 0], [1, 30, 2]], ids=str)
def test_decodes(heads: tuple[int, int], cached: list[int]) -> None:
    batch = Batch(heads, cached, [1] * len(cached))
    torch.testing.assert_close(batch.run(batch.context(len(cached))), batch.expected(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_prompts_from_their_own_tokens(heads: tuple[int, int]) -> None:
    batch = Batch(heads, [0, 0, 0], [5, 1, 11])
    context = batch.context(0, with_tables=False)
    torch.testing.assert_close(batch.run(context), batch.expected(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_chunks_after_what_is_cached(heads: tuple[int, int]) -> None:
    batch = Batch(heads, [4, 0, 9], [5, 6, 2])
    torch.testing.assert_close(batch.run(batch.context(0)), batch.expected(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_decodes_and_chunks_in_one_batch(heads: tuple[int, int]) -> None:
    batch = Batch(heads, [4, 13, 9, 0], [1, 1, 2, 7])
    torch.testing.assert_close(batch.run(batch.context(2)), batch.expected(), atol=1e-5, rtol=1e-4)


def test_writing_touches_the_slots_of_the_tokens_and_no_others() -> None:
    batch = Batch((2, 2), [0], [6])
    before = batch.cache.clone()
    batch.write_new()
    changed = (batch.cache != before).flatten(3).any(-1).any(0).flatten().nonzero().flatten()
    assert sorted(changed.tolist()) == sorted(batch.slots(0, 0, 6).tolist())


def test_a_backend_that_does_not_exist_is_refused_with_those_that_do() -> None:
    with pytest.raises(ConfigError, match="'magic'; there are: auto, flash_attn, flash_attn_3, sdpa, triton"):
        make_attention_backend("magic", 1.0)
