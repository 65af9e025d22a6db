"""Requests that are isolated run one at a time, before all others, and lose nothing by it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.coordinator.driving import add, answer, make, run, schedule
from tests.unit.coordinator.simulated_engine import Engine
from tprt.coordinator.limits import SchedulerLimits
from tprt.coordinator.scheduler import Scheduler
from tprt.messages import SamplingParams


def step_keys(scheduler: Scheduler) -> list[object]:
    step = schedule(scheduler)
    keys = scheduler.keys_in_flight()
    answer(scheduler, step)
    return keys


def test_an_isolated_request_runs_alone_and_before_those_that_came_first() -> None:
    scheduler = make()
    for key in "abc":
        add(scheduler, key, 3)
    scheduler.isolate(["b"])
    assert step_keys(scheduler) == ["b"]
    assert step_keys(scheduler) == ["b"]
    scheduler.isolate([])
    assert sorted(step_keys(scheduler)) == ["a", "b", "c"]  # type: ignore[type-var]


def test_of_several_one_is_at_its_turn_until_it_is_let_go_or_ends() -> None:
    scheduler = make()
    for key in "abc":
        add(scheduler, key, 3)
    scheduler.isolate(["c", "a"])
    assert step_keys(scheduler) == ["c"]
    scheduler.abort("c")
    assert step_keys(scheduler) == ["a"]
    scheduler.abort("a")
    assert step_keys(scheduler) == ["b"]


def test_a_long_prompt_runs_alone_in_chunks() -> None:
    scheduler = make(max_num_batched_tokens=4)
    add(scheduler, "a", 10)
    add(scheduler, "b", 2)
    scheduler.isolate(["a"])
    assert [schedule_and_count(scheduler) for _ in range(4)] == [4, 4, 2, 1]


def schedule_and_count(scheduler: Scheduler) -> int:
    step = schedule(scheduler)
    answer(scheduler, step)
    return int(step.query_lens.sum())


def test_others_give_way_when_there_is_no_room_for_it() -> None:
    scheduler = make(num_blocks=4, enable_prefix_caching=False)
    add(scheduler, "a", 6, max_tokens=50)
    add(scheduler, "b", 12, max_tokens=4)
    run(scheduler)
    scheduler.isolate(["b"])
    for _ in range(4):
        assert step_keys(scheduler) == ["b"]
    assert step_keys(scheduler) == ["a"]
    assert scheduler.counters.num_preemptions == 1


def test_only_unfinished_requests_are_in_flight() -> None:
    scheduler = make()
    add(scheduler, "a", 3)
    add(scheduler, "b", 3)
    assert scheduler.keys_in_flight() == []
    step = schedule(scheduler)
    scheduler.abort("a")
    assert scheduler.keys_in_flight() == ["b"]
    answer(scheduler, step)
    assert scheduler.keys_in_flight() == []


LIMITS = SchedulerLimits(4, 8, 40, 4, 14)
PROMPTS = st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=12), min_size=1, max_size=6)
ORDERS = st.lists(st.lists(st.integers(0, 5), max_size=4), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(prompts=PROMPTS, orders=ORDERS)
def test_whatever_is_isolated_when_and_however_often_the_worker_dies_no_token_changes(
    prompts: list[list[int]], orders: list[list[int]]
) -> None:
    engine = Engine(LIMITS)
    for prompt in prompts:
        engine.add(prompt, SamplingParams(max_tokens=10, seed=5))
    for order in orders:
        engine.scheduler.isolate(order)
        for _ in range(3):
            if engine.schedule() is not None:
                engine.update()
                engine.scheduler.check()
        if engine.schedule() is not None:
            engine.replace_worker()
    engine.scheduler.isolate([])
    engine.finish()


def test_with_fewer_blocks_after_a_new_epoch_what_still_fits_goes_on_and_the_rest_is_named() -> None:
    scheduler = make(num_blocks=10)
    add(scheduler, "a", 5, max_tokens=30)
    add(scheduler, "b", 20)
    run(scheduler)
    scheduler.reset_for_epoch(1)
    assert scheduler.resize(3) == ["b"]
    scheduler.abort("b")
    assert scheduler.limits.num_blocks == 3
    assert scheduler.num_free_blocks == 3
    while scheduler.has_unfinished:
        run(scheduler)
        assert scheduler.limits.max_sequence_len == 13


def test_blocks_that_are_in_use_cannot_be_taken_away() -> None:
    scheduler = make()
    add(scheduler, "a", 5)
    run(scheduler)
    with pytest.raises(AssertionError, match="in use"):
        scheduler.resize(3)
