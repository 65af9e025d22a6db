"""Log-probabilities of prompt tokens are transformers' own, and change nothing of what runs beside them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from tests.support.checkpoints import TinyModel, reference_logits, save_tiny
from tests.support.local_engine import LocalEngine, make_config
from tprt.coordinator.kv_allocation import KVAllocation
from tprt.coordinator.sequence import Sequence
from tprt.messages import SamplingParams, ScoredStepOutput, StepInput

PROMPT = [5 + index * 7 % 190 for index in range(30)]
OTHER = [42, 43, 44]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    folder = tmp_path_factory.mktemp("model")
    return folder, save_tiny(folder, TinyModel(heads=6, kv_heads=3))


def make_step() -> StepInput:
    """Return a step of two prompts, of which the first is a chunk: nothing is sampled from it."""
    lens = np.array([len(PROMPT), len(OTHER)], np.int32)
    return StepInput(
        epoch=0,
        step=0,
        num_decodes=0,
        seq_slots=np.arange(2, dtype=np.int32),
        query_lens=lens,
        context_lens=lens,
        token_ids=np.array(PROMPT + OTHER, np.int32),
        block_ids=np.arange(9, dtype=np.int32),
        samples=np.array([0, 1], np.uint8),
        temperatures=np.zeros(2, np.float32),
        top_ks=np.zeros(2, np.int32),
        top_ps=np.ones(2, np.float32),
        min_ps=np.zeros(2, np.float32),
        seeds=np.zeros(2, np.int64),
        num_logprobs=np.full(2, -1, np.int32),
    )


def test_a_rank_computes_the_rows_that_a_step_names(saved: tuple[Path, PreTrainedModel]) -> None:
    folder, model = saved
    plain, rows = make_step(), list(range(3, len(PROMPT) - 1))
    assert len(rows) > 2 * 8, "more than two parts of max_num_seqs"
    step = dataclasses.replace(
        plain,
        step=1,
        prompt_rows=np.array(rows, np.int32),
        prompt_row_targets=np.array(PROMPT[4:], np.int32),
        num_prompt_top=2,
    )
    with LocalEngine(make_config(folder)) as engine:
        (runner,) = engine.runners
        without, output = runner.execute(plain), runner.execute(step)
    assert output.token_ids.tolist() == without.token_ids.tolist()
    assert not isinstance(without, ScoredStepOutput)
    assert isinstance(output, ScoredStepOutput)
    expected = reference_logits(model, PROMPT)[rows].log_softmax(dim=-1)
    chosen = expected.gather(1, torch.tensor(PROMPT[4:]).unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(torch.from_numpy(output.prompt_logprobs), chosen, atol=1e-4, rtol=0)
    best = expected.topk(2)
    found = torch.from_numpy(output.prompt_top_logprobs).view(-1, 2)
    torch.testing.assert_close(found, best.values, atol=1e-4, rtol=0)
    assert output.prompt_top_token_ids.tolist() == best.indices.ravel().tolist()
    assert output.num_prompt_top == 2


def test_a_step_of_nothing_but_a_chunk_brings_its_rows(saved: tuple[Path, PreTrainedModel]) -> None:
    folder, _ = saved
    step = dataclasses.replace(
        make_step(),
        samples=np.zeros(2, np.uint8),
        prompt_rows=np.array([30, 31], np.int32),
        prompt_row_targets=np.array(OTHER[1:], np.int32),
    )
    with LocalEngine(make_config(folder)) as engine:
        output = engine.runners[0].execute(step)
    assert isinstance(output, ScoredStepOutput)
    assert len(output.token_ids) == 0
    assert len(output.prompt_logprobs) == 2
    assert (output.prompt_logprobs < 0).all()
    assert len(output.prompt_top_token_ids) == len(output.prompt_top_logprobs) == output.num_prompt_top == 0


SCORED = SamplingParams(temperature=0.0, max_tokens=6, prompt_logprobs=3, ignore_eos=True)
PLAIN = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
SEEDED = dataclasses.replace(PLAIN, temperature=0.9, seed=17, logprobs=1)
PROMPTS = [PROMPT, OTHER, PROMPT[:21], [9, 8], [7] * 5, [11]]
MIX = [SCORED, PLAIN, dataclasses.replace(SCORED, prompt_logprobs=0, logprobs=2), SEEDED, PLAIN, SCORED]


def assert_scored(
    engine: LocalEngine,
    model: PreTrainedModel,
    prompts: list[list[int]] = PROMPTS,
    samplings: list[SamplingParams] = MIX,
) -> None:
    """Compare what was found of each prompt with transformers."""
    for key, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True)):
        news, num_top = engine.prompt_logprobs[key], sampling.prompt_logprobs
        if num_top is None or len(prompt) == 1:
            assert news == []
            continue
        expected = reference_logits(model, prompt)[:-1].log_softmax(dim=-1)
        chosen = expected.gather(1, torch.tensor(prompt[1:]).unsqueeze(1)).squeeze(1)
        found = torch.from_numpy(np.concatenate([part.logprobs for part in news]))
        torch.testing.assert_close(found, chosen, atol=1e-4, rtol=0)
        best = torch.from_numpy(np.concatenate([part.top_logprobs for part in news]))
        torch.testing.assert_close(best, expected.topk(num_top).values.ravel(), atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def plain_tokens(saved: tuple[Path, PreTrainedModel]) -> list[list[int]]:
    """Return the tokens of the same requests where nobody wants anything of a prompt."""
    with LocalEngine(make_config(saved[0])) as engine:
        return engine.generate(PROMPTS, [dataclasses.replace(each, prompt_logprobs=None) for each in MIX])


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_any_number_of_ranks_scores_as_transformers_does_and_samples_the_same_tokens(
    saved: tuple[Path, PreTrainedModel], plain_tokens: list[list[int]], world_size: int
) -> None:
    with LocalEngine(make_config(saved[0], world_size)) as engine:
        assert engine.generate(PROMPTS, MIX) == plain_tokens
        assert_scored(engine, saved[1])
        # All of it is in the prefix cache now, where only those that are not scored may take it from.
        assert engine.generate(PROMPTS, MIX) == plain_tokens
        assert_scored(engine, saved[1])
        assert engine.num_cached_tokens == {0: 0, 1: 0, 2: 0, 3: 0, 4: 4, 5: 0}


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_prompt_in_chunks_that_is_preempted_between_them_loses_and_repeats_nothing(
    saved: tuple[Path, PreTrainedModel], world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    preempted_at = []
    release = KVAllocation.release

    def note(self: KVAllocation, slot: int) -> Sequence:
        sequence = release(self, slot)
        preempted_at.append(sequence.num_scored)
        return sequence

    # Outputs that grow beside the chunks of the last prompt until there are no blocks for it.
    prompts, samplings = [*PROMPTS[1:], PROMPT], [*[PLAIN] * 5, SCORED]
    with LocalEngine(make_config(saved[0])) as engine:
        plain = [dataclasses.replace(each, prompt_logprobs=None) for each in samplings]
        expected = engine.generate(prompts, plain)
    monkeypatch.setattr(KVAllocation, "release", note)
    config = make_config(saved[0], world_size, num_blocks=48, block_size=2, max_num_batched_tokens=8)
    with LocalEngine(config) as engine:
        assert engine.generate(prompts, samplings) == expected
        assert_scored(engine, saved[1], prompts, samplings)
    assert max(count for count in preempted_at if count < len(PROMPT) - 1) > 0
