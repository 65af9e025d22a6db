"""What `tprt plan` predicts for a GPU is what a start on it then holds, and no step takes more."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
import torch

from launch import LLM, SamplingParams
from launch.cuda_devices import look_at_devices, look_from_outside
from launch.planning.memory import RankMemory, detected_memory
from launch.planning.plan import plan_deployment
from tests.support.checkpoint_layouts import QWEN3_600M
from tests.support.local_engine import LocalEngine
from tprt.checkpoint_config import read_checkpoint_config
from tprt.config import CacheConfig, Config, ModelConfig, RuntimeConfig, SchedulerConfig
from tprt.distributed import TPGroup
from tprt.errors import ConfigError
from tprt.worker.memory_budget import CudaMemory, measure_budget
from tprt.worker.model_runner import ModelRunner

pytestmark = pytest.mark.gpu

PROMPTS = [[5, 6, 7], [8, 9]]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Qwen3-0.6B with random weights."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_600M))
    return Config(
        model=ModelConfig(path=str(tmp_path), dtype="bfloat16", max_model_len=8192, load_format="dummy"),
        runtime=RuntimeConfig(device="cuda"),
    )


def test_a_deployment_has_the_planned_weights_and_the_planned_kv_blocks_within_2_percent(
    config: Config,
) -> None:
    # From outside, as this process, too, keeps what it has of the device while the deployment runs.
    device = look_from_outside()[0]
    planned = plan_deployment(config, detected_memory([device], 1))
    assert planned.num_blocks is not None
    with LLM(config) as llm:
        started = llm.ready.num_blocks
        outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=4, ignore_eos=True))
    print(f"{planned.num_blocks} blocks planned, {started} started, {planned.ranks[0].budget}")
    assert started == pytest.approx(planned.num_blocks, rel=0.02)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [4, 4]


def test_the_estimated_workspace_is_near_the_measured_one(config: Config) -> None:
    # What tests before this one have left to be collected would be counted as weights.
    gc.collect()
    torch.cuda.empty_cache()
    left_over = torch.cuda.memory_reserved()
    runner = ModelRunner(config, read_checkpoint_config(config.model.path), TPGroup(0, 1), torch.device("cuda"))
    weight_bytes = runner.load()
    measured = measure_budget(CudaMemory(torch.device("cuda")), 0.9, runner.run_largest_step)
    (rank,) = plan_deployment(config, [RankMemory(measured.total, measured.others)]).ranks
    assert rank.budget is not None
    print("measured", measured, "planned", rank.budget)
    assert rank.weight_bytes == weight_bytes
    assert abs(rank.budget.weights - (measured.weights - left_over)) < 0.005 * measured.total
    assert abs(rank.budget.workspace - measured.workspace) < 0.01 * measured.total


def test_a_step_of_the_largest_size_runs_beside_all_kv_blocks(config: Config) -> None:
    cache = CacheConfig(memory_fraction=0.3, enable_prefix_caching=False)
    small = config.model_copy(
        update={"cache": cache, "scheduler": SchedulerConfig(max_num_seqs=16, max_num_batched_tokens=2048)}
    )
    total = torch.cuda.mem_get_info(0)[1]
    others = total - torch.cuda.mem_get_info(0)[0] - torch.cuda.memory_reserved(0)
    with LocalEngine(small) as engine:
        torch.cuda.reset_peak_memory_stats()
        engine.generate(
            [list(range(start, start + 512)) for start in range(16)],
            SamplingParams(temperature=1.0, top_p=0.9, seed=1, max_tokens=2, logprobs=5, ignore_eos=True),
        )
        assert torch.cuda.max_memory_allocated() <= cache.memory_fraction * total - others


def test_a_gpu_that_is_too_small_is_refused_with_where_the_memory_went(config: Config) -> None:
    tight = config.model_copy(update={"cache": CacheConfig(memory_fraction=0.02)})
    with pytest.raises(ConfigError, match=r"no KV block fits: .* cache.memory_fraction 0.02 allows .* weights"):
        LocalEngine(tight)


def test_devices_seen_from_outside_are_those_seen_from_inside() -> None:
    inside, outside = look_at_devices(), look_from_outside()
    assert [(device.name, device.total) for device in inside] == [
        (device.name, device.total) for device in outside
    ]
    assert all(0 < device.free <= device.total for device in outside)
