"""When ranks fail, others take their place, and clients see a pause and then the rest."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.unit.coordinator.engine_of_threads import DEADLINE_S
from tests.unit.coordinator.replaced_engine import ReplacedEngine
from tprt.coordinator.cause import CauseKind
from tprt.messages import FinishReason, GroupEnded, Hello, Shutdown, StepInput

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")

Make = Callable[..., ReplacedEngine]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    engines: list[ReplacedEngine] = []
    threads = threading.active_count()

    def make_engine(**supervision: float) -> ReplacedEngine:
        engines.append(ReplacedEngine(tmp_path, **supervision))
        return engines[-1]

    yield make_engine
    for engine in engines:
        engine.stop()
    assert threading.active_count() == threads


def killed(epoch: int, is_input_error: bool = False, is_from_outside: bool = False) -> GroupEnded:
    text = f"Traceback\nrank 1 of epoch {epoch} was killed"
    return GroupEnded(epoch, text, CauseKind.SILENT_DEATH, is_input_error, is_from_outside)


def has_prompt_of(step: StepInput, length: int) -> bool:
    """Whether a prompt of that many tokens ends in `step`; its length stands for a request."""
    return bool(np.any(step.context_lens[step.num_decodes :] == length))


def test_whoever_has_said_hello_hears_that_ranks_have_failed_and_that_others_are_ready(make: Make) -> None:
    engine = make()
    engine.keeper.dies = lambda epoch, step: epoch == 0 and step.step == 4
    greeted, stranger = engine.start().client(), engine.client()
    greeted.send(Hello())
    greeted.wait(lambda: bool(greeted.ready))
    stranger.add(1, max_tokens=10)
    stranger.wait(lambda: 1 in stranger.reasons)
    greeted.wait(lambda: len(greeted.ready) == 2)
    assert [ready.epoch for ready in greeted.ready] == [0, 1]
    assert [(stats.epoch, stats.is_serving) for stats in greeted.stats] == [(0, False)]
    assert not stranger.ready
    assert not stranger.stats


def test_a_request_goes_on_in_the_next_epoch_from_its_last_token(make: Make) -> None:
    engine = make()
    engine.keeper.dies = lambda epoch, step: epoch == 0 and step.step == 4
    client = engine.start().client()
    client.add(1, max_tokens=10)
    client.wait(lambda: 1 in client.reasons)
    assert client.tokens[1] == list(range(3, 13))
    assert client.reasons[1] == FinishReason.LENGTH
    assert engine.keeper.started == [0, 1]
    first = next(step for epoch, step in engine.keeper.steps if epoch == 1)
    assert first.step == 0
    assert first.context_lens.tolist() == first.query_lens.tolist() == [7], "prompt and generated tokens"
    assert client.engine_failure == ""


def test_a_step_whose_answer_came_is_not_run_again_and_one_whose_answer_did_not_is(make: Make) -> None:
    engine = make()
    engine.keeper.dies = lambda epoch, step: epoch < 3 and step.step == 2
    client = engine.start().client()
    client.add(1, max_tokens=12)
    client.wait(lambda: 1 in client.reasons)
    assert client.tokens[1] == list(range(3, 15))


def test_the_death_of_ranks_that_do_nothing_is_learnt_from_the_keeper(make: Make) -> None:
    engine = make().start()
    client = engine.client()
    client.add(1, max_tokens=3)
    client.wait(lambda: 1 in client.reasons)
    engine.keeper.ended[0] = killed(0)
    engine.keeper.tell(killed(0))
    client.wait(lambda: engine.keeper.started == [0, 1])
    client.add(2, max_tokens=3)
    client.wait(lambda: 2 in client.reasons)
    assert client.tokens[2] == [3, 4, 5]


def test_requests_and_greetings_that_come_meanwhile_are_taken(make: Make) -> None:
    engine = make()
    held = threading.Event()
    engine.keeper.dies = lambda epoch, step: epoch == 0

    def starts(epoch: int) -> bool:
        return epoch == 0 or held.wait(DEADLINE_S)

    engine.keeper.starts = starts
    client = engine.start().client()
    client.add(1, max_tokens=3)
    client.wait(lambda: engine.keeper.started == [0, 1])
    client.send(Hello())
    client.add(2, max_tokens=3)
    client.add(3, prompt_len=1000)
    client.wait(lambda: bool(client.ready) and 3 in client.failed)
    assert client.tokens == {}
    held.set()
    client.wait(lambda: {1, 2} <= client.reasons.keys())
    assert client.tokens == {1: [3, 4, 5], 2: [3, 4, 5]}


def test_a_shutdown_that_comes_meanwhile_ends_the_engine(make: Make) -> None:
    engine = make()
    engine.keeper.dies = lambda epoch, step: True
    engine.keeper.starts = lambda epoch: epoch == 0
    client = engine.start().client()
    client.add(1)
    client.wait(lambda: engine.keeper.started == [0, 1])
    client.send(Shutdown("enough"))
    client.wait(lambda: client.reasons.get(1) == FinishReason.ABORT)
    engine.thread.join(DEADLINE_S)
    assert not engine.thread.is_alive()
    assert engine.error is None


def test_ranks_that_fail_while_they_start_are_replaced_in_turn(make: Make) -> None:
    engine = make(startup_timeout_s=0.5)
    engine.keeper.dies = lambda epoch, step: epoch == 0
    engine.keeper.starts = lambda epoch: epoch != 1
    client = engine.start().client()
    client.add(1, max_tokens=3)
    client.wait(lambda: 1 in client.reasons)
    assert client.tokens[1] == [3, 4, 5]
    assert engine.keeper.started == [0, 1, 2]


def test_ranks_that_fail_before_all_were_ready_for_the_first_time_are_not_replaced(make: Make) -> None:
    engine = make(startup_timeout_s=0.3)
    engine.keeper.starts = lambda epoch: False
    assert "not ready after" in engine.start().death()
    assert engine.keeper.started == [0]


def test_after_too_many_restarts_clients_are_told_the_last_cause(make: Make) -> None:
    engine = make(max_restarts=1)
    engine.keeper.dies = lambda epoch, step: True
    engine.keeper.ended = {epoch: killed(epoch) for epoch in range(2)}
    client = engine.start().client()
    client.add(1)
    client.add(2)
    message = engine.death()
    assert (
        "rank 1 of epoch 1 was killed; the ranks are not started again: that has been done 1 times" in message
    )
    assert "supervision.max_restarts" in message
    client.wait(lambda: client.engine_failure != "")
    assert client.engine_failure == message
    assert engine.keeper.started == [0, 1]


def test_without_restarts_the_cause_is_told_as_it_is(make: Make) -> None:
    engine = make(max_restarts=0)
    engine.keeper.dies = lambda epoch, step: True
    engine.keeper.ended[0] = killed(0)
    engine.start().client().add(1)
    assert engine.death() == killed(0).cause
    assert engine.keeper.started == [0]


def test_what_only_the_user_can_put_right_is_not_tried_again(make: Make) -> None:
    engine = make()
    engine.keeper.dies = lambda epoch, step: True
    engine.keeper.ended[0] = killed(0, is_input_error=True)
    engine.start().client().add(1)
    assert engine.death() == killed(0).cause


@pytest.mark.parametrize(("is_from_outside", "num_deaths"), [(False, 3), (True, 4)])
def test_a_request_that_kills_is_failed_and_the_others_are_served(
    make: Make, is_from_outside: bool, num_deaths: int
) -> None:
    engine = make(max_restarts=2)
    engine.keeper.dies = lambda epoch, step: has_prompt_of(step, 9)
    engine.keeper.ended = {epoch: killed(epoch, is_from_outside=is_from_outside) for epoch in range(10)}
    client = engine.start().client()
    for request_id, prompt_len in enumerate([3, 9, 4]):
        client.add(request_id, prompt_len, max_tokens=3)
    client.wait(lambda: 1 in client.failed and {0, 2} <= client.reasons.keys())
    assert client.tokens == {0: [3, 4, 5], 2: [4, 5, 6]}
    assert f"died {num_deaths} times in a step that contained this request" in client.failed[1]
    assert f"rank 1 of epoch {num_deaths - 1} was killed" in client.failed[1]
    assert engine.keeper.started == list(range(num_deaths + 1))
    # The restarts have been given back: another one that kills is found as well.
    client.add(3, 9, max_tokens=3)
    client.wait(lambda: 3 in client.failed)


def test_a_request_that_kills_in_its_decodes_alone_is_found(make: Make) -> None:
    engine = make(max_restarts=2)

    def dies(epoch: int, step: StepInput) -> bool:
        lens = step.context_lens[: step.num_decodes]
        return bool(np.any((lens > 30) & (lens < 60)))

    engine.keeper.dies = dies
    client = engine.start().client()
    client.add(1, 30, max_tokens=20)
    client.add(2, 3, max_tokens=20)
    client.wait(lambda: 1 in client.failed and 2 in client.reasons)
    assert client.tokens[2] == list(range(3, 23))
    assert client.tokens[1] == list(range(30, 30 + len(client.tokens[1])))


def test_a_group_that_dies_of_whatever_it_runs_ends_the_engine(make: Make) -> None:
    engine = make(max_restarts=2)
    engine.keeper.dies = lambda epoch, step: True
    client = engine.start().client()
    for request_id in range(8):
        client.add(request_id)
    engine.death()
    # Two deaths in company and two of suspects that were alone were made good, and what a guilty request
    # had cost before: that depends on how many had come when the first step died.
    assert 4 <= engine.keeper.started[-1] <= 6
    assert len(client.failed) <= 3


def test_requests_that_do_not_fit_the_blocks_of_the_new_ranks_are_refused_and_others_go_on(make: Make) -> None:
    engine = make()
    engine.keeper.num_blocks[1] = 5
    engine.keeper.dies = lambda epoch, step: epoch == 0 and step.step == 2
    client = engine.start().client()
    client.add(1, 3, max_tokens=50)
    client.add(2, 40, max_tokens=50)
    client.wait(lambda: 2 in client.failed and 1 in client.reasons)
    assert "5 KV blocks" in client.failed[2]
    assert client.tokens[1] == list(range(3, 21)), "the sequence ends where the blocks do"
