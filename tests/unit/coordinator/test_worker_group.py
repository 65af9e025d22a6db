from __future__ import annotations

from tprt.coordinator.worker_group import first_cause
from tprt.messages import WorkerFailed


def failed(rank: int, error: str = "ValueError: x") -> tuple[int, WorkerFailed | None]:
    return rank, WorkerFailed(0, rank, "decode", error, "")


def gone(rank: int) -> tuple[int, WorkerFailed | None]:
    return rank, None


def test_an_error_of_a_ranks_own_comes_before_a_loss_without_a_word() -> None:
    assert first_cause([gone(1), failed(0)]) == failed(0)


def test_a_loss_without_a_word_comes_before_a_report_of_the_loss_of_another() -> None:
    assert first_cause([failed(0, "PeerLostError: rank 1"), gone(1)]) == gone(1)


def test_among_equals_the_one_that_came_first_counts() -> None:
    assert first_cause([failed(2), failed(0)]) == failed(2)
    assert first_cause([gone(2), gone(0)]) == gone(2)


def test_the_end_of_a_rank_after_its_report_is_no_failure_of_its_own() -> None:
    consequence = failed(0, "PeerLostError: rank 1")
    assert first_cause([consequence, gone(0)]) == consequence
