"""Penalties, biases and least lengths on real ranks: as the definitions say, whatever runs beside them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, RepetitionPenaltyLogitsProcessor

from tests.support.checkpoints import TinyModel, reference_logits, save_tiny
from tests.support.local_engine import LocalEngine, make_config
from tprt.messages import SamplingParams

EOS = 0
PROMPTS = [[5, 6, 7, 7, 7], [9], [11, 12, 11, 12, 11, 12, 11], [3] * 12]
COUNT = 20
GREEDY = SamplingParams(temperature=0.0, max_tokens=COUNT)
ALL = dataclasses.replace(
    GREEDY,
    presence_penalty=0.7,
    frequency_penalty=0.4,
    repetition_penalty=1.3,
    logit_bias=((EOS, 3.0), (20, -100.0), (198, 1.5)),
    min_tokens=6,
)
SEEDED = dataclasses.replace(ALL, temperature=0.9, seed=17, top_p=0.9)
MIX = [
    ALL,
    dataclasses.replace(GREEDY, logprobs=2),
    dataclasses.replace(SEEDED, logprobs=1),
    dataclasses.replace(GREEDY, temperature=1.0, seed=4, presence_penalty=-1.0),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    folder = tmp_path_factory.mktemp("model")
    return folder, save_tiny(folder, TinyModel(heads=6, kv_heads=3))


def expected_tokens(model: PreTrainedModel, prompt: list[int], sampling: SamplingParams) -> list[int]:
    """Generate greedily with transformers, step by step and from the whole history."""
    output: list[int] = []
    processor = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)
    while len(output) < sampling.max_tokens and output[-1:] != [EOS]:
        row = reference_logits(model, prompt + output)[-1]
        for token_id, bias in sampling.logit_bias:
            row[token_id] += bias
        if len(output) < sampling.min_tokens:
            row[EOS] = float("-inf")
        row = processor(torch.tensor([prompt + output]), row.unsqueeze(0))[0].double()
        for token_id in set(output):
            row[token_id] -= sampling.presence_penalty + sampling.frequency_penalty * output.count(token_id)
        output.append(int(row.argmax()))
    return output


@pytest.fixture(scope="module")
def expected(saved: tuple[Path, PreTrainedModel]) -> list[list[int]]:
    """Return transformers' greedy tokens, which are other ones than without adjustments."""
    found = [expected_tokens(saved[1], prompt, ALL) for prompt in PROMPTS]
    assert found[0] != expected_tokens(saved[1], PROMPTS[0], GREEDY)
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_greedy_tokens_are_those_of_the_definitions(
    saved: tuple[Path, PreTrainedModel], expected: list[list[int]], world_size: int
) -> None:
    folder, _ = saved
    with LocalEngine(make_config(folder, world_size)) as engine:
        assert engine.generate(PROMPTS, ALL) == expected


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_seeded_tokens_do_not_depend_on_ranks_and_company(
    saved: tuple[Path, PreTrainedModel], world_size: int
) -> None:
    folder, _ = saved
    with LocalEngine(make_config(folder)) as engine:
        alone = [engine.generate([prompt], each)[0] for prompt, each in zip(PROMPTS, MIX, strict=True)]
    with LocalEngine(make_config(folder, world_size)) as engine:
        assert engine.generate(PROMPTS, MIX) == alone
        assert engine.generate(PROMPTS[::-1], MIX[::-1]) == alone[::-1]


@pytest.mark.parametrize("async_scheduling", [True, False])
def test_preemption_and_the_next_step_in_flight_change_nothing(
    saved: tuple[Path, PreTrainedModel], async_scheduling: bool
) -> None:
    folder, _ = saved
    with LocalEngine(make_config(folder)) as engine:
        expected = engine.generate(PROMPTS, MIX)
        assert engine.scheduler.counters.num_preemptions == 0
    with LocalEngine(make_config(folder, 2, num_blocks=12, async_scheduling=async_scheduling)) as engine:
        assert engine.generate(PROMPTS, MIX) == expected
        assert engine.scheduler.counters.num_preemptions > 0


def test_an_output_ends_no_sooner_than_it_may(saved: tuple[Path, PreTrainedModel]) -> None:
    folder, _ = saved
    eager = dataclasses.replace(GREEDY, logit_bias=((EOS, 100.0), (8, 50.0)))
    with LocalEngine(make_config(folder)) as engine:
        assert engine.generate([[5, 6]], eager) == [[EOS]]
        assert engine.generate([[5, 6]], dataclasses.replace(eager, min_tokens=3)) == [[8, 8, 8, EOS]]
        stops_at_8 = dataclasses.replace(eager, min_tokens=3, stop_token_ids=(8,))
        (tokens,) = engine.generate([[5, 6]], stops_at_8)
        assert not {EOS, 8} & set(tokens[:3])
        assert tokens[3:] == [EOS]
        with_eos = dataclasses.replace(stops_at_8, ignore_eos=True)
        assert engine.generate([[5, 6]], with_eos)[0][:3] == tokens[:3]


def test_a_bias_forces_a_token_and_forbids_it(saved: tuple[Path, PreTrainedModel]) -> None:
    folder, _ = saved
    with LocalEngine(make_config(folder, 3)) as engine:
        (plain,) = engine.generate([PROMPTS[0]], GREEDY)
        for token_id in (1, 100, 198):
            forced = dataclasses.replace(GREEDY, logit_bias=((token_id, 100.0),))
            assert engine.generate([PROMPTS[0]], forced) == [[token_id] * COUNT]
        forbidden = dataclasses.replace(GREEDY, logit_bias=tuple((token_id, -100.0) for token_id in plain))
        assert not set(engine.generate([PROMPTS[0]], forbidden)[0]) & set(plain)


def test_what_need_not_be_known_here_does_not_keep_the_next_step_from_being_sent(
    saved: tuple[Path, PreTrainedModel],
) -> None:
    folder, _ = saved
    known_early = dataclasses.replace(ALL, presence_penalty=0.0, frequency_penalty=0.0, repetition_penalty=1.0)
    with LocalEngine(make_config(folder)) as engine:
        (tokens,) = engine.generate([PROMPTS[0]], known_early)
        assert engine.num_ahead >= len(tokens) - 2 > 3
        before = engine.num_ahead
        engine.generate([PROMPTS[0]], ALL)
        assert engine.num_ahead == before
