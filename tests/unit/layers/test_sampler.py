"""Sampling over a sharded vocabulary gives what sampling over the whole one gives."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from tprt.distributed import TPGroup
from tprt.distributed.local import make_local_groups
from tprt.layers.noise import gumbel_noise, noise_keys
from tprt.layers.sampler import Sampled, Sampler, SamplingBatch, _truncated
from tprt.sharding import Range

VOCAB = 101


def batch(
    temperatures: list[float],
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    num_top: int | None = None,
    first_seed: int = 0,
) -> SamplingBatch:
    n = len(temperatures)
    seeds = np.arange(first_seed, first_seed + n, dtype=np.int64)
    return SamplingBatch(
        temperatures=torch.tensor(temperatures),
        top_ks=torch.full((n,), top_k),
        top_ps=torch.full((n,), top_p),
        min_ps=torch.full((n,), min_p),
        noise_keys=torch.from_numpy(noise_keys(seeds, np.full(n, 9, np.int32))),
        num_top=num_top,
        any_random=any(temperatures),
        any_truncated=top_k > 0 or top_p < 1 or min_p > 0,
    )


def rows_of(world_size: int) -> list[Range]:
    cuts = [*[0, 1, 40, 77][:world_size], VOCAB]
    return [Range(a, b) for a, b in pairwise(cuts)]


def sample(logits: Tensor, parameters: SamplingBatch, world_size: int) -> Sampled:
    """Sample on `world_size` ranks and return what all of them agree on."""
    rows = rows_of(world_size)

    def on_rank(group: TPGroup) -> Sampled:
        part = rows[group.rank]
        result: Sampled = Sampler(group, rows)(logits[:, part.start : part.stop].clone(), parameters)
        return result

    groups = make_local_groups(world_size)
    with ThreadPoolExecutor(world_size) as pool:
        results = list(pool.map(on_rank, groups))
    for result in results[1:]:
        assert torch.equal(result.token_ids, results[0].token_ids)
    return results[0]


@pytest.fixture
def logits() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(6, VOCAB) * 3


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_greedy_takes_the_largest_logit_of_all_ranks(logits: Tensor, world_size: int) -> None:
    assert torch.equal(sample(logits, batch([0.0] * 6), world_size).token_ids, logits.argmax(-1))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_the_lowest_token_wins_a_tie_between_ranks(world_size: int) -> None:
    assert sample(torch.zeros(1, VOCAB), batch([0.0]), world_size).token_ids.tolist() == [0]


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("limits", [{}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.1}], ids=str)
def test_random_draws_do_not_depend_on_the_number_of_ranks(
    logits: Tensor, world_size: int, limits: dict[str, float]
) -> None:
    mixed = batch([0.0, 0.5, 1.0, 1.5, 0.0, 1.0], **limits)  # type: ignore[arg-type]
    alone = sample(logits, mixed, 1).token_ids
    assert torch.equal(sample(logits, mixed, world_size).token_ids, alone)
    assert alone[0] == logits[0].argmax()


def test_a_draw_does_not_depend_on_the_rest_of_the_batch(logits: Tensor) -> None:
    together = sample(logits, batch([1.0] * 6), 1).token_ids
    alone = [
        int(sample(logits[i : i + 1], batch([1.0], first_seed=i), 1).token_ids[0]) for i in range(len(logits))
    ]
    assert together.tolist() == alone


def test_draws_follow_the_softmax_at_the_temperature() -> None:
    row = torch.tensor([2.0, 1.0, 0.0, -1.0])
    draws = 4000
    keys = torch.from_numpy(noise_keys(np.arange(draws, dtype=np.int64), np.full(draws, 3, np.int32)))
    tokens = (row / 0.8 + gumbel_noise(keys, 0, 4)).argmax(-1)
    shares = torch.bincount(tokens, minlength=4) / draws
    torch.testing.assert_close(shares, (row / 0.8).softmax(-1), atol=0.03, rtol=0)


def test_noise_differs_between_positions_and_between_seeds() -> None:
    keys = noise_keys(np.array([1, 1, 2], np.int64), np.array([1, 2, 1], np.int32))
    noise = gumbel_noise(torch.from_numpy(keys), 0, 1000)
    assert len(set(keys.tolist())) == 3
    assert not torch.isinf(noise).any()
    assert abs(float(torch.corrcoef(noise)[0, 1])) < 0.1
    assert abs(float(torch.corrcoef(noise)[0, 2])) < 0.1


def test_top_k_draws_only_among_the_k_most_likely(logits: Tensor) -> None:
    allowed = logits.topk(3).indices
    for seed in range(40):
        tokens = sample(logits, batch([2.0] * 6, top_k=3, first_seed=6 * seed), 1).token_ids
        assert (allowed == tokens.unsqueeze(1)).any(1).all()


def test_top_p_keeps_the_token_that_crosses_the_threshold_and_nothing_after_it() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    drawn = {int(sample_four(logits, top_p=0.6, seed=seed)) for seed in range(200)}
    assert drawn == {0, 1}


def test_min_p_drops_what_is_far_less_likely_than_the_best() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    drawn = {int(sample_four(logits, min_p=0.5, seed=seed)) for seed in range(200)}
    assert drawn == {0, 1}


def test_tokens_as_likely_as_the_last_that_is_kept_are_kept_too() -> None:
    logits = torch.tensor([[0.4, 0.2, 0.2, 0.2]]).log()
    for limits in ({"top_k": 2}, {"top_p": 0.5}):
        kept = _truncated(logits, batch([1.0], **limits))  # type: ignore[arg-type]
        assert kept.equal(logits)
    assert _truncated(logits, batch([1.0], top_p=0.4)).isinf().tolist() == [[False, True, True, True]]


def test_a_row_without_limits_keeps_its_least_likely_tokens_beside_one_that_has_some() -> None:
    torch.manual_seed(0)
    logits, mixed = torch.randn(2, 20_000), batch([1.0, 1.0], top_p=0.5)
    mixed.top_ps[0] = 1.0
    kept = _truncated(logits, mixed)
    assert kept[0].equal(logits[0])
    assert kept[1].isinf().any()


def sample_four(logits: Tensor, seed: int, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    sampler = Sampler(TPGroup(0, 1), [Range(0, 4)])
    result: Sampled = sampler(logits, batch([1.0], top_p=top_p, min_p=min_p, first_seed=seed))
    return result.token_ids[0]


@pytest.mark.parametrize("world_size", [1, 3])
def test_logprobs_are_those_of_the_whole_row(logits: Tensor, world_size: int) -> None:
    result = sample(logits, batch([0.0] * 6, num_top=4), world_size)
    expected = logits.log_softmax(-1)
    assert result.logprobs is not None
    assert result.top_token_ids is not None
    torch.testing.assert_close(result.logprobs, expected.max(-1).values)
    assert torch.equal(result.top_token_ids, expected.topk(4).indices)
    torch.testing.assert_close(result.top_logprobs, expected.topk(4).values)
