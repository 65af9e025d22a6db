"""Requests are spread over replicas, and the loss of one harms none of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import pytest

from tests.unit.server.async_engines import READY as SMALL
from tests.unit.server.async_engines import EdgeLane, output, stats
from tprt.errors import EngineDeadError, InvalidRequestError
from tprt.messages import AbortRequest, AddRequest, EngineFailed, FinishReason, Hello, SamplingParams, Shutdown
from tprt.server.no_lane import NoLane
from tprt.server.replica_router import ReplicaRouter, ReplicaState
from tprt.server.routed_client import RoutedClient

NONE, LENGTH = FinishReason.NONE, FinishReason.LENGTH
GREEDY = SamplingParams(temperature=0.0)
SHARED = list(range(100, 180))
READY = replace(SMALL, num_blocks=1000)


class Replicas:
    """A client of two replicas that serve, and their lanes."""

    def __init__(self) -> None:
        self.lanes = [EdgeLane(), EdgeLane()]
        self.news: list[int] = []
        self.client = RoutedClient(self.lanes, None, ReplicaRouter(2, 16, True), self.news.append)
        for lane in self.lanes:
            lane.bring(READY)
        assert set(self.client.poll(0.0)) == {0, 1}

    def requests(self, replica: int) -> list[AddRequest]:
        return self.lanes[replica].sent_of(AddRequest)  # type: ignore[return-value]

    def add(self, prompt: list[int]) -> tuple[int, int]:
        """Send a request; return its id and where it went."""
        request_id, _ = self.client.add(prompt, GREEDY)
        return request_id, self.client.replica_of(request_id)


@pytest.fixture
def replicas() -> Iterator[Replicas]:
    with ExitStack() as cleanup:
        made = Replicas()
        cleanup.callback(made.client.close)
        yield made
    assert all(lane.closed for lane in made.lanes)


def test_new_prompts_are_spread_and_a_shared_prefix_stays_together(replicas: Replicas) -> None:
    assert Counter(replicas.add([n, *range(50)])[1] for n in range(6)) == {0: 3, 1: 3}
    _, home = replicas.add(SHARED)
    assert {replicas.add([*SHARED, n])[1] for n in range(3)} == {home}


def test_ids_are_those_of_one_client_and_news_reach_their_request(replicas: Replicas) -> None:
    first, second = replicas.client.add([1, 2], GREEDY), replicas.client.add([3, 4], GREEDY)
    assert first[0] != second[0]
    for number, (request_id, completion) in enumerate((first, second)):
        place = replicas.client.replica_of(request_id)
        replicas.lanes[place].bring(output((request_id, 40 + number, NONE)))
        replicas.client.poll(0.0)
        assert completion.token_ids == [40 + number]
    assert replicas.news == [first[0], second[0]]


def test_an_abort_reaches_the_replica_that_has_the_request(replicas: Replicas) -> None:
    request_id, place = replicas.add([1, 2])
    replicas.client.abort(request_id)
    assert replicas.lanes[place].sent_of(AbortRequest) == [AbortRequest(request_id)]
    assert replicas.lanes[1 - place].sent_of(AbortRequest) == []
    assert replicas.client.num_running == 0


def test_the_next_turn_of_a_conversation_goes_where_its_output_is(replicas: Replicas) -> None:
    request_id, completion = replicas.client.add([7], GREEDY)
    place = replicas.client.replica_of(request_id)
    for token in range(40):
        replicas.lanes[place].bring(output((request_id, token, NONE if token < 39 else LENGTH)))
    replicas.client.poll(0.0)
    # The other one has been idle for longer, and there is nothing else that tells them apart.
    turn = [*completion.prompt_token_ids, *completion.token_ids, 8]
    assert replicas.add(turn)[1] == place


def test_a_replica_that_is_replaced_gets_no_new_requests_and_keeps_its_own(replicas: Replicas) -> None:
    kept, place = replicas.add(SHARED)
    replicas.lanes[place].bring(stats(is_serving=False))
    replicas.client.poll(0.0)
    assert replicas.client.state(place) is ReplicaState.REPLACING
    assert {replicas.add([*SHARED, n])[1] for n in range(3)} == {1 - place}
    assert replicas.client.replica_of(kept) == place
    replicas.lanes[place].bring(READY)
    replicas.client.poll(0.0)
    assert replicas.client.state(place) is ReplicaState.SERVING
    # its own requests are computed again, so their prefix is there; the other one is busier
    assert replicas.add([*SHARED, 9])[1] == place


@pytest.mark.parametrize("says_why", [True, False])
def test_requests_of_a_lost_replica_go_on_at_another_from_their_tokens(
    replicas: Replicas, says_why: bool
) -> None:
    request_id, completion = replicas.client.add(SHARED, GREEDY)
    place = replicas.client.replica_of(request_id)
    replicas.lanes[place].bring(output((request_id, 40, NONE), (request_id, 41, NONE)))
    replicas.client.poll(0.0)
    if says_why:
        replicas.lanes[place].bring(EngineFailed("rank 0 was killed"))
    else:
        replicas.lanes[place].lose()
    replicas.client.poll(0.0)
    assert replicas.client.state(place) is ReplicaState.LOST
    (moved,) = replicas.requests(1 - place)
    assert moved.request_id == request_id
    assert (moved.prompt_token_ids.tolist(), moved.output_token_ids.tolist()) == (SHARED, [40, 41])
    replicas.lanes[1 - place].bring(output((request_id, 42, LENGTH)))
    replicas.client.poll(0.0)
    assert (completion.token_ids, completion.finish_reason) == ([40, 41, 42], "length")
    assert {replicas.add([n, 1])[1] for n in range(3)} == {1 - place}


def test_a_request_whose_second_replica_is_lost_as_well_fails() -> None:
    lanes = [EdgeLane(), EdgeLane(), EdgeLane()]
    news: list[int] = []
    client = RoutedClient(lanes, None, ReplicaRouter(3, 16, True), news.append)
    for lane in lanes:
        lane.bring(READY)
    client.poll(0.0)
    request_id, completion = client.add([1, 2, 3], GREEDY)
    for _ in range(2):
        assert not completion.finished
        lanes[client.replica_of(request_id)].lose()
        client.poll(0.0)
    assert completion.was_lost
    assert completion.error is not None
    assert "two replicas" in completion.error
    assert news == [request_id]
    assert client.num_running == 0
    client.close()


def test_the_loss_of_all_replicas_is_the_end(replicas: Replicas) -> None:
    replicas.client.add([1, 2], GREEDY)
    replicas.lanes[0].lose()
    replicas.client.poll(0.0)
    replicas.lanes[1].bring(EngineFailed("rank 0 was killed"))
    with pytest.raises(EngineDeadError, match="rank 0 was killed"):
        replicas.client.poll(0.0)
    with pytest.raises(EngineDeadError):
        replicas.client.poll(0.0)


def test_what_any_replica_says_ends_the_wait(replicas: Replicas) -> None:
    replicas.lanes[1].bring(READY)
    assert set(replicas.client.poll(60.0)) == {1}
    assert replicas.client.poll(0.01) == {}


def test_all_replicas_are_greeted_and_shut_down(replicas: Replicas) -> None:
    replicas.client.hello()
    replicas.client.shut_down("it is over")
    for lane in replicas.lanes:
        assert lane.sent == [Hello(), Shutdown("it is over")]


def test_tokens_that_cannot_be_are_refused_before_they_are_hashed(replicas: Replicas) -> None:
    with pytest.raises(InvalidRequestError, match="prompt token ids"):
        replicas.client.add([1, 2**40], GREEDY)
    assert replicas.client.num_running == 0


def test_a_replica_that_was_lost_before_its_client_started_is_left_out() -> None:
    lane = EdgeLane()
    client = RoutedClient([NoLane(), lane], None, ReplicaRouter(2, 16, True))
    client.hello()
    lane.bring(READY)
    assert set(client.poll(0.0)) == {1}
    assert client.state(0) is ReplicaState.LOST
    request_id, _ = client.add(SHARED, GREEDY)
    assert client.replica_of(request_id) == 1
    assert len(lane.sent_of(AddRequest)) == 1
    client.close()
