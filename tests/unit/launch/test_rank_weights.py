"""`rank_weights: auto` becomes one set of numbers, from the memory of the devices that the ranks will have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import pytest

from launch.cuda_devices import CudaDevice, look_from_outside
from launch.planning.memory import (
    CONTEXT_BYTES,
    NCCL_BYTES,
    RankMemory,
    detected_memory,
    parse_memory_gib,
    shared_memory,
)
from launch.planning.rank_weights import resolve_rank_weights
from tprt.config import Config, ModelConfig, ParallelConfig, RuntimeConfig
from tprt.errors import ConfigError, ShardPlanError
from tprt.sharding import ModelShape, make_shard_plan

GIB = 2**30
LLAMA_70B = ModelShape(8192, 28672, 80, 64, 8, 128, 128256, False)


def config(world_size: int, device: Literal["auto", "cpu", "cuda"] = "cuda") -> Config:
    return Config(
        model=ModelConfig(path="m"),
        parallel=ParallelConfig(tensor_parallel_size=world_size, rank_weights="auto"),
        runtime=RuntimeConfig(device=device),
    )


def gpus(*sizes_gib: float) -> Sequence[CudaDevice]:
    return [CudaDevice("GPU", int(size * GIB), int(size * GIB) // 2) for size in sizes_gib]


def no_look() -> Sequence[CudaDevice]:
    raise AssertionError("nobody needed to look at the devices")


def test_the_weights_are_the_memory_of_the_ranks_own_devices() -> None:
    resolved = resolve_rank_weights(config(3), lambda: gpus(79.1, 79.2, 47.5, 24))
    assert resolved.parallel.rank_weights == (79.0, 79.0, 48.0)
    assert resolved == resolve_rank_weights(resolved, no_look)


def test_devices_of_one_kind_get_equal_shares() -> None:
    assert resolve_rank_weights(config(2), lambda: gpus(79.11, 79.14)).parallel.rank_weights is None


@pytest.mark.parametrize("case", [config(4, "cpu"), config(1)])
def test_where_all_ranks_are_alike_no_device_is_looked_at(case: Config) -> None:
    assert resolve_rank_weights(case, no_look).parallel.rank_weights is None


def test_without_devices_the_ranks_are_cpus_unless_devices_are_asked_for() -> None:
    assert resolve_rank_weights(config(2, "auto"), list).parallel.rank_weights is None
    with pytest.raises(ConfigError, match="0 CUDA devices are visible for 2 ranks; give one number for each"):
        resolve_rank_weights(config(2), list)


def test_ranks_that_share_gpus_in_turn_have_a_part_of_their_memory_each() -> None:
    parallel = ParallelConfig(tensor_parallel_size=3, rank_weights="auto", allow_shared_gpu=True)
    shared = config(3).model_copy(update={"parallel": parallel})
    assert resolve_rank_weights(shared, lambda: gpus(80, 48)).parallel.rank_weights == (40.0, 48.0, 40.0)
    with pytest.raises(ConfigError, match="0 CUDA devices are visible for 3 ranks"):
        resolve_rank_weights(shared, list)
    devices = [CudaDevice("a", 80 * GIB, 78 * GIB), CudaDevice("b", 48 * GIB, 48 * GIB)]
    own = CONTEXT_BYTES + NCCL_BYTES
    half = RankMemory(40 * GIB, (2 * GIB - CONTEXT_BYTES) // 2 + own)
    assert shared_memory(devices, 3) == [half, RankMemory(48 * GIB, own), half]


def test_what_is_given_as_numbers_stays() -> None:
    parallel = ParallelConfig(tensor_parallel_size=2, rank_weights=(3.0, 1.0))
    given = config(2).model_copy(update={"parallel": parallel})
    assert resolve_rank_weights(given, no_look) == given


def test_memory_left_beside_the_weights_is_in_proportion_to_all_memory() -> None:
    memory = (80.0, 80.0, 48.0)
    plan = make_shard_plan(LLAMA_70B, 3, memory)
    left = [size * GIB - 2 * shard for size, shard in zip(memory, plan.weight_elements(), strict=True)]
    shares = [rest / size for rest, size in zip(left, memory, strict=True)]
    assert min(shares) > 0
    assert max(shares) == pytest.approx(min(shares), rel=0.02)


def test_a_split_by_auto_itself_is_refused() -> None:
    with pytest.raises(ShardPlanError, match="rank_weights is auto"):
        make_shard_plan(LLAMA_70B, 2, "auto")


def test_devices_are_looked_at_from_a_process_of_its_own_with_a_deadline() -> None:
    with pytest.raises(
        ConfigError, match=r"did not answer in 0.01 s; .* give parallel.rank_weights as numbers"
    ):
        look_from_outside(deadline_s=0.01)


def test_a_host_without_devices_is_seen_to_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert look_from_outside() == []


def test_memory_is_given_once_for_all_ranks_or_for_each() -> None:
    assert parse_memory_gib(["80"], 3) == [80 * GIB] * 3
    assert parse_memory_gib(["80,80", "47.5"], 3) == [80 * GIB, 80 * GIB, int(47.5 * GIB)]


@pytest.mark.parametrize(
    "values", [["80,80"], ["80", "80"], ["x"], ["80,,80"], ["0"], ["-1"], ["nan"], ["inf"]]
)
def test_memory_that_makes_no_sense_is_refused(values: list[str]) -> None:
    with pytest.raises(ConfigError, match="--memory-gib"):
        parse_memory_gib(values, 3)


def test_ranks_beyond_this_hosts_devices_are_planned_with_the_least_of_them() -> None:
    devices = [CudaDevice("a", 80 * GIB, 79 * GIB), CudaDevice("b", 48 * GIB, 48 * GIB)]
    first = RankMemory(80 * GIB, GIB + NCCL_BYTES)
    second = RankMemory(48 * GIB, CONTEXT_BYTES + NCCL_BYTES)
    assert detected_memory(devices, 4) == [first, second, second, second]
