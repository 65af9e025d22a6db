"""What is planned is what a start allocates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from launch.planning.memory import RankMemory
from launch.planning.plan import plan_deployment
from tests.support.checkpoints import TinyModel, save_tiny
from tests.support.local_engine import LocalEngine, make_config
from tprt.checkpoint_config import read_checkpoint_config
from tprt.config import CacheConfig, Config, ModelConfig, ParallelConfig, RuntimeConfig
from tprt.distributed import TPGroup
from tprt.errors import ShardPlanError
from tprt.worker.model_runner import ModelRunner

SHAPES = [
    TinyModel("llama", 9, 3, bias=True),
    TinyModel("llama", 8, 8, tied=True),
    TinyModel("qwen3", 14, 2),
    TinyModel("qwen3", 6, 1, bias=True, tied=True),
]


@pytest.fixture(scope="module", params=SHAPES, ids=str)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny(folder, request.param)
    return folder


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_weight_bytes_are_those_that_each_rank_loads(folder: Path, world_size: int) -> None:
    config = make_config(folder, world_size)
    checkpoint = read_checkpoint_config(str(folder))
    loaded = [
        ModelRunner(config, checkpoint, TPGroup(rank, world_size), torch.device("cpu")).load()
        for rank in range(world_size)
    ]
    assert [rank.weight_bytes for rank in plan_deployment(config).ranks] == loaded


def test_kv_blocks_are_those_that_a_start_allocates(folder: Path) -> None:
    config = make_config(folder, 2, num_blocks=None)
    config = config.model_copy(update={"cache": CacheConfig(block_size=4, cpu_memory_gib=1 / 1024)})
    planned = plan_deployment(config)
    with LocalEngine(config) as engine:
        assert planned.num_blocks == engine.scheduler.limits.num_blocks
    assert planned.max_full_sequences == planned.num_blocks // (256 // 4)


def on_gpus(folder: Path, world_size: int = 1, memory_fraction: float = 0.5) -> Config:
    return Config(
        model=ModelConfig(path=str(folder), dtype="bfloat16"),
        parallel=ParallelConfig(tensor_parallel_size=world_size),
        cache=CacheConfig(memory_fraction=memory_fraction),
        runtime=RuntimeConfig(device="cuda"),
    )


def test_a_gpu_is_planned_for_without_having_one(folder: Path) -> None:
    assert plan_deployment(on_gpus(folder)).num_blocks is None
    (rank,) = plan_deployment(on_gpus(folder), [RankMemory(10**9, 10**7)]).ranks
    assert rank.budget is not None
    tables = 2 * 256 * 16 * 4  # positions, head_dim, float32
    assert rank.budget.weights == rank.weight_bytes + tables
    left = 500_000_000 - 10**7 - rank.weight_bytes - tables - rank.budget.workspace
    assert rank.num_blocks == left // (16 * rank.kv_bytes_per_token)
    assert 0 < rank.budget.workspace < left


def test_the_poorest_of_unequal_gpus_decides(folder: Path) -> None:
    gpus = [RankMemory(10**9, 0), RankMemory(4 * 10**8, 0)]
    planned = plan_deployment(on_gpus(folder, 2), gpus)
    first, second = planned.ranks
    assert first.num_blocks is not None
    assert second.num_blocks is not None
    assert planned.num_blocks == second.num_blocks < first.num_blocks


def test_what_cannot_be_split_is_refused_with_the_legal_sizes(folder: Path) -> None:
    with pytest.raises(ShardPlanError, match="legal sizes for this model: 1 to"):
        plan_deployment(make_config(folder, 50))
