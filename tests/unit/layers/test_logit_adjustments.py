"""Adjusted logits equal those of straightforward references, whole or in the parts that ranks have."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor

from tests.support.adjusted_steps import SequenceWishes, make_adjusted_step
from tprt.distributed import TPGroup
from tprt.layers.logit_adjustments import LogitAdjustments
from tprt.layers.sampler import Sampled, Sampler, SamplingBatch
from tprt.sharding import Range
from tprt.worker.adjustment_input import make_adjustments

VOCAB = 101
CUTS = [[0, VOCAB], [0, 40, VOCAB], [0, 1, 77, VOCAB], [0, 8, 16, 99, VOCAB]]


def adjust(logits: Tensor, wishes: list[SequenceWishes], cuts: list[int]) -> Tensor:
    """Adjust the parts of `logits` `[n, V]` that ranks have, and put them together again."""
    step, parts = make_adjusted_step(wishes, VOCAB), []
    for start, stop in pairwise(cuts):
        adjustments = make_adjustments(step, np.arange(len(wishes)), Range(start, stop), torch.from_numpy)
        assert adjustments is not None
        parts.append(adjustments.apply(logits[:, start:stop]))
    return torch.cat(parts, dim=1)


def penalised(row: Tensor, prompt: list[int], output: list[int], presence: float, frequency: float) -> Tensor:
    """OpenAI's definition, word for word and in float64."""
    expected = row.double().clone()
    for token_id in set(output):
        expected[token_id] -= frequency * output.count(token_id) + presence
    return expected


def random_history(random: np.random.Generator) -> tuple[list[int], list[int]]:
    prompt, output = random.integers(0, VOCAB, 30), random.integers(0, VOCAB, int(random.integers(0, 60)))
    return prompt.tolist(), output.tolist()


@pytest.fixture
def logits() -> Tensor:
    torch.manual_seed(2)
    return torch.randn(5, VOCAB) * 4


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_presence_and_frequency_penalties_count_the_output_alone(
    logits: Tensor, cuts: list[int], seed: int
) -> None:
    random = np.random.default_rng(seed)
    histories = [random_history(random) for _ in logits]
    strengths = random.uniform(-2, 2, (len(logits), 2)).astype(np.float32).tolist()
    wishes = [
        SequenceWishes(prompt, output, presence=presence, frequency=frequency)
        for (prompt, output), (presence, frequency) in zip(histories, strengths, strict=True)
    ]
    expected = [
        penalised(row, *history, *both) for row, history, both in zip(logits, histories, strengths, strict=True)
    ]
    torch.testing.assert_close(
        adjust(logits, wishes, cuts).double(), torch.stack(expected), atol=1e-5, rtol=1e-6
    )


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("penalty", [0.5, 1.2, 3.0])
def test_the_repetition_penalty_is_that_of_transformers_over_prompt_and_output(
    logits: Tensor, cuts: list[int], penalty: float
) -> None:
    random = np.random.default_rng(3)
    histories = [random_history(random) for _ in logits]
    wishes = [SequenceWishes(prompt, output, repetition=penalty) for prompt, output in histories]
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    expected = [
        processor(torch.tensor([prompt + output]), row.unsqueeze(0).clone())
        for row, (prompt, output) in zip(logits, histories, strict=True)
    ]
    torch.testing.assert_close(adjust(logits, wishes, cuts), torch.cat(expected))


def test_repetition_comes_before_presence_and_frequency(logits: Tensor) -> None:
    wishes = [SequenceWishes([3], [3, 4, 4], presence=0.5, frequency=0.25, repetition=2.0)] * len(logits)
    expected = logits.clone()
    for token_id, count in ((3, 1), (4, 2)):
        column = logits[:, token_id]
        expected[:, token_id] = torch.where(column > 0, column / 2, column * 2) - 0.25 * count - 0.5
    torch.testing.assert_close(adjust(logits, wishes, CUTS[2]), expected)


@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_biases_are_added_and_minus_infinity_forbids(logits: Tensor, cuts: list[int]) -> None:
    wishes = [SequenceWishes(bias={0: 5.0, 40: -100.0, 100: float("-inf")}), *[SequenceWishes()] * 4]
    expected = logits.clone()
    expected[0, 0] += 5
    expected[0, 40] -= 100
    expected[0, 100] = float("-inf")
    assert adjust(logits, wishes, cuts).equal(expected)


@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_a_mask_leaves_what_it_names_and_nothing_else(logits: Tensor, cuts: list[int]) -> None:
    random = np.random.default_rng(4)
    allowed = {row: set(random.integers(0, VOCAB, 20).tolist()) for row in (0, 1, 4)}
    wishes = [SequenceWishes(allowed=allowed.get(row)) for row in range(5)]
    found = adjust(logits, wishes, cuts)
    for row in range(5):
        possible = allowed.get(row, set(range(VOCAB)))
        expected = torch.tensor([token_id in possible for token_id in range(VOCAB)])
        assert found[row].isfinite().equal(expected)
        assert found[row][expected].equal(logits[row][expected])


def test_more_masks_than_are_unpacked_at_a_time_each_find_their_row() -> None:
    logits = torch.zeros(70, VOCAB)
    found = adjust(logits, [SequenceWishes(allowed={row}) for row in range(70)], CUTS[1])
    assert found.argmax(dim=1).tolist() == list(range(70))
    assert int(found.isfinite().sum()) == 70


def test_adjusting_leaves_the_logits_as_they_were_and_does_not_round_them(logits: Tensor) -> None:
    halves = logits.bfloat16()
    before = halves.clone()
    found = adjust(halves, [SequenceWishes(bias={7: 0.01})] * 5, CUTS[0])
    assert halves.equal(before)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[:, 7], before[:, 7].float() + 0.01)


def test_reported_log_probabilities_are_those_of_the_model_whatever_was_adjusted(logits: Tensor) -> None:
    step = make_adjusted_step([SequenceWishes(allowed={9})] * 5, VOCAB)
    adjustments = make_adjustments(step, np.arange(5), Range(0, VOCAB), torch.from_numpy)
    sampled = sample_greedily(logits, adjustments)
    assert sampled.token_ids.tolist() == [9] * 5
    assert sampled.logprobs is not None
    assert sampled.top_token_ids is not None
    torch.testing.assert_close(sampled.logprobs, logits.log_softmax(-1)[:, 9])
    assert sampled.top_token_ids[:, 0].equal(logits.argmax(-1))


def sample_greedily(logits: Tensor, adjustments: LogitAdjustments | None) -> Sampled:
    n = len(logits)
    batch = SamplingBatch(
        temperatures=torch.zeros(n),
        top_ks=torch.zeros(n, dtype=torch.int64),
        top_ps=torch.ones(n),
        min_ps=torch.zeros(n),
        noise_keys=torch.zeros(n, dtype=torch.int64),
        num_top=2,
        any_random=False,
        any_truncated=False,
        adjustments=adjustments,
    )
    result: Sampled = Sampler(TPGroup(0, 1), [Range(0, VOCAB)])(logits, batch)
    return result
