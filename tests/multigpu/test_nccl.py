"""Ranks on GPUs of their own, joined by NCCL, give the tokens of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from launch import LLM, SamplingParams
from tests.support.checkpoints import TinyModel, reference_tokens, save_tiny
from tests.support.local_engine import make_config

pytestmark = pytest.mark.multigpu

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [42], [150, 3, 99, 120, 7]]


@pytest.mark.parametrize("tiny", [TinyModel("llama", 9, 3), TinyModel("qwen3", 8, 2)], ids=str)
def test_every_world_size_that_the_machine_has_gives_the_same_tokens(tmp_path: Path, tiny: TinyModel) -> None:
    model = save_tiny(tmp_path, tiny)
    expected = [reference_tokens(model, prompt, 6) for prompt in PROMPTS]
    for world_size in range(2, min(torch.cuda.device_count(), tiny.heads) + 1):
        with LLM(make_config(tmp_path, world_size, device="cuda")) as llm:
            outputs = llm.generate(PROMPTS, SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True))
        assert [output.outputs[0].token_ids for output in outputs] == expected
