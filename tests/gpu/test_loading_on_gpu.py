"""Planned reads into a GPU: pinned staging, conversion on the device, strided destinations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.checkpoint_layouts import Layout, build_shard, narrowed
from tprt.checkpoint_config import read_checkpoint_config
from tprt.sharding import make_shard_plan, shape_of
from tprt.weights import load_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

WIDE = Layout(kv_heads=4, group=2, head_dim=64, intermediate_size=3000, vocab_size=20_011, is_qwen3=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("world_size", [1, 3, 8])
@pytest.mark.parametrize("hidden_size", [24, 1024])
def test_every_rank_on_a_gpu_holds_the_narrowed_tensors(
    tmp_path: Path, world_size: int, dtype: torch.dtype, hidden_size: int
) -> None:
    layout = Layout(**{**WIDE.__dict__, "hidden_size": hidden_size})
    tensors = layout.write(tmp_path)
    plan = make_shard_plan(shape_of(read_checkpoint_config(str(tmp_path))), world_size)
    for shard in plan.shards:
        model = build_shard(tmp_path, plan, shard.rank, dtype, "cuda")
        report = load_model(model, str(tmp_path))
        expected = narrowed(layout, tensors, shard)
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter.cpu(), expected[name].to(dtype)), name
        assert report.kept_bytes == sum(parameter.numel() for parameter in model.parameters()) * 2
