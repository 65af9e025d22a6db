"""The client keeps its completions up to date with what the coordinator sends."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import cast

import numpy as np
import pytest

from tprt.errors import EngineDeadError, InvalidRequestError
from tprt.messages import (
    AbortRequest,
    AddRequest,
    EngineFailed,
    EngineReady,
    EngineStats,
    FinishReason,
    GetStats,
    Hello,
    Message,
    PromptLogprobs,
    RequestFailed,
    RequestOutput,
    SamplingParams,
    Shutdown,
)
from tprt.server.engine_client import _MAX_TO_COME, EngineClient
from tprt.server.tokenizer import Tokenizer
from tprt.transport.channel import Buffer
from tprt.transport.codec import decode, encode


class Lane:
    """A lane with the coordinator's side in plain sight."""

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self.coming: deque[bytes] = deque()
        self.closed = False

    def send(self, parts: Sequence[Buffer]) -> None:
        self.sent.append(decode(b"".join(parts)))

    def receive(self, timeout_s: float) -> bytes | None:
        return self.coming.popleft() if self.coming else None

    def close(self, flush: bool = True) -> None:
        self.closed = True

    def bring(self, message: Message) -> None:
        self.coming.append(b"".join(encode(message)))


def output(*rows: tuple[int, int, FinishReason], **columns: object) -> RequestOutput:
    ids, tokens, reasons = zip(*rows, strict=True)
    return RequestOutput(
        request_ids=np.array(ids, np.int64),
        token_ids=np.array(tokens, np.int32),
        finish_reasons=np.array(reasons, np.uint8),
        num_cached_tokens=np.full(len(ids), 16, np.int32),
        **columns,  # type: ignore[arg-type]
    )


@pytest.fixture
def lane() -> Lane:
    return Lane()


@pytest.fixture
def client(lane: Lane) -> EngineClient:
    return EngineClient(lane, tokenizer=None)


GREEDY = SamplingParams(temperature=0.0)
NONE, STOP, LENGTH = FinishReason.NONE, FinishReason.STOP, FinishReason.LENGTH


def test_tokens_go_to_the_completion_they_belong_to(client: EngineClient, lane: Lane) -> None:
    (first, one), (second, two) = client.add([1, 2], GREEDY), client.add([3], GREEDY)
    lane.bring(output((second, 9, NONE), (first, 7, NONE)))
    lane.bring(output((first, 8, STOP), (second, 5, LENGTH)))
    client.poll(0.0)
    assert (one.token_ids, one.finish_reason, one.num_cached_tokens) == ([7, 8], "stop", 16)
    assert (two.token_ids, two.finish_reason) == ([9, 5], "length")
    assert client.num_running == 0
    added = [message for message in lane.sent if isinstance(message, AddRequest)]
    assert [message.prompt_token_ids.tolist() for message in added] == [[1, 2], [3]]


def test_a_completion_knows_how_long_it_waited_once_it_was_told(client: EngineClient, lane: Lane) -> None:
    (first, one), (second, two) = client.add([1], GREEDY), client.add([2], GREEDY)
    lane.bring(output((first, 7, NONE), (second, 8, NONE), queue_s=np.array([-1, 0.5], np.float32)))
    client.poll(0.0)
    assert (one.queue_s, two.queue_s) == (None, 0.5)
    lane.bring(output((first, 7, STOP), (second, 8, NONE), queue_s=np.array([0.25, -1], np.float32)))
    lane.bring(output((second, 8, LENGTH)))
    client.poll(0.0)
    assert (one.queue_s, two.queue_s) == (0.25, 0.5)


def test_logprobs_are_cut_to_what_each_request_asked_for(client: EngineClient, lane: Lane) -> None:
    wants_one, one = client.add([1], SamplingParams(logprobs=1))
    wants_none, none = client.add([1], GREEDY)
    lane.bring(
        output(
            (wants_none, 4, NONE),
            (wants_one, 5, NONE),
            logprobs=np.array([-1, -2], np.float32),
            top_token_ids=np.array([4, 6, 5, 7], np.int32),
            top_logprobs=np.array([-1, -3, -2, -4], np.float32),
            num_top=2,
        )
    )
    client.poll(0.0)
    assert none.logprobs == []
    assert [(entry.token_id, entry.logprob, entry.top) for entry in one.logprobs] == [(5, -2.0, ((5, -2.0),))]


def test_what_comes_of_a_prompt_in_parts_is_put_together(client: EngineClient, lane: Lane) -> None:
    wants_one, one = client.add([1, 2, 3, 4], SamplingParams(prompt_logprobs=1))
    wants_none, none = client.add([5, 6], SamplingParams(prompt_logprobs=0))
    for request_id, logprobs, best, values in (
        (wants_one, [-1, -2], [7, 3], [-0.5, -2]),
        (wants_none, [-4], [], []),
        (wants_one, [-3], [8], [-0.25]),
        (99, [-9], [9], [-9]),
    ):
        arrays = np.array(logprobs, np.float32), np.array(best, np.int32), np.array(values, np.float32)
        lane.bring(PromptLogprobs(request_id, *arrays, num_top=len(best) // len(logprobs)))
    client.poll(0.0)
    assert [(entry.token_id, entry.logprob, entry.top) for entry in one.prompt_logprobs] == [
        (2, -1.0, ((7, -0.5),)),
        (3, -2.0, ((3, -2.0),)),
        (4, -3.0, ((8, -0.25),)),
    ]
    assert [(entry.token_id, entry.logprob, entry.top) for entry in none.prompt_logprobs] == [(6, -4.0, ())]


def test_a_refused_request_ends_with_the_reason_and_leaves_the_others(client: EngineClient, lane: Lane) -> None:
    (bad, refused), (_, running) = client.add([1], GREEDY), client.add([2], GREEDY)
    lane.bring(RequestFailed(bad, "the prompt is too long"))
    client.poll(0.0)
    assert refused.finished
    assert refused.error == "the prompt is too long"
    assert not running.finished


def test_an_aborted_request_ends_at_once_and_late_tokens_are_dropped(client: EngineClient, lane: Lane) -> None:
    request_id, completion = client.add([1], GREEDY)
    client.abort(request_id)
    lane.bring(output((request_id, 7, NONE)))
    client.poll(0.0)
    client.abort(request_id)
    assert completion.finish_reason == "abort"
    assert completion.token_ids == []
    assert [type(message) for message in lane.sent] == [AddRequest, AbortRequest]


def test_the_greeting_is_returned_and_the_goodbye_is_sent(client: EngineClient, lane: Lane) -> None:
    client.hello()
    assert client.poll(0.0) is None
    ready = EngineReady(epoch=0, world_size=2, num_blocks=3, block_size=4, max_model_len=5)
    lane.bring(ready)
    assert client.poll(0.0) == ready
    client.shut_down("done")
    client.close()
    assert lane.sent == [Hello(), Shutdown("done")]
    assert lane.closed


def test_a_dead_engine_and_a_message_that_is_not_for_clients_are_errors(
    client: EngineClient, lane: Lane
) -> None:
    lane.bring(EngineFailed("rank 1 is gone"))
    with pytest.raises(EngineDeadError, match="rank 1 is gone"):
        client.poll(0.0)
    lane.bring(Hello())
    with pytest.raises(EngineDeadError, match="Hello, which no client expects"):
        client.poll(0.0)


def test_what_can_be_seen_to_be_wrong_is_refused_before_it_is_sent(client: EngineClient, lane: Lane) -> None:
    with pytest.raises(InvalidRequestError, match="stop strings need a tokenizer"):
        client.add([1], SamplingParams(stop=("x",)))
    for ids in ([-1], [2**31], [2**70], [1.7, 2.2], [True], [None]):
        with pytest.raises(InvalidRequestError, match="must be whole numbers from 0"):
            client.add(ids, GREEDY)  # type: ignore[arg-type]
    assert lane.sent == []
    assert client.num_running == 0


def test_whoever_listens_hears_of_each_token_end_and_refusal_once_the_completion_has_it(lane: Lane) -> None:
    heard: list[tuple[int, int, str | None]] = []

    def on_news(request_id: int) -> None:
        completion = completions[request_id]
        heard.append((request_id, len(completion.token_ids), completion.finish_reason or completion.error))

    client = EngineClient(lane, None, on_news)
    completions = [client.add([token], GREEDY)[1] for token in range(3)]
    lane.bring(output((0, 7, NONE), (1, 8, LENGTH)))
    lane.bring(RequestFailed(2, "no"))
    lane.bring(output((0, -1, FinishReason.ABORT), (1, 9, NONE), (9, 9, NONE)))
    client.poll(0.0)
    assert heard == [(0, 1, None), (1, 1, "length"), (2, 0, "no"), (0, 1, "abort")]


def test_stats_are_asked_for_and_kept(client: EngineClient, lane: Lane) -> None:
    assert client.stats is None
    client.ask_for_stats()
    assert lane.sent == [GetStats()]
    stats = EngineStats(1, True, 2, 3, 0.5, 6, 10, 0, 100, 50, 70, 9, 0.1)
    lane.bring(stats)
    assert client.poll(0.0) is None
    assert client.stats == stats


class Numbers:
    """A tokenizer whose tokens are their numbers, as a stream has them."""

    def decode_stream(self) -> Numbers:
        return self

    def step(self, token_id: int) -> str:
        return str(token_id)

    def finish(self) -> str:
        return ""


def test_the_token_that_ends_an_output_has_no_text_whatever_its_name(lane: Lane) -> None:
    client = EngineClient(lane, cast(Tokenizer, Numbers()))
    completions = [client.add([1], GREEDY)[1] for _ in range(2)]
    lane.bring(output((0, 7, NONE), (1, 7, NONE)))
    lane.bring(output((0, 2, STOP), (1, 2, LENGTH)))
    client.poll(0.0)
    assert [completion.text for completion in completions] == ["7", "72"]


def recomputed(client: EngineClient) -> int:
    """Return the load of the requests that have not ended, counted anew."""
    running = client._running.values()
    return sum(
        len(one.prompt_token_ids)
        + len(one.token_ids)
        + min(one.sampling.max_tokens - len(one.token_ids), _MAX_TO_COME)
        for one in running
    )


def test_the_load_is_that_of_the_requests_that_run_whatever_happens_to_them(lane: Lane) -> None:
    client = EngineClient(lane, cast(Tokenizer, Numbers()))
    params = [SamplingParams(max_tokens=count) for count in (4, _MAX_TO_COME + 2, 1000)]
    params.append(SamplingParams(max_tokens=50, stop=("8",)))
    ids = [client.add([1, 2, 3], one)[0] for one in params]
    expected = 4 * 3 + 4 + 2 * _MAX_TO_COME + 50
    assert client.load == recomputed(client) == expected

    def bring(*rows: tuple[int, int, FinishReason]) -> None:
        lane.bring(output(*rows))
        client.poll(0.0)
        assert client.load == recomputed(client)

    bring(*((request_id, 7, NONE) for request_id in ids))
    # Of the two that may have more than counts another token is expected for the one that has come.
    assert client.load == expected + 2
    for _ in range(4):
        bring((ids[1], 7, NONE), (ids[2], 7, NONE))
    assert client.load == expected + 2 + 1 + 4
    bring((ids[0], 7, LENGTH), (ids[3], 8, NONE), (99, 7, NONE))
    assert client.num_running == 2
    client.abort(ids[1])
    client.abort(ids[1])
    assert client.load == recomputed(client) == 3 + 5 + _MAX_TO_COME
    lane.bring(RequestFailed(ids[2], "no"))
    client.poll(0.0)
    assert (client.load, client.num_running) == (0, 0)


def test_the_load_moves_with_requests_that_are_handed_over(client: EngineClient, lane: Lane) -> None:
    other = EngineClient(Lane(), tokenizer=None)
    request_id, _ = client.add([1, 2], SamplingParams(max_tokens=10))
    client.add([3], SamplingParams(max_tokens=1000))
    lane.bring(output((request_id, 7, NONE)))
    client.poll(0.0)
    before = client.load
    for moved, completion in client.hand_over().items():
        other.take_over(moved, completion)
    assert (client.load, other.load) == (0, before)
    assert other.load == recomputed(other)
    with pytest.raises(InvalidRequestError):
        other.add([-1], GREEDY)
    assert other.load == before
