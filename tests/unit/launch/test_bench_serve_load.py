"""A load is a function of its seed, and has the lengths, the rate and the burstiness that were asked for."""

from __future__ import annotations

import json

import numpy as np
import pytest

from launch.bench.serve_load import Lengths, RequestForm, arrival_times


def draw(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_arrivals_follow_from_the_seed() -> None:
    assert arrival_times(draw(1), 50, 4.0, 0.5) == arrival_times(draw(1), 50, 4.0, 0.5)
    assert arrival_times(draw(1), 50, 4.0, 0.5) != arrival_times(draw(2), 50, 4.0, 0.5)


def test_arrivals_have_the_rate_whatever_the_seed() -> None:
    for seed in range(3):
        times = arrival_times(draw(seed), 200, 8.0, 1.0)
        assert times == sorted(times)
        assert times[-1] == pytest.approx(25.0)


def test_burstiness_is_the_shape_of_the_gamma_distribution() -> None:
    # The variance of a gamma distribution of mean 1 is 1 over its shape.
    for shape in (0.25, 1.0, 16.0):
        pauses = np.diff(arrival_times(draw(0), 40_000, 1.0, shape))
        assert pauses.var() == pytest.approx(1 / shape, rel=0.1)


def test_at_an_infinite_rate_all_arrive_at_once() -> None:
    assert arrival_times(draw(0), 3, float("inf"), 1.0) == [0.0, 0.0, 0.0]


def test_lengths_are_exact_without_a_range_and_fill_it_with_one() -> None:
    assert Lengths(7, 3).draw(draw(0), 4) == [(7, 3)] * 4
    prompts, outputs = zip(*Lengths(10, 2, 0.5).draw(draw(0), 500), strict=True)
    assert set(prompts) == set(range(5, 16))
    assert set(outputs) == {1, 2, 3}


def test_a_range_as_long_as_the_length_leaves_one_token() -> None:
    prompts, _ = zip(*Lengths(2, 1, 1.0).draw(draw(0), 100), strict=True)
    assert set(prompts) == {1, 2, 3, 4}


def test_prompts_are_token_ids_of_the_exact_length() -> None:
    body = json.loads(RequestForm("m", "completions", 50).body(draw(0), 300, 9))
    assert len(body["prompt"]) == 300
    assert set(body["prompt"]) <= set(range(50))
    assert body["max_tokens"] == 9
    assert body["ignore_eos"] is True
    assert body["stream_options"] == {"include_usage": True}


def test_without_a_vocabulary_and_in_a_chat_prompts_are_words() -> None:
    text = json.loads(RequestForm("m", "completions", 0, ignore_eos=False).body(draw(0), 12, 1))
    assert len(text["prompt"].split()) == 12
    assert "ignore_eos" not in text
    chat = json.loads(RequestForm("m", "chat", 50).body(draw(0), 12, 1))
    (message,) = chat["messages"]
    assert message["role"] == "user"
    assert len(message["content"].split()) == 12
