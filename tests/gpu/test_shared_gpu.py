"""Ranks that share one GPU give the tokens of one rank, by the whole deployment, captured graphs included."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch import LLM, SamplingParams
from launch.cuda_devices import look_from_outside
from tests.support.checkpoints import TinyModel, reference_tokens, save_tiny
from tests.support.local_engine import make_config
from tprt.config import Config, ParallelConfig
from tprt.errors import TprtError

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("mps", "one_gpu")]

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [42], [150, 3, 99, 120, 7]]
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
SEEDED = SamplingParams(temperature=1.0, seed=3, max_tokens=6, ignore_eos=True)
# Whole rows of logits are gathered for it.
TRUNCATED = SamplingParams(temperature=1.0, top_p=0.8, seed=4, max_tokens=6, ignore_eos=True)
SHAPES = [TinyModel("llama", 9, 3, bias=True), TinyModel("qwen3", 8, 2, tied=True)]


def on_one_gpu(config: Config, world_size: int) -> Config:
    parallel = ParallelConfig(
        tensor_parallel_size=world_size,
        allow_shared_gpu=world_size > 1,
        all_reduce="symm_mem" if world_size > 1 else "auto",
    )
    return config.model_copy(update={"parallel": parallel})


def drawn(config: Config) -> list[list[int]]:
    with LLM(config) as llm:
        outputs = [llm.generate(PROMPTS, params) for params in (GREEDY, SEEDED, TRUNCATED)]
    return [output.outputs[0].token_ids for batch in outputs for output in batch]


@pytest.mark.parametrize("tiny", SHAPES, ids=str)
def test_two_and_three_ranks_on_one_gpu_draw_the_tokens_of_one(
    tmp_path: Path, tiny: TinyModel, capfd: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny(tmp_path, tiny)
    config = make_config(tmp_path, device="cuda")
    alone = drawn(on_one_gpu(config, 1))
    assert alone[: len(PROMPTS)] == [reference_tokens(model, prompt, 6) for prompt in PROMPTS]
    for world_size in (2, 3):
        capfd.readouterr()
        assert drawn(on_one_gpu(config, world_size)) == alone
        logged = capfd.readouterr().err
        assert logged.count("captured 4 decode graphs") == world_size
        assert logged.count("sums: one shot up to") == 1


def test_ranks_that_share_a_gpu_share_its_memory(tmp_path: Path) -> None:
    save_tiny(tmp_path, SHAPES[1])
    config = on_one_gpu(make_config(tmp_path, num_blocks=None, device="cuda", memory_fraction=0.4), 2)
    with LLM(config) as llm:
        (device,) = look_from_outside()
        assert llm.ready.num_blocks > 10_000
    assert 0.35 < 1 - device.free / device.total < 0.42


def test_ranks_share_no_gpu_unless_that_is_set(tmp_path: Path) -> None:
    save_tiny(tmp_path, SHAPES[1])
    refusal = pytest.raises(TprtError, match=r"but 1 are visible; .* set parallel.allow_shared_gpu: true")
    with refusal, LLM(make_config(tmp_path, 2, device="cuda")):
        pass
