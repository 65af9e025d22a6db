"""Places are counted, and who is refused is told when to come again."""

from __future__ import annotations

import pytest

from tprt.errors import InvalidRequestError
from tprt.server.admission import Admission


def test_there_are_places_for_those_that_run_and_those_that_wait() -> None:
    admission = Admission(max_running=3, max_queued=2)
    assert [admission.has_places(1, present) for present in range(7)] == [True] * 5 + [False] * 2
    assert [admission.has_places(3, present) for present in range(5)] == [True] * 3 + [False] * 2


def test_more_than_there_are_places_need_not_come_again() -> None:
    admission = Admission(max_running=3, max_queued=2)
    assert admission.has_places(5, 0)
    with pytest.raises(InvalidRequestError, match=r"asks for 6 outputs.* takes 5 at"):
        admission.has_places(6, 0)


@pytest.mark.parametrize(
    ("ends", "num_present", "seconds"),
    [
        ([], 100, 1),
        # two a second, and ten wait
        ([0.0, 0.5, 1.0, 1.5, 2.0], 14, 5),
        # the pace slackens with the time since the last end
        ([0.0, 0.5, 1.0], 6, 2),
        ([0.0], 14, 20),
        ([0.0, 0.001, 0.002], 5, 1),
        ([0.0, 0.1], 1000, 60),
    ],
)
def test_it_is_worth_coming_again_when_those_that_wait_have_found_a_place(
    ends: list[float], num_present: int, seconds: int
) -> None:
    admission = Admission(max_running=4, max_queued=1000)
    for end_s in ends:
        admission.on_end(end_s)
    assert admission.retry_after_s(num_present, 2.0) == seconds
