"""An engine whose ranks, threads that run no model, are replaced by a keeper of groups for tests."""

from __future__ import annotations

import contextlib
import os
import select
import threading
from collections import defaultdict, deque
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.unit.coordinator.engine_of_threads import DEADLINE_S, EOS, LIMITS, Client
from tprt.config import SupervisionConfig
from tprt.coordinator.cause import CauseKind
from tprt.coordinator.coordinator import Coordinator
from tprt.coordinator.limits import SchedulerLimits
from tprt.coordinator.scheduler import Scheduler
from tprt.coordinator.worker_group import WorkerGroup
from tprt.errors import EngineDeadError, PeerLostError, TransportTimeoutError
from tprt.messages import GroupEnded, Shutdown, StepInput, StepOutput, WorkerReady
from tprt.transport.channel import WorkerHub, WorkerLink
from tprt.transport.codec import decode, encode
from tprt.transport.inproc import make_inproc_group
from tprt.transport.zmq_socket import RequestServer

WORLD_SIZE = 2
Step = tuple[int, StepInput]


class Keeper:
    """Owns groups of threads. What is public is for tests to change.

    Attributes:
        dies: whether rank 1 of an epoch ends instead of running a step.
        starts: whether the ranks of an epoch ever become ready.
        ended: what is said of the end of an epoch, by epoch, instead of what the coordinator noticed.
        num_blocks: KV blocks of the ranks, by epoch.
        started: epochs that were started.
        steps: (epoch, step) that rank 0 was told to run.
    """

    def __init__(self) -> None:
        self.dies: Callable[[int, StepInput], bool] = lambda epoch, step: False
        self.starts: Callable[[int], bool] = lambda epoch: True
        self.ended: dict[int, GroupEnded] = {}
        self.num_blocks: defaultdict[int, int] = defaultdict(lambda: 50)
        self.started: list[int] = []
        self.steps: list[Step] = []
        self._links: list[WorkerLink] = []
        self._leave = threading.Event()
        self._threads: list[threading.Thread] = []
        self._news: deque[GroupEnded] = deque()
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def open_hub(self, epoch: int) -> WorkerHub:
        hub, self._links = make_inproc_group(WORLD_SIZE)
        return hub

    def open_watch(self, epoch: int) -> None:
        return None

    def start(self, epoch: int) -> None:
        self.started.append(epoch)
        self._leave = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(epoch, rank, link, self._leave), name=f"{epoch}, {rank}")
            for rank, link in enumerate(self._links)
        ]
        for thread in self._threads:
            thread.start()

    def is_ready(self, epoch: int) -> None:
        pass

    def end(self, epoch: int, cause: str) -> None:
        self.join()
        noticed = GroupEnded(epoch, cause, CauseKind.OBSERVED, False, False)
        self.tell(self.ended.get(epoch, noticed))

    def tell(self, news: GroupEnded) -> None:
        self._news.append(news)
        os.eventfd_write(self._bell, 1)

    def receive(self, timeout_s: float) -> GroupEnded | None:
        if not self._news:
            select.select([self._bell], [], [], timeout_s)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._bell)
        return self._news.popleft() if self._news else None

    def fileno(self) -> int:
        return self._bell

    def join(self) -> None:
        """End the threads of the newest group."""
        self._leave.set()
        for thread in self._threads:
            thread.join(DEADLINE_S)
            assert not thread.is_alive()

    def close(self) -> None:
        self.join()
        os.close(self._bell)

    def _run(self, epoch: int, rank: int, link: WorkerLink, leave: threading.Event) -> None:
        with contextlib.suppress(PeerLostError):
            if self.starts(epoch):
                ready = WorkerReady(epoch, rank, self.num_blocks[epoch], 0, 0, 0.0)
                link.send_control(b"".join(encode(ready)), DEADLINE_S)
            while not leave.is_set():
                with contextlib.suppress(TransportTimeoutError):
                    message = decode(link.steps.receive(0.02))
                    if isinstance(message, Shutdown):
                        break
                    assert isinstance(message, StepInput)
                    if self.dies(epoch, message):
                        break
                    if rank == 0:
                        self._answer(epoch, message, link)
        link.close()

    def _answer(self, epoch: int, step: StepInput, link: WorkerLink) -> None:
        """Token `n` of a sequence is its length."""
        self.steps.append((epoch, step))
        assert step.epoch == epoch
        tokens = step.context_lens[step.samples != 0]
        assert link.outputs is not None
        link.outputs.send(encode(StepOutput(epoch, step.step, tokens.astype(np.int32))), DEADLINE_S)


class ReplacedEngine:
    """A coordinator in a thread, with a keeper of its ranks."""

    def __init__(self, folder: Path, limits: SchedulerLimits = LIMITS, **supervision: float) -> None:
        self.keeper = Keeper()
        self.error: EngineDeadError | None = None
        self.clients: list[Client] = []
        self._limits = limits
        self._server = RequestServer.bind(f"ipc://{folder}/requests")
        self._hub = self.keeper.open_hub(0)
        deadlines = SupervisionConfig(
            **{"startup_timeout_s": DEADLINE_S, "step_timeout_s": DEADLINE_S} | supervision
        )
        group = WorkerGroup(self._hub, WORLD_SIZE, 0, deadlines, self.keeper.open_watch(0))
        self.coordinator = Coordinator(self._server, group, self._make_scheduler, deadlines, self.keeper)
        self.thread = threading.Thread(target=self._run, name="coordinator")

    def start(self) -> ReplacedEngine:
        self.keeper.start(0)
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
            self.client().send(Shutdown("the test is over"))
            self.thread.join(DEADLINE_S)
            assert self.error is None
        assert not self.thread.is_alive()
        self.keeper.close()
        for client in self.clients:
            client.lane.close()
        self._hub.close()
        self._server.close()

    def _make_scheduler(self, num_blocks: int) -> Scheduler:
        values = {name: getattr(self._limits, name) for name in self._limits.__slots__}
        return Scheduler(SchedulerLimits(**values | {"num_blocks": num_blocks}), (EOS,), 1000)

    def _run(self) -> None:
        try:
            self.coordinator.run()
        except EngineDeadError as error:
            self.error = error
