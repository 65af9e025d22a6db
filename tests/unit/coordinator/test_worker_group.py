"""Which of the failures that ranks report, or show by their end, is the cause."""

from __future__ import annotations

from tprt.coordinator.cause import first_cause
from tprt.coordinator.worker_group import causes_of
from tprt.messages import WorkerFailed

Failure = tuple[int, WorkerFailed | None]


def failed(rank: int, error: str = "ValueError: x") -> Failure:
    return rank, WorkerFailed(0, rank, "decode", error, "")


def gone(rank: int) -> Failure:
    return rank, None


def cause(*failures: Failure) -> str:
    return first_cause(causes_of(failures)).text


def test_an_error_of_a_ranks_own_comes_before_a_loss_without_a_word() -> None:
    assert cause(gone(1), failed(0)) == "rank 0 failed in phase decode: ValueError: x"


def test_a_loss_without_a_word_comes_before_a_report_of_the_loss_of_another() -> None:
    assert cause(failed(0, "PeerLostError: rank 1"), gone(1)).startswith("rank 1 is gone")


def test_among_equals_the_one_that_came_first_counts() -> None:
    assert cause(failed(2), failed(0)).startswith("rank 2 failed")
    assert cause(gone(2), gone(0)).startswith("rank 2 is gone")


def test_the_end_of_a_rank_after_its_report_is_no_failure_of_its_own() -> None:
    assert cause(failed(0, "PeerLostError: rank 1"), gone(0)).startswith("rank 0 failed")
