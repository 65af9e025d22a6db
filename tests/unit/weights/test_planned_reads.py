"""Planned reads leave in every parameter what narrowing the whole tensors would, whatever the layout."""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.checkpoint_layouts import Layout, build_shard, narrowed
from tprt.checkpoint_config import read_checkpoint_config
from tprt.errors import TransportTimeoutError
from tprt.models import DecoderForCausalLM
from tprt.sharding import ShardPlan, make_shard_plan, shape_of
from tprt.weights import LoadReport, load_model, make_local_exchanges
from tprt.weights.file_reader import FileReader
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
            # As a rank does whose peers are on other hosts.
            load_model(model, str(folder), needs_all=False)
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


def not_cached() -> AbstractContextManager[object]:
    return patch.object(FileReader, "is_cached", lambda self, start, stop: False)


@pytest.mark.parametrize("world_size", [2, 3])
def test_cold_files_are_read_past_the_cache_once_for_all_ranks(tmp_path: Path, world_size: int) -> None:
    layout = Layout(
        kv_heads=3,
        group=2,
        head_dim=16,
        intermediate_size=1200,
        vocab_size=5000,
        hidden_size=192,
        odd_header=True,
    )
    tensors = layout.write(tmp_path)
    plan = make_shard_plan(shape_of(read_checkpoint_config(str(tmp_path))), world_size)
    # Small chunks, so that slots are used more than once. To read headers brings small files into the cache.
    with patch("tprt.weights.loader.make_read_plan", partial(make_read_plan, chunk_bytes=20_000)), not_cached():
        models = load_all(tmp_path, plan, torch.bfloat16, with_exchange=True)
    for shard, model in zip(plan.shards, models, strict=True):
        expected = narrowed(layout, tensors, shard)
        for name, tensor in model.named_parameters():
            assert torch.equal(tensor, expected[name]), name


def num_mapped() -> int:
    return Path("/proc/self/maps").read_text().count("tprt-collectives")


def test_an_exchange_that_is_closed_holds_no_memory(tmp_path: Path) -> None:
    layout = Layout(kv_heads=2, group=1)
    layout.write(tmp_path)
    plan = make_shard_plan(shape_of(read_checkpoint_config(str(tmp_path))), 2)
    before = num_mapped()
    with ExitStack() as stack, not_cached():
        exchanges = [stack.enter_context(each) for each in make_local_exchanges(2, TIMEOUT_S)]
        pool = stack.enter_context(ThreadPoolExecutor(2))
        models = [build_shard(tmp_path, plan, rank, torch.float32) for rank in range(2)]
        list(
            pool.map(
                lambda pair: load_model(pair[0], str(tmp_path), pair[1]), zip(models, exchanges, strict=True)
            )
        )
        assert num_mapped() == before + 2
    assert num_mapped() == before
    exchanges[0].close()


def test_a_rank_that_never_comes_ends_the_wait_at_the_deadline_by_name(tmp_path: Path) -> None:
    layout = Layout(kv_heads=2, group=1)
    layout.write(tmp_path)
    plan = make_shard_plan(shape_of(read_checkpoint_config(str(tmp_path))), 2)
    small_chunks = partial(make_read_plan, chunk_bytes=200)
    with ExitStack() as stack:
        exchange, _ = [stack.enter_context(each) for each in make_local_exchanges(2, timeout_s=0.2)]
        stack.enter_context(patch("tprt.weights.loader.make_read_plan", small_chunks))
        stack.enter_context(not_cached())
        with pytest.raises(TransportTimeoutError, match=r"loading stands still for 0.2 s: rank 1 has"):
            load_model(build_shard(tmp_path, plan, 0, torch.float32), str(tmp_path), exchange)


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
