"""An engine for tests of the coordinator: its ranks are threads that run no model."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.support.tokenizers import EOS as EOS_TEXT
from tests.support.tokenizers import letters_tokenizer
from tprt.config import SupervisionConfig
from tprt.coordinator.coordinator import Coordinator
from tprt.coordinator.grammar import GrammarCompiler
from tprt.coordinator.limits import SchedulerLimits
from tprt.coordinator.scheduler import Scheduler
from tprt.coordinator.worker_group import WorkerGroup
from tprt.errors import EngineDeadError, TransportTimeoutError
from tprt.messages import (
    AddRequest,
    EngineFailed,
    EngineReady,
    EngineStats,
    FinishReason,
    GetStats,
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


def assert_set(event: threading.Event) -> None:
    assert event.wait(DEADLINE_S)


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
        self.engine_failure = ""
        self.ready: list[EngineReady] = []
        self.stats: list[EngineStats] = []
        self.outputs: list[RequestOutput] = []

    def send(self, message: Message) -> None:
        self.lane.send(encode(message))

    def add(self, request_id: int, prompt_len: int = 3, **sampling: object) -> None:
        params = SamplingParams(**sampling)  # type: ignore[arg-type]
        self.send(AddRequest(request_id, np.full(prompt_len, 5, np.int32), params))

    def ask_stats(self) -> EngineStats:
        """Ask how the engine is doing and return the answer."""
        num_before = len(self.stats)
        self.send(GetStats())
        self.wait(lambda: len(self.stats) > num_before)
        return self.stats[-1]

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
        elif isinstance(message, EngineStats):
            self.stats.append(message)
        elif isinstance(message, RequestFailed):
            self.failed[message.request_id] = message.message
        elif isinstance(message, EngineFailed):
            self.engine_failure = message.message
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
        supervision = SupervisionConfig(**deadlines)
        group = WorkerGroup(self._hub, world_size, 0, supervision)
        self.coordinator = Coordinator(self._server, group, self._make_scheduler, supervision)
        self.ranks = [Rank(connect, rank, NUM_BLOCKS + rank) for rank in range(world_size)]
        self.clients: list[Client] = []
        self.scheduler: Scheduler
        self.error: EngineDeadError | None = None
        self.thread = threading.Thread(target=self._run, name="coordinator")

    def _make_scheduler(self, num_blocks: int) -> Scheduler:
        values = {name: getattr(self._limits, name) for name in self._limits.__slots__}
        limits = SchedulerLimits(**values | {"num_blocks": num_blocks})
        grammars = GrammarCompiler(lambda: letters_tokenizer(["a", "b", EOS_TEXT, *"cdefghi"]), (EOS,), 1000)
        self.scheduler = Scheduler(limits, (EOS,), 1000, grammars=grammars)
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


def vanish(*_: object) -> None:
    raise Vanish
