"""Over all ranks, the parts of each layer make up the whole layer; no process is needed to see it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tprt.context import Context, reset_context, set_context
from tprt.distributed import TPGroup
from tprt.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from tprt.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from tprt.layers.parameter import ShardedParameter
from tprt.sharding import ModelShape, Range, ShardPlan, make_shard_plan

HEADS = [(8, 8), (8, 2), (9, 3), (14, 2), (6, 1)]
HEAD_DIM = 4
HIDDEN = 24


class PartialSum:
    """Collectives of a rank that computes alone: its own part is all it sees."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor

    def close(self) -> None:
        return


def group(rank: int, world_size: int) -> TPGroup:
    return TPGroup(rank, world_size, PartialSum())  # type: ignore[arg-type]


def plan_for(heads: tuple[int, int], world_size: int) -> ShardPlan:
    shape = ModelShape(
        hidden_size=HIDDEN,
        intermediate_size=44,
        num_hidden_layers=1,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        head_dim=HEAD_DIM,
        vocab_size=53,
        tie_word_embeddings=False,
    )
    return make_shard_plan(shape, world_size)


def load(parameter: torch.nn.Parameter | None, whole: Tensor, shard_id: str | int | None = None) -> None:
    assert isinstance(parameter, ShardedParameter)
    part = parameter.shards[shard_id]
    assert whole.shape == part.full_shape
    kept = whole.narrow(part.dim, part.source.start, part.source.size)
    parameter.data.narrow(part.dim, part.dest, part.source.size).copy_(kept)


def outputs_of(layer: LinearBase, x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute with the plain weight and with the packed one."""
    plain = layer(x)
    layer.process_weights_after_loading()
    return plain, layer(x)


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(5, HIDDEN)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_column_parts_concatenate_to_the_whole(x: Tensor, world_size: int, bias: bool) -> None:
    weight, b = torch.randn(44, HIDDEN), torch.randn(44)
    parts = []
    for shard in plan_for((8, 8), world_size).shards:
        layer = ColumnParallelLinear(HIDDEN, 44, shard.mlp_channels, bias)
        load(layer.weight, weight)
        if bias:
            load(layer.bias, b)
        parts.append(outputs_of(layer, x))
    expected = functional.linear(x, weight, b if bias else None)
    for version in zip(*parts, strict=True):
        torch.testing.assert_close(torch.cat(version, dim=-1), expected)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_merged_column_parts_concatenate_to_each_whole(x: Tensor, world_size: int) -> None:
    weights = [torch.randn(44, HIDDEN), torch.randn(44, HIDDEN)]
    parts = []
    for shard in plan_for((8, 8), world_size).shards:
        whole = (44, shard.mlp_channels)
        layer = MergedColumnParallelLinear(HIDDEN, {0: whole, 1: whole})
        for shard_id, weight in enumerate(weights):
            load(layer.weight, weight, shard_id)
        parts.append(outputs_of(layer, x)[1].split(layer.output_sizes, dim=-1))
    for index, weight in enumerate(weights):
        whole_output = torch.cat([part[index] for part in parts], dim=-1)
        torch.testing.assert_close(whole_output, functional.linear(x, weight))


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_each_rank_projects_its_own_query_heads_and_the_kv_heads_they_attend_to(
    x: Tensor, heads: tuple[int, int], world_size: int
) -> None:
    num_heads, num_kv_heads = heads
    q = torch.randn(num_heads * HEAD_DIM, HIDDEN)
    k, v = (torch.randn(num_kv_heads * HEAD_DIM, HIDDEN) for _ in "kv")
    bias = torch.randn(num_heads * HEAD_DIM)
    whole_q = functional.linear(x, q, bias).unflatten(-1, (num_heads, HEAD_DIM))
    whole_k, whole_v = (functional.linear(x, w).unflatten(-1, (num_kv_heads, HEAD_DIM)) for w in (k, v))
    seen_q, seen_kv = [], set()
    for shard in plan_for(heads, world_size).shards:
        layer = QKVParallelLinear(
            HIDDEN, HEAD_DIM, (num_heads, shard.q_heads), (num_kv_heads, shard.kv_heads), bias=True
        )
        for shard_id, weight in (("q", q), ("k", k), ("v", v)):
            load(layer.weight, weight, shard_id)
            load(layer.bias, bias if shard_id == "q" else torch.zeros(len(weight)), shard_id)
        own_q, own_k, own_v = (
            part.unflatten(-1, (-1, HEAD_DIM))
            for part in outputs_of(layer, x)[1].split(layer.output_sizes, dim=-1)
        )
        torch.testing.assert_close(own_q, whole_q[:, shard.q_heads.start : shard.q_heads.stop])
        torch.testing.assert_close(own_k, whole_k[:, shard.kv_heads.start : shard.kv_heads.stop])
        torch.testing.assert_close(own_v, whole_v[:, shard.kv_heads.start : shard.kv_heads.stop])
        seen_q += range(shard.q_heads.start, shard.q_heads.stop)
        seen_kv |= set(range(shard.kv_heads.start, shard.kv_heads.stop))
    assert seen_q == list(range(num_heads))
    assert seen_kv == set(range(num_kv_heads))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_row_parts_sum_to_the_whole(x: Tensor, world_size: int) -> None:
    weight, wide = torch.randn(HIDDEN, 44), torch.randn(5, 44)
    total = torch.zeros(5, HIDDEN)
    for shard in plan_for((8, 8), world_size).shards:
        part = shard.mlp_channels
        layer = RowParallelLinear(44, HIDDEN, part, group(shard.rank, world_size))
        load(layer.weight, weight)
        total += outputs_of(layer, wide[:, part.start : part.stop])[1]
    torch.testing.assert_close(total, functional.linear(wide, weight))


def test_the_bias_of_a_row_layer_is_added_once_whatever_the_number_of_ranks() -> None:
    layer = RowParallelLinear(4, 6, Range(0, 2), group(0, 2), bias=True)
    load(layer.weight, torch.zeros(6, 4))
    bias = torch.arange(6.0)
    load(layer.bias, bias)
    torch.testing.assert_close(layer(torch.ones(1, 2)), bias.unsqueeze(0))


def test_a_replicated_layer_is_the_whole_layer(x: Tensor) -> None:
    weight, bias = torch.randn(7, HIDDEN), torch.randn(7)
    layer = ReplicatedLinear(HIDDEN, 7, bias=True)
    load(layer.weight, weight)
    load(layer.bias, bias)
    for output in outputs_of(layer, x):
        torch.testing.assert_close(output, functional.linear(x, weight, bias))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_embedding_parts_sum_and_logit_parts_concatenate_to_the_whole(x: Tensor, world_size: int) -> None:
    weight = torch.randn(53, HIDDEN)
    ids = torch.arange(53)
    embedded, logits = torch.zeros(53, HIDDEN), []
    set_context(Context())
    for shard in plan_for((8, 8), world_size).shards:
        embedding = VocabParallelEmbedding(53, HIDDEN, shard.vocab_rows, group(shard.rank, world_size))
        load(embedding.weight, weight)
        head = ParallelLMHead(53, HIDDEN, shard.vocab_rows, tied_to=embedding)
        assert head.weight is embedding.weight
        plain = head(x)
        head.process_weights_after_loading()
        torch.testing.assert_close(head(x), plain)
        embedded += embedding(ids)
        logits.append(plain)
    reset_context()
    torch.testing.assert_close(embedded, weight)
    torch.testing.assert_close(torch.cat(logits, dim=-1), functional.linear(x, weight))


def test_the_lm_head_takes_the_last_token_of_each_prompt(x: Tensor) -> None:
    head = ParallelLMHead(53, HIDDEN, Range(0, 53), tied_to=None)
    weight = torch.randn(53, HIDDEN)
    load(head.weight, weight)
    set_context(Context(is_prefill=True, cu_seqlens_q=torch.tensor([0, 2, 5], dtype=torch.int32)))
    logits = head(x)
    reset_context()
    torch.testing.assert_close(logits, functional.linear(x[[1, 4]], weight))
