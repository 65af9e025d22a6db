"""From made-up heartbeats: the rank that holds up the others is named, and where it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from tprt.coordinator.stall import GroupView, StallReport, describe_stall, is_stalled
from tprt.transport.heartbeat import AFTER_LAYERS, Phase, RankBeat

NOW_NS = 1_000_000_000_000
STEP = 41


def ago(seconds: float) -> int:
    return NOW_NS - int(seconds * 1e9)


def at(layer: int, collective: int, *, inside: bool, kind: str = "all_reduce", step: int = STEP) -> RankBeat:
    """A beat 2 s ago in a decode; `ranks` gives it its rank."""
    return RankBeat(
        *(0, ago(2.0), 0, step, Phase.DECODE, layer, collective, kind, inside, 4700),
    )


def idle(step: int, collective: int = 82, kind: str = "all_gather") -> RankBeat:
    return RankBeat(*(0, ago(2.0), 0, step, Phase.IDLE, AFTER_LAYERS, collective, kind, False, 4700))


def starting(phase: Phase, **fields: object) -> RankBeat:
    return replace(RankBeat(0, ago(3.0), phase=phase, pid=4700), **fields)  # type: ignore[arg-type]


def describe(beats: Sequence[RankBeat], states: str = "", step: int | None = STEP) -> StallReport:
    """`states` has a letter for each rank, "." for one that is gone; by default all sleep."""
    placed = [replace(beat, rank=rank, pid=beat.pid and beat.pid + rank) for rank, beat in enumerate(beats)]
    letters = [state.replace(".", "") for state in states or "S" * len(beats)]
    return describe_stall(GroupView(placed, letters, NOW_NS, ago(9.0), step, "h"))


WAITS = at(12, 83, inside=True)
BETWEEN = replace(at(12, 82, inside=False), time_ns=ago(2.1))


def test_a_stopped_rank_is_named_with_what_it_has_not_entered() -> None:
    report = describe([WAITS, BETWEEN, WAITS], "STS")
    assert report == StallReport(
        1,
        "step 41 (decode) made no progress for 2.0 s: ranks 0 and 2 wait in all_reduce 83; rank 1 (host h, pid"
        " 4701) has not entered it: last seen in layer 12 after all_reduce 82, 2.1 s ago; its process is"
        " stopped (state T)",
    )


def test_a_rank_that_is_ready_with_fewer_collectives_than_another_waits_in_has_skipped_one() -> None:
    waits = starting(Phase.KV_ALLOCATION, collective=2, kind="min_int", inside=True)
    report = describe([starting(Phase.IDLE, collective=1, kind="min_int"), waits], step=None)
    assert report.rank == 0
    assert "it skipped a collective" in report.text


def test_a_rank_that_was_stopped_inside_the_collective_is_named_all_the_same() -> None:
    report = describe([WAITS, WAITS], "ST")
    assert report.rank == 1
    assert "rank 1 (host h, pid 4701) is in it as well: last seen in layer 12 in all_reduce 83" in report.text


@pytest.mark.parametrize(
    ("state", "words"),
    [(".", "is gone"), ("Z", r"has ended \(state Z\)"), ("t", r"is held by a debugger \(state t\)")],
)
def test_a_rank_that_is_gone_or_held_is_named_before_one_that_is_behind(state: str, words: str) -> None:
    report = describe([WAITS, at(1, 60, inside=False), BETWEEN], f"SS{state}")
    assert report.rank == 2
    assert report.text.endswith(f"its process {words}".replace("\\", ""))


@pytest.mark.parametrize(
    ("state", "words"),
    [("R", "computes (state R)"), ("D", "waits in the kernel for a disk or a device (state D)")],
)
def test_a_rank_that_is_stuck_between_collectives_is_named_with_what_its_process_does(
    state: str, words: str
) -> None:
    report = describe([BETWEEN, WAITS], f"{state}S")
    assert report.rank == 0
    assert "rank 1 waits in all_reduce 83; rank 0" in report.text
    assert "has not entered it: last seen in layer 12 after all_reduce 82, 2.1 s ago" in report.text
    assert report.text.endswith(words)


def test_ranks_are_named_together_when_several_are_behind() -> None:
    report = describe([BETWEEN, WAITS, BETWEEN])
    assert report.rank == 0
    assert "rank 0 (host h, pid 4700) has not entered it" in report.text
    assert "rank 2 (host h, pid 4702) has not entered it" in report.text


def test_a_rank_that_is_stuck_before_its_first_layer_or_after_its_last_is_said_to_be_there() -> None:
    before = at(-1, 0, inside=False, kind="")
    assert (
        "last seen before the layers before any collective" in describe([before, at(-1, 1, inside=True)]).text
    )
    after = at(AFTER_LAYERS, 82, inside=False)
    waits = at(AFTER_LAYERS, 83, inside=True, kind="all_gather")
    text = describe([waits, after]).text
    assert "rank 0 waits in all_gather 83; rank 1" in text
    assert "last seen after the layers after all_reduce 82" in text


class TestSkippedCollectives:
    """Ranks that are not in one and the same sequence of collectives."""

    def test_a_rank_that_is_one_ahead_is_named_with_both_numbers(self) -> None:
        report = describe([WAITS, at(13, 84, inside=True), WAITS])
        assert report.rank == 1
        assert "ranks 0 and 2 wait in all_reduce 83; rank 1 (host h, pid 4701) is ahead" in report.text
        assert "last seen in layer 13 in all_reduce 84" in report.text
        assert report.text.endswith("it skipped a collective, or ranks 0 and 2 hang in all_reduce 83")

    def test_of_two_ranks_the_one_ahead_is_named_and_the_other_as_well(self) -> None:
        report = describe([at(13, 84, inside=True), WAITS])
        assert report.rank == 0
        assert report.text.endswith("it skipped a collective, or rank 1 hangs in all_reduce 83")

    def test_a_rank_alone_in_an_older_collective_is_behind(self) -> None:
        report = describe([WAITS, at(12, 82, inside=True), WAITS])
        assert report.rank == 1
        assert "has not entered it: last seen in layer 12 in all_reduce 82" in report.text
        assert "skipped" not in report.text

    def test_a_rank_in_another_kind_of_collective_further_on_has_skipped_one(self) -> None:
        report = describe([WAITS, WAITS, at(AFTER_LAYERS, 83, inside=True, kind="all_gather")])
        assert report.rank == 2
        assert "ranks 0 and 1 wait in all_reduce 83" in report.text
        assert "last seen after the layers in all_gather 83" in report.text
        assert report.text.endswith("it skipped a collective")

    def test_a_rank_that_has_finished_with_fewer_collectives_has_skipped_one(self) -> None:
        last = at(AFTER_LAYERS, 84, inside=True, kind="all_gather")
        report = describe([last, idle(STEP, 83)])
        assert report.rank == 1
        assert "rank 0 waits in all_gather 84; rank 1" in report.text
        assert "last seen idle after step 41" in report.text
        assert report.text.endswith("it skipped a collective")

    def test_a_rank_that_has_finished_while_the_others_wait_is_named_with_them(self) -> None:
        last = at(AFTER_LAYERS, 84, inside=True, kind="all_gather")
        report = describe([last, idle(STEP, 84), last])
        assert report.rank == 1
        assert "has left it: last seen idle after step 41" in report.text
        assert report.text.endswith("or ranks 0 and 2 hang in all_gather 84")


class TestNobodyToBlame:
    """All ranks are at the same place."""

    def test_a_collective_that_all_have_entered_hangs_itself(self) -> None:
        report = describe([WAITS, WAITS])
        assert report.rank is None
        assert report.text.endswith(
            "ranks 0 and 1 wait in all_reduce 83: all have entered it, so the collective itself hangs"
        )

    def test_a_step_that_no_rank_has_received_is_said_to_be_that(self) -> None:
        report = describe([idle(STEP - 1), idle(STEP - 1)])
        assert report.rank is None
        assert report.text == (
            "step 41 made no progress for 2.0 s: ranks 0 and 1 are idle after step 40: step 41 has not"
            " reached them"
        )

    def test_a_first_step_that_no_rank_has_received_is_said_to_be_that(self) -> None:
        text = describe([idle(-1), idle(-1)], step=0).text
        assert text.endswith("are idle before the first step: step 0 has not reached them")

    def test_a_step_that_all_have_finished_lacks_its_answer(self) -> None:
        report = describe([idle(STEP), idle(STEP)])
        assert report.rank is None
        assert report.text.endswith("every rank has finished, but the answer of rank 0 has not come")

    def test_one_rank_that_computes_alone_is_named_only_by_what_it_does(self) -> None:
        report = describe([at(5, 0, inside=False, kind="")], "R")
        assert report.rank is None
        assert report.text.endswith("rank 0 is in layer 5 before any collective: none is behind the others")


def test_a_rank_that_has_not_received_the_step_is_named() -> None:
    report = describe([at(-1, 83, inside=True), idle(STEP - 1)])
    assert report.rank == 1
    assert "rank 0 waits in all_reduce 83; rank 1 (host h, pid 4701) has not received step 41" in report.text
    assert "last seen idle after step 40, 2.0 s ago" in report.text


def test_rank_0_that_does_not_get_rid_of_its_answer_is_behind_those_that_have_finished() -> None:
    report = describe([at(AFTER_LAYERS, 84, inside=False, kind="all_gather"), idle(STEP, 84, "all_gather")])
    assert report.rank == 0
    assert "rank 1 is idle after step 41; rank 0" in report.text
    assert "does not go on: last seen after the layers after all_gather 84" in report.text


class TestTheStart:
    """No step is in flight: the ranks are to get ready."""

    def test_a_rank_that_is_stuck_in_loading_is_named_with_how_far_it_is(self) -> None:
        loads = starting(Phase.LOAD, done_bytes=300 * 2**20, total_bytes=2048 * 2**20)
        waits = starting(Phase.KV_ALLOCATION, collective=1, kind="min_int", inside=True)
        report = describe([waits, loads, waits], "SDS", step=None)
        assert report.rank == 1
        assert report.text.startswith("the start made no progress for 3.0 s: ranks 0 and 2 wait in min_int 1")
        assert "has not entered it: last seen in load (300.0 of 2,048.0 MiB), 3.0 s ago" in report.text
        assert report.text.endswith("waits in the kernel for a disk or a device (state D)")

    def test_a_rank_that_has_not_come_to_the_process_group_is_named(self) -> None:
        met = starting(Phase.GROUP_INIT)
        report = describe([met, starting(Phase.IMPORT)], "SR", step=None)
        assert report.rank == 1
        assert "rank 0 is in process-group init; rank 1" in report.text
        assert "does not go on: last seen in import, 3.0 s ago" in report.text

    def test_ranks_that_do_not_find_each_other_are_all_named(self) -> None:
        report = describe([starting(Phase.GROUP_INIT)] * 3, step=None)
        assert report.rank is None
        assert report.text.endswith("ranks 0, 1 and 2 are in process-group init: none of them has gone further")

    def test_a_rank_without_a_sign_of_life_is_named(self) -> None:
        report = describe([starting(Phase.GROUP_INIT), RankBeat(1)], "S.", step=None)
        assert report.rank == 1
        assert report.text.endswith("rank 1 (host h) has not begun: its process has given no sign of life")

    def test_ranks_that_load_side_by_side_each_show_their_progress(self) -> None:
        beats = [starting(Phase.LOAD, done_bytes=done * 2**20, total_bytes=2**30) for done in (5, 6)]
        text = describe(beats, step=None).text
        assert "rank 0 is in load (5.0 of 1,024.0 MiB); rank 1 is in load (6.0 of 1,024.0 MiB)" in text


class TestIsStalled:
    """A stall is that no rank moves, for longer than the timeout, since the step was sent."""

    def test_no_sign_of_any_rank_for_the_timeout_is_a_stall(self) -> None:
        beats = [replace(WAITS, time_ns=ago(3.0)), replace(WAITS, time_ns=ago(5.0))]
        assert is_stalled(beats, NOW_NS, 2.9)
        assert not is_stalled(beats, NOW_NS, 3.1)

    def test_one_rank_that_moves_is_progress(self) -> None:
        assert not is_stalled([replace(WAITS, time_ns=ago(60)), at(3, 4, inside=False)], NOW_NS, 30.0)

    def test_ranks_that_were_idle_before_the_step_have_the_whole_timeout_for_it(self) -> None:
        beats = [replace(idle(40), time_ns=ago(600))]
        assert not is_stalled(beats, NOW_NS, 2.0, since_ns=ago(1.5))
        assert is_stalled(beats, NOW_NS, 2.0, since_ns=ago(2.5))

    def test_the_headline_counts_from_the_step_when_that_came_later(self) -> None:
        beats = [replace(idle(40), time_ns=ago(600))] * 2
        report = describe_stall(GroupView(beats, ["S", "S"], NOW_NS, ago(2.5), 41, "h"))
        assert report.text.startswith("step 41 made no progress for 2.5 s")


def test_a_report_shows_the_stack_before_the_gist() -> None:
    assert str(StallReport(1, "gist", "stack\n")) == "stack\ngist"
    assert str(StallReport(1, "gist")) == "gist"


def test_a_rank_of_another_host_is_named_with_the_node_rank_of_that() -> None:
    report = describe([WAITS, replace(BETWEEN, host=2)])
    assert "rank 1 (host of node rank 2, pid 4701) has not entered it" in report.text
    assert "rank 1 (host of node rank 2) has not begun" in describe([WAITS, RankBeat(1, host=2)]).text
