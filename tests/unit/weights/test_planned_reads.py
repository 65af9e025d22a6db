"""Planned reads leave in every parameter what narrowing the whole tensors would, whatever the layout."""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.checkpoint_layouts import Layout, build_shard, narrowed
from tprt.checkpoint_config import read_checkpoint_config
from tprt.models import DecoderForCausalLM
from tprt.sharding import ShardPlan, make_shard_plan, shape_of
from tprt.weights import LoadReport, load_model, make_local_exchanges
from tprt.weights.read_plan import make_read_plan

TIMEOUT_S = 30.0

layouts = st.builds(
    Layout,
    kv_heads=st.integers(1, 8),
    group=st.integers(1, 4),
    head_dim=st.sampled_from([2, 4, 6]),
    intermediate_size=st.sampled_from([8, 40, 61]),
    vocab_size=st.integers(8, 80),
    num_layers=st.integers(1, 2),
    is_qwen3=st.booleans(),
    attention_bias=st.booleans(),
    mlp_bias=st.booleans(),
    tied=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    num_files=st.integers(1, 3),
    odd_header=st.booleans(),
)


def load_all(
    folder: Path, plan: ShardPlan, dtype: torch.dtype, with_exchange: bool
) -> list[DecoderForCausalLM]:
    """Load every rank, as threads of this process that share what they read, or one after another."""
    models = [build_shard(folder, plan, rank, dtype) for rank in range(plan.world_size)]
    if not with_exchange or plan.world_size == 1:
        for model in models:
            load_model(model, str(folder))
        return models
    with ExitStack() as stack:
        exchanges = [stack.enter_context(each) for each in make_local_exchanges(plan.world_size, TIMEOUT_S)]
        pool = stack.enter_context(ThreadPoolExecutor(plan.world_size))
        load = partial(load_model, path=str(folder))
        reports: list[LoadReport] = list(
            pool.map(lambda pair: load(pair[0], exchange=pair[1]), zip(models, exchanges, strict=True))
        )
    assert sum(report.own_kept_bytes for report in reports) <= reports[0].file_bytes
    return models


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    layout=layouts,
    world_size=st.integers(1, 8),
    chunk_bytes=st.sampled_from([1, 100, 1000, 4 << 20]),
    data=st.data(),
)
def test_every_rank_holds_the_narrowed_tensors(
    layout: Layout, world_size: int, chunk_bytes: int, data: st.DataObject
) -> None:
    world_size = min(world_size, layout.kv_heads * layout.group)
    dtype = data.draw(st.sampled_from([layout.dtype, torch.float32]))
    small_chunks = partial(make_read_plan, chunk_bytes=chunk_bytes)
    with tempfile.TemporaryDirectory() as name, patch("tprt.weights.loader.make_read_plan", small_chunks):
        folder = Path(name)
        tensors = layout.write(folder)
        plan = make_shard_plan(shape_of(read_checkpoint_config(name)), world_size)
        models = load_all(folder, plan, dtype, with_exchange=data.draw(st.booleans()))
        for shard, model in zip(plan.shards, models, strict=True):
            expected = narrowed(layout, tensors, shard)
            found = dict(model.named_parameters())
            assert found.keys() == expected.keys()
            for parameter, tensor in found.items():
                assert torch.equal(tensor, expected[parameter].to(dtype)), parameter
