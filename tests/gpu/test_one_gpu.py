"""One GPU gives the logits and the greedy tokens of transformers on the same GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from launch import LLM, SamplingParams
from tests.support.checkpoints import TinyModel, reference_logits, reference_tokens, save_tiny
from tests.support.local_engine import LocalEngine, make_config

pytestmark = pytest.mark.gpu

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [42], [150, 3, 99, 120, 7]]
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
SHAPES = [TinyModel("llama", 9, 3, bias=True), TinyModel("qwen3", 8, 2, tied=True)]


@pytest.mark.parametrize("tiny", SHAPES, ids=str)
@pytest.mark.parametrize("max_num_batched_tokens", [64, 8])
def test_logits_and_tokens_equal_those_of_transformers(
    tmp_path: Path, tiny: TinyModel, max_num_batched_tokens: int
) -> None:
    model = save_tiny(tmp_path, tiny).cuda()
    # A captured step shows no logits; that its tokens are the same is tested in test_decode_graphs.py.
    config = make_config(
        tmp_path, max_num_batched_tokens=max_num_batched_tokens, device="cuda", enforce_eager=True
    )
    with LocalEngine(config) as engine:
        tokens = engine.generate(PROMPTS, GREEDY)
        assert tokens == [reference_tokens(model, prompt, 6) for prompt in PROMPTS]
        for index, prompt in enumerate(PROMPTS):
            expected = reference_logits(model, prompt + tokens[index])[len(prompt) - 1 : -1]
            torch.testing.assert_close(torch.stack(engine.logits[index]), expected, atol=1e-4, rtol=0)


def test_random_draws_are_those_of_a_cpu(tmp_path: Path) -> None:
    save_tiny(tmp_path, SHAPES[0])
    params = SamplingParams(temperature=1.0, seed=5, max_tokens=12, ignore_eos=True)
    drawn = []
    for device in ("cpu", "cuda"):
        with LocalEngine(make_config(tmp_path, device=device)) as engine:
            drawn.append(engine.generate(PROMPTS, params))
    assert drawn[0] == drawn[1]


def test_a_deployment_on_the_gpu_sizes_its_blocks_by_free_memory_and_generates(tmp_path: Path) -> None:
    model = save_tiny(tmp_path, SHAPES[1])
    config = make_config(tmp_path, num_blocks=None, device="cuda", memory_fraction=0.8)
    with LLM(config) as llm:
        outputs = llm.generate(PROMPTS, GREEDY)
        assert llm.ready.num_blocks > 10_000
    assert [output.outputs[0].token_ids for output in outputs] == [
        reference_tokens(model, prompt, 6) for prompt in PROMPTS
    ]
