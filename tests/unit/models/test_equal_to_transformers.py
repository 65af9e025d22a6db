"""Every model gives the logits and the greedy tokens of transformers, on any number of ranks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from tests.support.checkpoints import TinyModel, reference_logits, reference_tokens, save_tiny
from tests.support.local_engine import LocalEngine, make_config
from tprt.messages import SamplingParams

HEADS = [(8, 8), (8, 2), (9, 3), (14, 2), (6, 1)]
SHAPES = [
    TinyModel(architecture, heads, kv_heads, bias=bias, tied=tied)
    for architecture in ("llama", "qwen3")
    for (heads, kv_heads), (bias, tied) in zip(
        HEADS, [(False, False), (True, False), (False, True), (True, True), (False, False)], strict=True
    )
] + [TinyModel("llama", 8, 2, stretched=True)]
PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [42], [150, 3, 99, 120, 7], [5, 6, 7, 8, 9, 10, 11, 12, 77, 78]]
NEW_TOKENS = 6
GREEDY = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)


@dataclass(frozen=True)
class Reference:
    folder: Path
    model: PreTrainedModel
    tokens: list[list[int]]


@pytest.fixture(scope="module", params=SHAPES, ids=str)
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder = tmp_path_factory.mktemp("tiny")
    model = save_tiny(folder, request.param)
    return Reference(folder, model, [reference_tokens(model, prompt, NEW_TOKENS) for prompt in PROMPTS])


def assert_equal(engine: LocalEngine, reference: Reference, tokens: list[list[int]]) -> None:
    """Compare every token, and the logits it was chosen from, with transformers."""
    assert tokens == reference.tokens
    for index, prompt in enumerate(PROMPTS):
        expected = reference_logits(reference.model, prompt + tokens[index])[len(prompt) - 1 : -1]
        torch.testing.assert_close(torch.stack(engine.logits[index]), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_prompts_of_different_lengths_in_one_batch(reference: Reference, world_size: int) -> None:
    with LocalEngine(make_config(reference.folder, world_size)) as engine:
        assert_equal(engine, reference, engine.generate(PROMPTS, GREEDY))
    assert len(engine.steps) == NEW_TOKENS
    assert engine.num_ahead == NEW_TOKENS - 1, "each step but the first was begun before the last was done"


# What a step is made of is the same on every number of ranks. Of three, some share a KV head and some have more
# heads than others, by shape.


@pytest.mark.parametrize("world_size", [2])
def test_steps_that_wait_for_the_tokens_of_the_last(reference: Reference, world_size: int) -> None:
    with LocalEngine(make_config(reference.folder, world_size, async_scheduling=False)) as engine:
        assert_equal(engine, reference, engine.generate(PROMPTS, GREEDY))
    assert engine.num_ahead == 0


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_prefix_that_is_in_the_cache(reference: Reference, world_size: int) -> None:
    with LocalEngine(make_config(reference.folder, world_size)) as engine:
        engine.generate(PROMPTS, GREEDY)
        assert_equal(engine, reference, engine.generate(PROMPTS, GREEDY))
        assert engine.num_cached_tokens == {0: 8, 1: 0, 2: 4, 3: 8}


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_prompt_in_chunks_beside_decodes(reference: Reference, world_size: int) -> None:
    with LocalEngine(make_config(reference.folder, world_size, max_num_batched_tokens=8)) as engine:
        assert_equal(engine, reference, engine.generate(PROMPTS, GREEDY))
        mixed = [step for step in engine.steps if 0 < step.num_decodes < len(step.query_lens)]
        assert any((step.samples == 0).any() for step in mixed)


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_sequence_that_was_preempted_and_computed_again(reference: Reference, world_size: int) -> None:
    config = make_config(reference.folder, world_size, num_blocks=18, block_size=2, enable_prefix_caching=False)
    with LocalEngine(config) as engine:
        assert_equal(engine, reference, engine.generate(PROMPTS, GREEDY))
        assert engine.scheduler.counters.num_preemptions > 0
