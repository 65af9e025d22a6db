"""The loop over both kinds of lanes; ranks are threads of this process, clients are in the test's own thread."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tprt.config import SupervisionConfig
from tprt.coordinator.coordinator import Coordinator
from tprt.coordinator.limits import SchedulerLimits
from tprt.coordinator.scheduler import Scheduler
from tprt.errors import EngineDeadError, TransportTimeoutError
from tprt.messages import (
    AbortRequest,
    AddRequest,
    EngineReady,
    FinishReason,
    Hello,
    Message,
    RequestFailed,
    RequestOutput,
    SamplingParams,
    Shutdown,
    StepInput,
    StepOutput,
    WorkerFailed,
    WorkerReady,
)
from tprt.transport.channel import WorkerHub, WorkerLink
from tprt.transport.codec import decode, encode
from tprt.transport.hub import ShmWorkerHub
from tprt.transport.inproc import make_inproc_group
from tprt.transport.link import ShmWorkerLink
from tprt.transport.zmq_socket import RequestClient, RequestServer

DEADLINE_S = 10.0
EOS = 2
NUM_BLOCKS = 50
Connect = Callable[[int], WorkerLink]


def make_lanes(kind: str, folder: Path, world_size: int) -> tuple[WorkerHub, Connect]:
    """Return a hub and what connects a rank to it."""
    if kind == "inproc":
        inproc_hub, links = make_inproc_group(world_size)
        return inproc_hub, lambda rank: links[rank]
    path = str(folder / "workers")
    hub = ShmWorkerHub.listen(path, epoch=0, world_size=world_size)
    return hub, lambda rank: ShmWorkerLink.connect(path, epoch=0, rank=rank, timeout_s=DEADLINE_S)


class Vanish(Exception):  # noqa: N818 - not an error
    """Raised by a rank's behaviour to end without a word."""


class Rank:
    """A rank that runs no model: token `n` of a sequence is its length."""

    def __init__(self, connect: Connect, rank: int, num_blocks: int) -> None:
        self.rank, self._connect, self._num_blocks = rank, connect, num_blocks
        self.on_start: Callable[[Rank], None] = lambda _: None
        self.on_step: Callable[[Rank, StepInput], None] = lambda rank, step: rank.answer(step)
        self.received: list[Message] = []
        self.leave = threading.Event()
        self.thread = threading.Thread(target=self._run, name=f"rank {rank}")

    def say(self, message: Message) -> None:
        """Send on the control lane."""
        self.link.send_control(b"".join(encode(message)), DEADLINE_S)

    def fail(self, error: str, phase: str = "decode") -> None:
        self.say(WorkerFailed(0, self.rank, phase, error, f"Traceback of rank {self.rank}\n"))
        raise Vanish

    def answer(self, step: StepInput, epoch: int = 0, step_number: int | None = None) -> None:
        if self.link.outputs is None:
            return
        sampled = step.samples != 0
        n = int(sampled.sum())
        output = StepOutput(
            epoch=epoch,
            step=step.step if step_number is None else step_number,
            token_ids=step.context_lens[sampled],
            logprobs=-step.context_lens[sampled].astype(np.float32),
            top_token_ids=np.repeat(step.context_lens[sampled], 2),
            top_logprobs=np.zeros(2 * n, np.float32),
            num_top=2,
        )
        self.link.outputs.send(encode(output), DEADLINE_S)

    def _run(self) -> None:
        self.link = self._connect(self.rank)
        try:
            self.on_start(self)
            self.say(WorkerReady(0, self.rank, self._num_blocks, 0, 0, 0.0))
            while not self.leave.is_set():
                self._take_one()
        except Vanish:
            pass
        finally:
            self.link.close()

    def _take_one(self) -> None:
        try:
            message = decode(self.link.steps.receive(0.05))
        except TransportTimeoutError:
            return
        self.received.append(message)
        if isinstance(message, Shutdown):
            self.leave.set()
        else:
            assert isinstance(message, StepInput)
            self.on_step(self, message)


class Client:
    """A client that keeps what it was told, by request."""

    def __init__(self, address: str) -> None:
        self.lane = RequestClient.connect(address)
        self.tokens: defaultdict[int, list[int]] = defaultdict(list)
        self.reasons: dict[int, FinishReason] = {}
        self.failed: dict[int, str] = {}
        self.ready: list[EngineReady] = []
        self.outputs: list[RequestOutput] = []

    def send(self, message: Message) -> None:
        self.lane.send(encode(message))

    def add(self, request_id: int, prompt_len: int = 3, **sampling: object) -> None:
        params = SamplingParams(**sampling)  # type: ignore[arg-type]
        self.send(AddRequest(request_id, np.full(prompt_len, 5, np.int32), params))

    def wait(self, done: Callable[[], bool]) -> None:
        """Take in messages until `done`."""
        deadline_s = time.monotonic() + DEADLINE_S
        while not done():
            assert time.monotonic() < deadline_s, "what was waited for did not come"
            if (payload := self.lane.receive(0.05)) is not None:
                self._take(decode(payload))

    def _take(self, message: Message) -> None:
        if isinstance(message, EngineReady):
            self.ready.append(message)
        elif isinstance(message, RequestFailed):
            self.failed[message.request_id] = message.message
        else:
            assert isinstance(message, RequestOutput)
            self.outputs.append(message)
            columns = (message.request_ids, message.token_ids, message.finish_reasons)
            for request_id, token_id, reason in zip(*(c.tolist() for c in columns), strict=True):
                assert request_id not in self.reasons, "news of a request after its end"
                if token_id >= 0:
                    self.tokens[request_id].append(token_id)
                if reason != FinishReason.NONE:
                    self.reasons[request_id] = FinishReason(reason)


class Engine:
    """A coordinator in a thread, with its ranks and clients."""

    def __init__(
        self, kind: str, folder: Path, world_size: int, limits: SchedulerLimits, **timeouts: float
    ) -> None:
        self._limits = limits
        self._server = RequestServer.bind(f"ipc://{folder}/requests")
        self._hub, connect = make_lanes(kind, folder, world_size)
        deadlines = {"startup_timeout_s": DEADLINE_S, "step_timeout_s": DEADLINE_S} | timeouts
        self.coordinator = Coordinator(
            self._server, self._hub, self._make_scheduler, world_size, SupervisionConfig(**deadlines)
        )
        self.ranks = [Rank(connect, rank, NUM_BLOCKS + rank) for rank in range(world_size)]
        self.clients: list[Client] = []
        self.scheduler: Scheduler
        self.error: EngineDeadError | None = None
        self.thread = threading.Thread(target=self._run, name="coordinator")

    def _make_scheduler(self, num_blocks: int) -> Scheduler:
        values = {name: getattr(self._limits, name) for name in self._limits.__slots__}
        self.scheduler = Scheduler(SchedulerLimits(**values | {"num_blocks": num_blocks}), (EOS,), 1000)
        return self.scheduler

    def _run(self) -> None:
        try:
            self.coordinator.run()
        except EngineDeadError as error:
            self.error = error

    def start(self) -> Engine:
        for rank in self.ranks:
            rank.thread.start()
        self.thread.start()
        return self

    def client(self) -> Client:
        self.clients.append(Client(self._server.address))
        return self.clients[-1]

    def death(self) -> str:
        """Wait for the end of the loop by an error and return its message."""
        self.thread.join(DEADLINE_S)
        assert self.error is not None, "the engine is not dead"
        return str(self.error)

    def stop(self) -> None:
        if self.thread.is_alive():
            client = self.client()
            client.send(Shutdown("the test is over"))
            self.thread.join(DEADLINE_S)
            assert self.error is None
        assert not self.thread.is_alive()
        for rank in self.ranks:
            rank.leave.set()
            if rank.thread.ident is not None:
                rank.thread.join(DEADLINE_S)
            assert not rank.thread.is_alive()
        for client in self.clients:
            client.lane.close()
        self._hub.close()
        self._server.close()


LIMITS = SchedulerLimits(8, 64, 200, 4, NUM_BLOCKS)
Make = Callable[..., Engine]


@pytest.fixture(params=["inproc", "shm"])
def make(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Make]:
    """Return a maker of engines; they are stopped at the end and leave no thread and no descriptor."""
    gc.collect()
    threads, descriptors = threading.active_count(), sorted(os.listdir("/proc/self/fd"))
    engines: list[Engine] = []

    def make_engine(world_size: int = 2, limits: SchedulerLimits = LIMITS, **timeouts: float) -> Engine:
        folder = tmp_path / str(len(engines))
        folder.mkdir()
        engines.append(Engine(request.param, folder, world_size, limits, **timeouts))
        return engines[-1]

    yield make_engine
    while engines:
        engines.pop().stop()
    # In-process lanes let go of their descriptors when the last end is collected.
    gc.collect()
    assert threading.active_count() == threads
    assert sorted(os.listdir("/proc/self/fd")) == descriptors


def test_a_hello_is_answered_once_all_ranks_are_ready_with_the_fewest_blocks_of_any_rank(make: Make) -> None:
    engine = make(3).start()
    client = engine.client()
    client.send(Hello())
    client.wait(lambda: bool(client.ready))
    assert client.ready == [EngineReady(0, 3, NUM_BLOCKS, 4, 200)]


def test_a_hello_before_the_ranks_are_ready_is_not_lost(make: Make) -> None:
    engine = make(1)
    may_load = threading.Event()
    engine.ranks[0].on_start = lambda _: assert_set(may_load)
    engine.start()
    client = engine.client()
    client.send(Hello())
    assert client.lane.receive(0.1) is None
    may_load.set()
    client.wait(lambda: bool(client.ready))


def assert_set(event: threading.Event) -> None:
    assert event.wait(DEADLINE_S)


def test_a_request_gets_every_token_once_in_order_and_its_end(make: Make) -> None:
    client = make().start().client()
    client.add(7, prompt_len=3, max_tokens=5)
    client.wait(lambda: 7 in client.reasons)
    assert client.tokens[7] == [3, 4, 5, 6, 7]
    assert client.reasons[7] == FinishReason.LENGTH


def test_all_ranks_receive_every_step(make: Make) -> None:
    engine = make(3).start()
    client = engine.client()
    client.add(7, prompt_len=3, max_tokens=5)
    client.wait(lambda: 7 in client.reasons)
    client.send(Shutdown("done"))
    for rank in engine.ranks:
        rank.thread.join(DEADLINE_S)
        assert [m.step for m in rank.received[:-1] if isinstance(m, StepInput)] == list(range(5))
        assert rank.received[-1] == Shutdown("done")


def test_each_client_hears_of_its_own_requests_only_though_the_ids_are_the_same(make: Make) -> None:
    engine = make().start()
    one, other = engine.client(), engine.client()
    for request_id in range(6):
        one.add(request_id, prompt_len=3 + request_id, max_tokens=4, logprobs=2)
        other.add(request_id, prompt_len=30 + request_id, max_tokens=4, logprobs=2)
    for client, shortest in ((one, 3), (other, 30)):
        client.wait(lambda client=client: len(client.reasons) == 6)  # type: ignore[misc]
        for request_id in range(6):
            first = shortest + request_id
            assert client.tokens[request_id] == list(range(first, first + 4))
        for output in client.outputs:
            assert output.logprobs.tolist() == (-output.token_ids).tolist()
            assert output.top_token_ids.tolist() == np.repeat(output.token_ids, 2).tolist()


def test_requests_that_come_one_by_one_after_idle_times_all_wake_the_loop(make: Make) -> None:
    client = make(1).start().client()
    for request_id in range(20):
        client.add(request_id, max_tokens=2)
        client.wait(lambda request_id=request_id: request_id in client.reasons)  # type: ignore[misc]
        time.sleep(0.002 * (request_id % 3))


def test_an_idle_engine_uses_no_cpu(make: Make) -> None:
    engine = make(1).start()
    client = engine.client()
    client.add(1, max_tokens=2)
    client.wait(lambda: 1 in client.reasons)
    before_s = time.process_time()
    time.sleep(0.4)
    assert time.process_time() - before_s < 0.1


def test_an_invalid_request_is_answered_with_the_reason_and_harms_no_other(make: Make) -> None:
    client = make().start().client()
    client.add(1, max_tokens=3)
    client.add(2, prompt_len=200)
    client.add(3, prompt_len=0)
    client.add(4, max_tokens=3)
    client.wait(lambda: len(client.reasons) == 2 and len(client.failed) == 2)
    assert "max_model_len 200" in client.failed[2]
    assert "empty" in client.failed[3]
    assert client.tokens[1] == client.tokens[4] == [3, 4, 5]


def test_garbage_and_messages_that_no_client_sends_are_dropped(make: Make) -> None:
    client = make().start().client()
    client.lane.send([b""])
    client.lane.send([b"\x00" * 100])
    client.send(WorkerReady(0, 0, 1, 1, 1, 1.0))
    whole = b"".join(encode(AddRequest(1, np.array([5], np.int32), SamplingParams())))
    client.lane.send([whole[:-3]])
    client.add(9, max_tokens=2)
    client.wait(lambda: 9 in client.reasons)
    assert not client.failed


def test_an_aborted_request_gets_no_further_token_and_its_blocks_are_free_again(make: Make) -> None:
    engine = make().start()
    client = engine.client()
    client.add(1, max_tokens=150)
    client.wait(lambda: len(client.tokens[1]) > 2)
    client.send(AbortRequest(1))
    client.send(AbortRequest(99))
    client.send(Hello())
    client.wait(lambda: bool(client.ready))
    heard = len(client.tokens[1])
    assert heard < 150
    client.add(2, max_tokens=3)
    client.wait(lambda: 2 in client.reasons)
    assert len(client.tokens[1]) == heard
    assert 1 not in client.reasons
    assert engine.scheduler.num_free_blocks == NUM_BLOCKS


def test_the_requests_of_a_client_that_is_gone_are_aborted_and_those_of_others_go_on(make: Make) -> None:
    engine = make(1).start()
    engine.ranks[0].on_step = lambda rank, step: (time.sleep(0.002), rank.answer(step))[1]
    gone, staying = engine.client(), engine.client()
    gone.add(1, max_tokens=190)
    gone.add(2, max_tokens=190)
    gone.wait(lambda: bool(gone.tokens))
    gone.lane.close()
    staying.add(1, max_tokens=150)
    staying.wait(lambda: 1 in staying.reasons)
    assert len(staying.tokens[1]) == 150
    assert not engine.scheduler.has_unfinished


def test_shutdown_ends_workers_and_loop_and_tells_clients_what_was_left_unfinished(make: Make) -> None:
    engine = make().start()
    client, other = engine.client(), engine.client()
    client.add(1, max_tokens=190)
    other.add(1, max_tokens=190)
    client.wait(lambda: bool(client.tokens))
    other.wait(lambda: bool(other.tokens))
    client.send(Shutdown("enough"))
    client.wait(lambda: 1 in client.reasons)
    other.wait(lambda: 1 in other.reasons)
    assert client.reasons[1] == other.reasons[1] == FinishReason.ABORT
    engine.thread.join(DEADLINE_S)
    assert engine.error is None
    for rank in engine.ranks:
        rank.thread.join(DEADLINE_S)
        assert rank.received[-1] == Shutdown("enough")


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
    client.wait(lambda: 1 in client.failed)
    assert "3 is odd" in client.failed[1]


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


def vanish(*_: object) -> None:
    raise Vanish


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


def test_blocks_that_hold_less_than_max_model_len_limit_what_clients_are_told(make: Make) -> None:
    limits = SchedulerLimits(8, 64, 1000, 4, NUM_BLOCKS)
    client = make(1, limits).start().client()
    client.send(Hello())
    client.wait(lambda: bool(client.ready))
    assert client.ready[0].max_model_len == NUM_BLOCKS * 4 + 1
