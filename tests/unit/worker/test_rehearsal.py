"""What is rehearsed before the weights are loaded could be sent, and leaves the rank as it was."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.support.checkpoint_layouts import QWEN3_600M
from tprt.checkpoint_config import read_checkpoint_config
from tprt.config import CacheConfig, Config, ModelConfig, ParallelConfig, RuntimeConfig, SchedulerConfig
from tprt.distributed import TPGroup
from tprt.layers.attention import Attention
from tprt.worker import model_runner
from tprt.worker.model_runner import ModelRunner
from tprt.worker.rehearsal import steps_to_rehearse

NUM_LAYERS = 3
SMALL = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=NUM_LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=60,
    max_position_embeddings=200,
)


@given(st.integers(1, 40), st.integers(0, 400), st.integers(2, 300), st.integers(1, 17))
def test_every_step_could_be_sent_and_needs_one_kv_block(
    num_seqs: int, more_tokens: int, max_model_len: int, block_size: int
) -> None:
    scheduler = SchedulerConfig(max_num_seqs=num_seqs, max_num_batched_tokens=num_seqs + more_tokens)
    steps = steps_to_rehearse(scheduler, max_model_len, block_size)
    for step in steps:
        assert 1 <= len(step.token_ids) == step.query_lens.sum() <= scheduler.max_num_batched_tokens
        assert (step.query_lens <= step.context_lens).all()
        assert step.context_lens.max() <= max_model_len
        assert len(step.block_ids) == sum(-(-int(length) // block_size) for length in step.context_lens)
        assert not step.block_ids.any()
        assert not step.token_ids.any()
        assert (step.num_logprobs == -1).all()
    assert len({(*step.query_lens, *step.context_lens) for step in steps}) >= len(steps) - 1


def test_prompts_stand_alone_behind_a_prefix_and_beside_decodes() -> None:
    steps = steps_to_rehearse(SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=100), 4096, 16)
    assert [(step.num_decodes, len(step.query_lens)) for step in steps[9:]] == [(1, 2), (2, 3), (4, 5)]
    found = {(int(step.query_lens[0]), int(step.context_lens[0])) for step in steps[1:9]}
    assert found == {(size, size + cached) for size in (16, 32, 64, 100) for cached in (0, 16)}


def make_runner(folder: Path, world_size: int) -> ModelRunner:
    (folder / "config.json").write_text(json.dumps(QWEN3_600M | SMALL))
    config = Config(
        model=ModelConfig(path=str(folder), dtype="float32", load_format="dummy"),
        parallel=ParallelConfig(tensor_parallel_size=world_size),
        cache=CacheConfig(block_size=4),
        scheduler=SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=64),
        runtime=RuntimeConfig(device="cpu", num_threads=1),
    )
    # A group of two without collectives: whatever a rehearsal sent would be an error.
    group = TPGroup(0, world_size)
    return ModelRunner(config, read_checkpoint_config(str(folder)), group, torch.device("cpu"))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Rehearse though there are no kernels; return, for each step of it, which layers it runs."""
    steps: list[list[int]] = []

    @contextmanager
    def rehearsing(like: Tensor, rehearse: Callable[[], None]) -> Iterator[None]:
        assert like.device.type == "cpu"
        rehearse()
        yield

    def build(*args: object) -> torch.nn.Module:
        model = model_runner_build(*args)
        model.model.embed_tokens.register_forward_hook(lambda *_: steps.append([]))
        for number, layer in enumerate(model.model.layers):
            layer.register_forward_hook(lambda *_, number=number: steps[-1].append(number))
        return model

    model_runner_build: Callable[..., torch.nn.Module] = model_runner.build_model
    monkeypatch.setattr(model_runner, "compiling_kernels", rehearsing)
    monkeypatch.setattr(model_runner, "build_model", build)
    return steps


def assert_is_as_built(runner: ModelRunner) -> None:
    caches = [module.kv_cache for module in runner.model.modules() if isinstance(module, Attention)]
    assert [cache.numel() for cache in caches] == [0] * NUM_LAYERS


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_rehearsal_runs_the_first_layer_alone_and_asks_no_other_rank(
    tmp_path: Path, seen: list[list[int]], world_size: int
) -> None:
    runner = make_runner(tmp_path, world_size)
    runner.load()
    # The largest step, prompts of 16, 32 and 64 tokens with and without a prefix, beside one and two decodes.
    assert seen == [[0]] * 9
    assert_is_as_built(runner)


def test_too_little_memory_for_a_rehearsal_is_left_for_the_largest_step_to_tell(
    tmp_path: Path, seen: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(ModelRunner, "_forward", fail)
    runner = make_runner(tmp_path, 1)
    runner.load()
    assert seen == []
    assert_is_as_built(runner)
