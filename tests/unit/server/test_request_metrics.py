"""What requests add up to."""

from __future__ import annotations

import pytest

from tprt.messages import SamplingParams
from tprt.server.histogram import Histogram
from tprt.server.request_metrics import RequestMetrics, RequestTotals


class Clock:
    """A clock that stands still unless it is told to go on."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def totals() -> RequestTotals:
    return RequestTotals()


def begin(totals: RequestTotals, clock: Clock) -> RequestMetrics:
    return RequestMetrics(totals, 11, SamplingParams(max_tokens=30), clock)


def count_and_sum(histogram: Histogram) -> tuple[int, float]:
    return sum(histogram.counts), pytest.approx(histogram.sum)


def test_times_are_from_the_beginning_to_the_first_token_and_from_token_to_token(
    totals: RequestTotals, clock: Clock
) -> None:
    request = begin(totals, clock)
    for wait_s in (0.5, 0.02, 0.03):
        clock.now_s += wait_s
        request.on_tokens(1)
    clock.now_s += 1.0
    request.on_end("length")
    assert count_and_sum(totals.first_token_s) == (1, 0.5)
    assert count_and_sum(totals.between_tokens_s) == (2, 0.05)
    assert count_and_sum(totals.per_token_s) == (1, 0.025)
    assert count_and_sum(totals.decode_s) == (1, 0.05)
    assert count_and_sum(totals.request_s) == (1, 1.55)


def test_tokens_that_come_at_once_share_the_time_since_the_last(totals: RequestTotals, clock: Clock) -> None:
    request = begin(totals, clock)
    clock.now_s += 0.1
    request.on_tokens(1)
    clock.now_s += 0.4
    request.on_tokens(4)
    assert count_and_sum(totals.between_tokens_s) == (4, 0.4)
    assert totals.between_tokens_s.counts[totals.between_tokens_s.bounds.index(0.1)] == 4


def test_tokens_that_come_with_the_first_were_not_waited_for(totals: RequestTotals, clock: Clock) -> None:
    request = begin(totals, clock)
    clock.now_s += 0.1
    request.on_tokens(3)
    assert count_and_sum(totals.first_token_s) == (1, 0.1)
    assert count_and_sum(totals.between_tokens_s) == (2, 0.0)


def test_prompt_tokens_count_once_the_output_begins_and_others_as_they_come(
    totals: RequestTotals, clock: Clock
) -> None:
    request = begin(totals, clock)
    assert (totals.num_prompt_tokens, totals.num_generated_tokens, totals.num_open) == (0, 0, 1)
    for count in (2, 0, 3):
        request.on_tokens(count)
    assert (totals.num_prompt_tokens, totals.num_generated_tokens, totals.num_open) == (11, 5, 1)
    request.on_end("stop")
    assert (totals.num_open, totals.ended["stop"]) == (0, 1)
    lengths = [totals.prompt_tokens.sum, totals.generated_tokens.sum, totals.max_tokens.sum]
    assert lengths == [11, 5, 30]


def test_a_second_end_counts_for_nothing(totals: RequestTotals, clock: Clock) -> None:
    request = begin(totals, clock)
    request.on_end("abort")
    request.on_end("stop")
    assert totals.num_open == 0
    assert +totals.ended == {"abort": 1}


def test_a_request_that_failed_is_counted_without_lengths_and_times(
    totals: RequestTotals, clock: Clock
) -> None:
    begin(totals, clock).on_end("error")
    assert totals.ended["error"] == 1
    for histogram in (totals.request_s, totals.prompt_tokens, totals.generated_tokens, totals.first_token_s):
        assert sum(histogram.counts) == 0


def test_one_without_a_token_has_no_time_of_its_output(totals: RequestTotals, clock: Clock) -> None:
    begin(totals, clock).on_end("abort")
    assert sum(totals.request_s.counts) == 1
    assert (
        sum(totals.decode_s.counts) == sum(totals.per_token_s.counts) == sum(totals.first_token_s.counts) == 0
    )
