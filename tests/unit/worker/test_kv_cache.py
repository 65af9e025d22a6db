"""KV blocks are sized by the settings and by memory, for this rank's KV heads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.checkpoints import TinyModel, save_tiny
from tests.support.local_engine import LocalEngine, make_config
from tprt.checkpoint_config import read_checkpoint_config
from tprt.config import CacheConfig
from tprt.errors import ConfigError
from tprt.layers.attention import Attention
from tprt.sharding import make_shard_plan, shape_of
from tprt.worker.kv_cache import kv_block_bytes, num_blocks_that_fit

CPU = torch.device("cpu")


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


def test_the_number_that_is_set_is_taken() -> None:
    assert num_blocks_that_fit(CacheConfig(num_blocks=7), 10**12, CPU) == 7


def test_too_little_memory_is_refused_with_numbers_and_advice() -> None:
    with pytest.raises(ConfigError, match=r"one takes 2000000 bytes and cache.cpu_memory_gib 0.001 is 1073741"):
        num_blocks_that_fit(CacheConfig(cpu_memory_gib=0.001), 2_000_000, CPU)
