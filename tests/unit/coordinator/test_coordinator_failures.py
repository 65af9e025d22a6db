"""What becomes of the loop when a rank fails, is gone or is late."""

from __future__ import annotations

import threading
import time

import pytest

from tests.unit.coordinator.engine_of_threads import (
    Make,
    Rank,
    assert_set,
    vanish,
)
from tprt.messages import (
    Grammar,
    Hello,
    StepInput,
)

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_fails_in_a_step_is_named_with_its_phase_error_and_traceback(
    make: Make, failing: int
) -> None:
    engine = make()
    engine.ranks[failing].on_step = lambda rank, step: rank.fail("ValueError: 3 is odd")
    if failing == 1:
        engine.ranks[0].on_step = lambda rank, step: None
    engine.start()
    client = engine.client()
    client.add(1)
    lines = engine.death().splitlines()
    assert lines[0] == f"Traceback of rank {failing}"
    assert lines[-1] == f"rank {failing} failed in phase decode: ValueError: 3 is odd"
    client.wait(lambda: client.engine_failure != "")
    assert "3 is odd" in client.engine_failure


def test_the_cause_is_reported_and_not_its_consequence_that_came_first(make: Make) -> None:
    engine = make(3)
    heard = threading.Event()

    def fail_second(rank: Rank, step: StepInput) -> None:
        assert_set(heard)
        rank.fail("MemoryError: too large")

    def fail_first(rank: Rank, step: StepInput) -> None:
        try:
            rank.fail("PeerLostError: rank 1 is gone")
        finally:
            heard.set()

    engine.ranks[0].on_step = fail_first
    engine.ranks[1].on_step = fail_second
    engine.ranks[2].on_step = lambda rank, step: None
    engine.start().client().add(1)
    assert engine.death().endswith("rank 1 failed in phase decode: MemoryError: too large")


def test_a_rank_that_goes_without_a_word_in_a_step_is_named(make: Make) -> None:
    engine = make(3)
    engine.ranks[0].on_step = lambda rank, step: None
    engine.ranks[2].on_step = vanish
    engine.start().client().add(1)
    assert "rank 2 is gone" in engine.death()


def test_a_rank_that_goes_while_the_engine_is_idle_is_noticed_at_once(make: Make) -> None:
    engine = make().start()
    client = engine.client()
    client.send(Hello())
    client.wait(lambda: bool(client.ready))
    started_s = time.monotonic()
    engine.ranks[1].leave.set()
    assert "rank 1 is gone" in engine.death()
    assert time.monotonic() - started_s < 1


def test_a_rank_that_fails_while_it_loads_is_named_with_its_phase(make: Make) -> None:
    engine = make()
    engine.ranks[1].on_start = lambda rank: rank.fail("OSError: no such file", "load")
    engine.start()
    assert engine.death().endswith("rank 1 failed in phase load: OSError: no such file")


def test_ranks_that_do_not_connect_in_time_are_named_with_the_setting(make: Make) -> None:
    engine = make(3, startup_timeout_s=0.2)
    engine.ranks[0].thread.start()
    engine.thread.start()
    message = engine.death()
    assert "[1, 2]" in message
    assert "startup_timeout_s" in message


def test_ranks_that_do_not_load_in_time_are_named_with_the_setting(make: Make) -> None:
    engine = make(3, startup_timeout_s=0.4)
    stop = threading.Event()
    engine.ranks[2].on_start = lambda _: assert_set(stop)
    engine.start()
    message = engine.death()
    stop.set()
    assert "[2]" in message
    assert "startup_timeout_s" in message


def test_a_step_that_is_not_answered_in_time_ends_the_engine_with_the_setting(make: Make) -> None:
    engine = make(step_timeout_s=0.3)
    engine.ranks[0].on_step = lambda rank, step: None
    engine.start().client().add(1)
    message = engine.death()
    assert "step 0" in message
    assert "step_timeout_s" in message


def test_an_answer_of_an_older_epoch_is_dropped(make: Make) -> None:
    engine = make(1)
    engine.ranks[0].on_step = lambda rank, step: (rank.answer(step, epoch=-1), rank.answer(step))[1]
    client = engine.start().client()
    client.add(1, max_tokens=3)
    client.wait(lambda: 1 in client.reasons)
    assert client.tokens[1] == [3, 4, 5]


def test_an_answer_to_another_step_ends_the_engine(make: Make) -> None:
    engine = make(1)
    engine.ranks[0].on_step = lambda rank, step: rank.answer(step, step_number=step.step + 1)
    engine.start().client().add(1)
    assert "expected (0, 0, 1)" in engine.death()


def test_a_request_that_leaves_its_grammar_fails_alone_and_with_the_reason(make: Make) -> None:
    client = make().start().client()
    # Token n of these ranks is the length, whatever is allowed: c, d, e, ...
    client.add(1, prompt_len=3, max_tokens=6, grammar=Grammar("regex", "cdx"))
    client.add(2, prompt_len=3, max_tokens=6, grammar=Grammar("regex", "[c-z]*"))
    client.add(3, prompt_len=3, max_tokens=6)
    client.add(4, prompt_len=3, max_tokens=6, grammar=Grammar("regex", "("))
    client.wait(lambda: len(client.reasons) + len(client.failed) == 4)
    assert client.failed.keys() == {1, 4}
    assert client.failed[1].startswith("the output cannot go on in its grammar: ")
    assert "unclosed group" in client.failed[4]
    assert client.tokens[2] == client.tokens[3] == [3, 4, 5, 6, 7, 8]
