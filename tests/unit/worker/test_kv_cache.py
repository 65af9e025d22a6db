"""KV blocks are sized by the settings and by memory, for this rank's KV heads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.support.checkpoints import TinyModel, save_tiny
from tests.support.local_engine import LocalEngine, make_config
from tprt.checkpoint_config import read_checkpoint_config
from tprt.config import CacheConfig
from tprt.distributed import TPGroup
from tprt.distributed.local import make_local_groups
from tprt.errors import ConfigError
from tprt.layers.attention import Attention
from tprt.sharding import make_shard_plan, shape_of
from tprt.worker.kv_cache import (
    allocate_on_all_ranks,
    cpu_budget,
    kv_block_bytes,
    num_blocks_that_fit,
    require_host_memory,
)
from tprt.worker.memory_budget import MemoryBudget


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny(folder, TinyModel(heads=9, kv_heads=3))
    return folder


def test_each_rank_pays_for_its_own_kv_heads(folder: Path) -> None:
    checkpoint = read_checkpoint_config(str(folder))
    shards = make_shard_plan(shape_of(checkpoint), 2).shards
    sizes = [kv_block_bytes(checkpoint, shard, 4, torch.float32) for shard in shards]
    assert sizes == [2 * layers_heads * 4 * 16 * 4 for layers_heads in (2 * 2, 2 * 1)]


def test_all_ranks_have_as_many_blocks_as_the_poorest(folder: Path) -> None:
    config = make_config(folder, 2, num_blocks=None)
    budget = config.model_copy(update={"cache": CacheConfig(block_size=4, cpu_memory_gib=1 / 1024)})
    with LocalEngine(budget) as engine:
        caches = [
            next(m for m in runner.model.modules() if isinstance(m, Attention)).kv_cache
            for runner in engine.runners
        ]
    per_block = 2 * 2 * 2 * 4 * 16 * 4
    assert [cache.shape[1] for cache in caches] == [2**20 // per_block] * 2
    assert [cache.shape[3] for cache in caches] == [2, 1]


def test_the_number_that_is_set_is_taken_whatever_the_memory(folder: Path) -> None:
    config = make_config(folder, num_blocks=None)
    cache = CacheConfig(block_size=4, num_blocks=7, cpu_memory_gib=1e-9)
    with LocalEngine(config.model_copy(update={"cache": cache})) as engine:
        assert engine.scheduler.limits.num_blocks == 7


def test_too_little_memory_of_a_cpu_is_refused_with_numbers_and_advice() -> None:
    cache = CacheConfig(cpu_memory_gib=0.001)
    with pytest.raises(ConfigError) as error:
        num_blocks_that_fit(cpu_budget(cache), 2 * 2**20, cache, max_model_len=100, is_cpu=True)
    assert str(error.value) == (
        "no KV block fits: one takes 2.00 MiB, and cache.cpu_memory_gib 0.001 is 1.02 MiB; a sequence of"
        " max_model_len 100 needs 7 blocks, 14.00 MiB. Raise cache.cpu_memory_gib, use more ranks or a smaller"
        " model"
    )


def test_more_blocks_than_the_host_has_memory_for_are_refused_before_the_kernel_kills_for_them() -> None:
    require_host_memory(512, 2 * 2**20, 2, there=2 * 2**30)
    with pytest.raises(ConfigError) as error:
        require_host_memory(513, 2 * 2**20, 2, there=2 * 2**30)
    assert str(error.value) == (
        "513 KV blocks take 1.00 GiB on each of 2 ranks of this host, which has 2.00 GiB of free memory; lower"
        " cache.num_blocks or cache.cpu_memory_gib, or use a smaller model"
    )


def test_a_rank_on_a_cpu_asks_its_host(folder: Path) -> None:
    config = make_config(folder, num_blocks=2**50)
    with pytest.raises(ConfigError, match="of free memory"), LocalEngine(config):
        pass


def test_too_little_memory_of_a_gpu_is_refused_with_where_it_went() -> None:
    gib = 2**30
    budget = MemoryBudget(10 * gib, 9 * gib, others=gib, weights=7 * gib, workspace=gib - 2**20)
    with pytest.raises(ConfigError) as error:
        num_blocks_that_fit(budget, 2 * 2**20, CacheConfig(), max_model_len=16_000, is_cpu=False)
    assert str(error.value) == (
        "no KV block fits: one takes 2.00 MiB, and of 10.00 GiB cache.memory_fraction 0.9 allows 9.00 GiB, of"
        " which others use 1.00 GiB, weights 7.00 GiB, workspace 1.00 GiB: 1.00 MiB are left; a sequence of"
        " max_model_len 16000 needs 1000 blocks, 1.95 GiB. Raise cache.memory_fraction, end what else uses the"
        " device, lower scheduler.max_num_batched_tokens or scheduler.max_num_seqs (they make the workspace),"
        " use more ranks or a smaller model"
    )


class Device:
    """Has room for a number of blocks of 10 bytes."""

    def __init__(self, room: int, error: RuntimeError | None = None) -> None:
        self.room = room
        self.held = 0
        self.error = error or torch.OutOfMemoryError("CUDA out of memory")

    def allocate(self, num_blocks: int) -> int:
        assert self.held == 0, "what was there before has to go first"
        self.held = min(num_blocks, self.room)
        if num_blocks > self.room:
            raise self.error
        return num_blocks * 10

    def release(self) -> None:
        self.held = 0


def allocate_together(devices: list[Device], num_blocks: int) -> list[tuple[int, int]]:
    groups = make_local_groups(len(devices))

    def allocate(device: Device, group: TPGroup) -> tuple[int, int]:
        return allocate_on_all_ranks(device.allocate, device.release, group.min_int, num_blocks)

    with ThreadPoolExecutor(len(devices)) as pool:
        return list(pool.map(allocate, devices, groups))


def test_ranks_get_what_fits_the_budget_where_it_is_there() -> None:
    devices = [Device(100), Device(1000)]
    assert allocate_together(devices, 100) == [(100, 1000)] * 2
    assert [device.held for device in devices] == [100, 100]


@pytest.mark.parametrize("error", [None, RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")])
def test_when_one_rank_runs_out_of_memory_all_take_the_fewer_blocks_that_it_gets(
    error: RuntimeError | None,
) -> None:
    devices = [Device(1000), Device(80, error), Device(1000)]
    allocated = allocate_together(devices, 100)
    assert len(set(allocated)) == 1
    num_blocks, num_bytes = allocated[0]
    assert 76 <= num_blocks <= 80
    assert num_bytes == 10 * num_blocks
    assert [device.held for device in devices] == [num_blocks] * 3


def test_a_rank_without_room_for_one_block_fails_with_the_devices_own_words() -> None:
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        allocate_together([Device(0)], 3)


def test_another_error_than_a_lack_of_memory_is_not_tried_again() -> None:
    with pytest.raises(RuntimeError, match="device-side assert"):
        allocate_together([Device(0, RuntimeError("device-side assert"))], 3)
