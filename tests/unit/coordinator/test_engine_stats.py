"""What a client is told that asks how the engine is doing."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.unit.coordinator.driving import add, answer, run, schedule
from tests.unit.coordinator.driving import make as make_scheduler
from tests.unit.coordinator.engine_of_threads import DEADLINE_S, NUM_BLOCKS, Make, Rank, assert_set
from tests.unit.coordinator.replaced_engine import ReplacedEngine
from tprt.coordinator.greeting import describe
from tprt.coordinator.worker_group import WorkerGroup
from tprt.messages import QUEUE_BOUNDS_S, AddRequest, EngineStats, GetStats, SamplingParams, StepInput
from tprt.transport.codec import decode, encode

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture
def replaced(tmp_path: Path) -> Iterator[ReplacedEngine]:
    engine = ReplacedEngine(tmp_path)
    yield engine
    engine.stop()


def test_both_messages_survive_the_wire() -> None:
    stats = EngineStats(2, True, 3, 4, 0.5, 6, 7, 8, 9, 10, 11, 12, 1.5, (1, 2, 3), 4.5)
    for message in (GetStats(), stats):
        assert decode(b"".join(encode(message))) == message


def test_an_engine_that_has_done_nothing_says_so(make: Make) -> None:
    stats = make(2).start().client().ask_stats()
    assert stats == EngineStats(
        0, True, 0, 0, 0.0, NUM_BLOCKS, NUM_BLOCKS, 0, 0, 0, 0, 0, 0.0, (0,) * (len(QUEUE_BOUNDS_S) + 1)
    )


def test_prompts_tokens_and_steps_are_counted(make: Make) -> None:
    client = make(1).start().client()
    client.add(1, prompt_len=7, max_tokens=5)
    client.wait(lambda: 1 in client.reasons)
    client.add(2, prompt_len=9, max_tokens=1)
    client.wait(lambda: 2 in client.reasons)
    stats = client.ask_stats()
    assert (stats.num_prompt_tokens, stats.num_generated_tokens, stats.num_steps) == (16, 6, 6)
    assert stats.num_cached_tokens == 4, "the first block: later ones hold what the first request generated"
    assert (stats.num_running, stats.num_waiting, stats.num_free_blocks) == (0, 0, NUM_BLOCKS)
    assert 0 < stats.last_step_s < 10


def test_how_long_requests_waited_is_counted_once_for_each(make: Make) -> None:
    engine = make(1)
    engine.ranks[0].on_step = lambda rank, step: (time.sleep(0.005), rank.answer(step))[1]
    client = engine.start().client()
    for request_id in range(10):
        client.add(request_id, prompt_len=4, max_tokens=4)
    client.wait(lambda: len(client.reasons) == 10)
    stats = client.ask_stats()
    assert len(stats.queue_counts) == len(QUEUE_BOUNDS_S) + 1
    assert sum(stats.queue_counts) == 10
    # Eight run at a time, so at least one has waited for steps of five milliseconds.
    assert stats.queue_sum_s > 0.005
    assert stats.queue_counts[0] < 10
    told = [queue_s for output in client.outputs for queue_s in output.queue_s.tolist() if queue_s >= 0]
    assert len(told) == 10, "each request is told once how long it has waited"
    assert sum(told) == pytest.approx(stats.queue_sum_s, rel=1e-4)


def test_a_request_is_told_what_it_waited_with_its_first_token_whatever_comes_between() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=4)
    add(scheduler, "a", 6, max_tokens=3)
    step = schedule(scheduler)
    scheduler.counters.step_began(2_500_000_000)
    # The first part of the prompt brings no token, and then the ranks are replaced.
    assert len(answer(scheduler, step).queue_s) == 0
    scheduler.reset_for_epoch(1)
    told = []
    while scheduler.has_unfinished:
        step = schedule(scheduler)
        scheduler.counters.step_began(9_000_000_000)
        told.append(answer(scheduler, step).queue_s.tolist())
    assert told == [[], [2.5], [], []]


def test_what_runs_and_waits_is_told_while_a_step_runs(make: Make) -> None:
    engine = make(1)
    may_answer = threading.Event()

    def answer_late(rank: object, step: object) -> None:
        assert_set(may_answer)
        engine.ranks[0].answer(step)  # type: ignore[arg-type]

    engine.ranks[0].on_step = answer_late
    client = engine.start().client()
    for request_id in range(9):
        client.add(request_id, prompt_len=4, max_tokens=30)
    client.send(GetStats())
    time.sleep(0.05)
    may_answer.set()
    client.wait(lambda: bool(client.stats))
    busy = next(s for s in [client.stats[-1], *(client.ask_stats() for _ in range(100))] if s.num_running == 8)
    assert busy.num_waiting == 1
    assert busy.oldest_waiting_s > 0
    assert busy.num_free_blocks < NUM_BLOCKS


def test_a_request_that_ends_while_steps_are_sent_ahead_is_no_longer_said_to_run(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted: list[int] = []
    monkeypatch.setattr(WorkerGroup, "note_requests", lambda group, num_running, *_: noted.append(num_running))
    engine = make(1)

    def answer_slowly(rank: Rank, step: StepInput) -> None:
        time.sleep(0.002)
        rank.answer(step)

    engine.ranks[0].on_step = answer_slowly
    client = engine.start().client()
    client.add(0, max_tokens=190)
    client.add(1, max_tokens=4)
    client.wait(lambda: len(client.reasons) == 2)
    assert 1 in noted[noted.index(2) :]


def test_a_group_that_starts_is_said_not_to_serve_and_the_counters_live_on(replaced: ReplacedEngine) -> None:
    keeper = replaced.keeper
    keeper.dies = lambda epoch, step: epoch == 0 and step.step == 4
    may_start = threading.Event()

    def start_late(epoch: int) -> bool:
        if epoch:
            assert_set(may_start)
        return True

    keeper.starts = start_late
    client = replaced.start().client()
    client.add(1, prompt_len=3, max_tokens=10)
    client.wait(lambda: len(keeper.started) == 2)
    starting = client.ask_stats()
    assert (starting.epoch, starting.is_serving) == (1, False)
    assert (starting.num_running, starting.num_waiting) == (0, 1)
    assert (starting.num_generated_tokens, starting.num_prompt_tokens) == (4, 3)
    may_start.set()
    client.wait(lambda: 1 in client.reasons)
    after = client.ask_stats()
    assert (after.epoch, after.is_serving) == (1, True)
    assert after.num_generated_tokens == 10
    assert after.num_prompt_tokens == 3, "a prompt is counted once, though it is computed again"
    assert after.num_steps == 10


def test_requests_that_wait_for_new_ranks_are_said_to_wait(
    replaced: ReplacedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted: list[tuple[int, int, int]] = []
    waits = threading.Event()

    def note(group: WorkerGroup, num_running: int, num_waiting: int, oldest_waiting_ns: int) -> None:
        noted.append((group.epoch, num_running, num_waiting))
        if noted[-1] == (1, 0, 1):
            waits.set()

    monkeypatch.setattr(WorkerGroup, "note_requests", note)
    replaced.keeper.dies = lambda epoch, step: epoch == 0 and step.step == 4
    replaced.keeper.starts = lambda epoch: epoch == 0 or waits.wait(DEADLINE_S)
    client = replaced.start().client()
    client.add(1, prompt_len=3, max_tokens=10)
    client.wait(lambda: 1 in client.reasons)
    assert (1, 0, 1) in noted


def test_a_prompt_that_is_preempted_is_counted_once() -> None:
    scheduler = make_scheduler(num_blocks=5)
    add(scheduler, "a", 4, max_tokens=20)
    add(scheduler, "b", 4, max_tokens=20)
    while scheduler.has_unfinished:
        run(scheduler)
    stats = describe(scheduler, is_serving=True, now_ns=0)
    assert stats.num_preemptions > 0
    assert stats.num_prompt_tokens == 8


def test_the_oldest_that_waits_is_as_old_as_its_arrival_says() -> None:
    scheduler = make_scheduler()
    assert describe(scheduler, True, 5).oldest_waiting_s == 0
    request = AddRequest(0, np.array([5], np.int32), SamplingParams())
    scheduler.add("a", request, arrived_ns=2_000_000_000)
    assert describe(scheduler, True, 3_500_000_000).oldest_waiting_s == 1.5
