"""Ranks on GPUs of their own give the tokens of transformers, by either all-reduce, and are replaced."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Literal

import pytest
import torch

from launch import LLM, SamplingParams
from launch.bench.allreduce_cuda import run_cuda_allreduce_bench
from tests.support.checkpoints import TinyModel, reference_tokens, save_tiny
from tests.support.local_engine import make_config
from tests.support.symm_mem_checks import run_checks
from tprt.config import Config, ParallelConfig, SupervisionConfig

pytestmark = pytest.mark.multigpu

AllReduce = Literal["nccl", "symm_mem"]
PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [42], [150, 3, 99, 120, 7]]
BOTH = pytest.mark.parametrize("all_reduce", ["nccl", "symm_mem"])


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what is measured for this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def make_parallel_config(folder: Path, world_size: int, all_reduce: AllReduce) -> Config:
    parallel = ParallelConfig(tensor_parallel_size=world_size, all_reduce=all_reduce)
    update = {"parallel": parallel, "supervision": SupervisionConfig(max_restarts=1000)}
    return make_config(folder, device="cuda", num_blocks=256).model_copy(update=update)


def greedy(num_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)


@BOTH
@pytest.mark.parametrize("world_size", range(2, 9))
@pytest.mark.parametrize("tiny", [TinyModel("llama", 9, 3), TinyModel("qwen3", 8, 2)], ids=str)
def test_every_number_of_ranks_gives_the_same_tokens(
    tmp_path: Path, tiny: TinyModel, world_size: int, all_reduce: AllReduce
) -> None:
    if world_size > (count := torch.cuda.device_count()):
        pytest.skip(f"needs {world_size} GPUs, there are {count}")
    model = save_tiny(tmp_path, tiny)
    expected = [reference_tokens(model, prompt, 6) for prompt in PROMPTS]
    with LLM(make_parallel_config(tmp_path, world_size, all_reduce)) as llm:
        outputs = llm.generate(PROMPTS, greedy(6))
    assert [output.outputs[0].token_ids for output in outputs] == expected


@BOTH
def test_a_rank_that_is_killed_in_a_decode_is_replaced_and_no_token_changes(
    tmp_path: Path, all_reduce: AllReduce
) -> None:
    save_tiny(tmp_path, TinyModel("qwen3", 8, 2))
    params = [greedy(240)] * len(PROMPTS)
    with LLM(make_parallel_config(tmp_path, 2, all_reduce)) as llm:
        expected = [completion.token_ids for completion in llm.run(PROMPTS, params)]
        victim = llm.pids["rank 1"]
        # Most of a decode is sums, and 240 of them take several times as long as this.
        killer = threading.Timer(0.05, os.kill, (victim, signal.SIGKILL))
        killer.start()
        assert [completion.token_ids for completion in llm.run(PROMPTS, params)] == expected
        killer.join()
        assert [completion.token_ids for completion in llm.run(PROMPTS, params)] == expected
        assert llm.pids["rank 1"] != victim


def test_ranks_on_gpus_of_their_own_sum_and_gather_exactly(tmp_path: Path) -> None:
    for world_size in range(2, min(torch.cuda.device_count(), 3) + 1):
        folder = tmp_path / str(world_size)
        folder.mkdir()
        limits = run_checks(folder, world_size)
        assert 0 < limits.one_shot_bytes <= limits.two_shot_bytes


def test_the_bench_measures_nccl_beside() -> None:
    (row,) = run_cuda_allreduce_bench([2], [4096])
    assert (row["ranks"], row["gpus"]) == (2, 2)
    ours, peers = row["one_shot_us"], row["nccl_us"]
    assert ours is not None
    assert peers is not None
    assert 0 < ours < peers


def test_each_replica_has_a_gpu_of_its_own_and_gives_the_same_tokens(tmp_path: Path) -> None:
    model = save_tiny(tmp_path, TinyModel())
    parallel = ParallelConfig(data_parallel_size=2)
    config = make_config(tmp_path, device="cuda", num_blocks=256).model_copy(update={"parallel": parallel})
    with LLM(config) as llm:
        outputs = llm.generate(PROMPTS, greedy(6))
        ranks = [Path(f"/proc/{llm.pids[f'replica {number} rank 0']}/environ") for number in range(2)]
        seen = [dict(line.split("=", 1) for line in rank.read_text().split("\0") if line) for rank in ranks]
    assert [output.outputs[0].token_ids for output in outputs] == [
        reference_tokens(model, prompt, 6) for prompt in PROMPTS
    ]
    assert len({environment["CUDA_VISIBLE_DEVICES"] for environment in seen}) == 2
