"""The loop between clients and workers: requests in, steps out, tokens back.

All I/O of the coordinator is here and in `worker_group`. Whatever a client sends harms no other. When a rank
fails, the group is replaced as long as `replacement` allows, and every request goes on from the tokens it has;
otherwise the loop ends with the first cause. Knows nothing of how lanes are made, processes started and
configurations read.
"""

from __future__ import annotations

import select
import time
from collections import deque
from collections.abc import Callable, Hashable

from tprt.config import SupervisionConfig
from tprt.coordinator.cause import Cause, GroupFailedError
from tprt.coordinator.client_lane import ClientLane
from tprt.coordinator.client_output import RequestKey, aborted_by_client, split_by_client
from tprt.coordinator.greeting import describe, greet, log_ready
from tprt.coordinator.group_keeper import GroupKeeper
from tprt.coordinator.replacement import Replacement, cause_of_end
from tprt.coordinator.scheduler import Scheduler
from tprt.coordinator.worker_group import WorkerGroup
from tprt.errors import EngineDeadError, InvalidRequestError, PeerLostError, TransportError
from tprt.log import get_logger
from tprt.messages import (
    AbortRequest,
    AddRequest,
    EngineFailed,
    GetStats,
    Hello,
    Message,
    RequestFailed,
    Shutdown,
    StepInput,
)
from tprt.transport.codec import decode, encode

_LOG = get_logger(__name__)
# Between two looks at the deadline while a new group starts.
_LOOK_S = 1.0


class Coordinator:
    """One engine: its clients, its sequences and its worker group."""

    def __init__(
        self,
        clients: ClientLane,
        group: WorkerGroup,
        make_scheduler: Callable[[int], Scheduler],
        supervision: SupervisionConfig,
        keeper: GroupKeeper | None = None,
    ) -> None:
        """Assign only; `run` does the work, and the caller closes `clients` and the lanes of `group` after it.

        Args:
            clients: where requests come from.
            group: the first ranks.
            make_scheduler: makes the scheduler from the number of KV blocks that every rank has.
            supervision: deadlines, and how often ranks are replaced.
            keeper: who owns the processes of the ranks; without one they are never replaced.
        """
        self._clients = clients
        self._supervision = supervision
        self._first_group = self._group = group
        self._make_scheduler = make_scheduler
        self._keeper = keeper
        self._replacement = Replacement(keeper, supervision)
        # Steps that the ranks have and have not answered.
        self._sent: deque[StepInput] = deque()
        # Clients that hear of failed ranks, and of those that took their place.
        self._greeted: set[bytes] = set()
        self._shutdown: Shutdown | None = None
        self._scheduler: Scheduler

    def run(self) -> None:
        """Wait for the ranks, then serve until a client sends `Shutdown`.

        Requests that come before the ranks are ready wait in the lane.

        Raises:
            EngineDeadError: the engine cannot go on; carries the first cause.
        """
        try:
            self._scheduler = self._make_scheduler(self._group.wait_until_ready())
            self._announce_ready()
            log_ready(self._scheduler.limits, self._group.world_size)
            self._serve_until_shutdown()
        finally:
            self._group.close(but_lanes=self._group is self._first_group)

    def _serve_until_shutdown(self) -> None:
        try:
            while self._shutdown is None:
                try:
                    self._serve()
                except GroupFailedError as error:
                    self._replace_group(error.cause)
            self._end(self._shutdown.reason)
        except EngineDeadError as error:
            for client_id in {key.client_id for key in self._unfinished()}:
                self._send(client_id, EngineFailed(str(error)))
            raise

    def _serve(self) -> None:
        """Run steps and wait for work until a client sends `Shutdown`.

        Raises:
            GroupFailedError: the ranks cannot go on.
        """
        poller = self._make_poller()
        while True:
            # Nothing may be sent to clients between this and the wait: it is the empty receive at the end of
            # this that arms the descriptor for what comes next.
            self._drain_clients()
            if self._shutdown is not None:
                return
            if not self._run_step():
                self._note_requests()
                poller.poll()
                self._raise_if_group_failed()

    def _make_poller(self) -> select.poll:
        poller = select.poll()
        keeper = [] if self._keeper is None else [self._keeper.fileno()]
        for fd in (self._clients.fileno(), *self._group.filenos(), *keeper):
            poller.register(fd, select.POLLIN)
        return poller

    def _run_step(self) -> bool:
        """Bring one step to its end and tell clients; False when there is nothing to run.

        The step after it is sent to the ranks first, where it can be: they need not wait for what happens here.
        """
        scheduler = self._scheduler
        if not self._sent:
            self._send_step(scheduler.schedule())
            if not self._sent:
                return False
            scheduler.counters.step_began(time.monotonic_ns())
        self._send_step(scheduler.schedule_ahead())
        self._note_requests()
        result = scheduler.update(self._group.receive_answer(self._sent[0]))
        self._sent.popleft()
        scheduler.counters.step_ended(len(result.token_ids), time.monotonic_ns())
        if self._replacement.step_finished(result.keys.tolist):
            scheduler.isolate(self._replacement.to_isolate())
        for key, news in result.prompt_logprobs:
            assert isinstance(key, RequestKey)
            self._send(key.client_id, news)
        for client_id, output in split_by_client(result):
            self._send(client_id, output)
        return True

    def _send_step(self, step: StepInput | None) -> None:
        if step is not None:
            self._group.send_step(step)
            self._sent.append(step)
            for key, message in self._scheduler.failed_in(step):
                self._fail_request(key, message)

    def _note_requests(self) -> None:
        scheduler = self._scheduler
        self._group.note_requests(scheduler.num_running, scheduler.num_waiting, scheduler.oldest_waiting_ns)

    def _raise_if_group_failed(self) -> None:
        self._group.raise_if_failed()
        if self._keeper is None:
            return
        try:
            ended = self._keeper.receive(0.0)
        except TransportError as error:
            raise EngineDeadError(str(error)) from error
        if ended is not None and ended.epoch == self._group.epoch:
            raise GroupFailedError(cause_of_end(ended))

    def _replace_group(self, noticed: Cause) -> None:
        """Serve on with new ranks; comes back when they are ready, or a client has sent `Shutdown`.

        Raises:
            EngineDeadError: they are not replaced.
        """
        self._tell_greeted(describe(self._scheduler, False, time.monotonic_ns()))
        while True:
            cause = self._replacement.settle(self._group.epoch, noticed)
            self._start_next_group(cause)
            try:
                self._wait_for_group()
                return
            except GroupFailedError as error:
                noticed = error.cause

    def _start_next_group(self, cause: Cause) -> None:
        """Give every request back to the queue, but for one that kills, and start new ranks."""
        scheduler, failed_epoch = self._scheduler, self._group.epoch
        assert self._keeper is not None
        in_step = scheduler.keys_in_flight()
        guilty = self._replacement.judge(failed_epoch, cause, in_step, scheduler.unfinished_keys())
        scheduler.reset_for_epoch(failed_epoch + 1)
        self._sent.clear()
        if guilty is not None:
            self._fail_request(guilty.key, guilty.message)
        scheduler.isolate(self._replacement.to_isolate())
        self._group.close()
        hub, watch = self._keeper.open_hub(failed_epoch + 1), self._keeper.open_watch(failed_epoch + 1)
        self._group = WorkerGroup(hub, self._group.world_size, failed_epoch + 1, self._supervision, watch)
        self._keeper.start(failed_epoch + 1)

    def _wait_for_group(self) -> None:
        """Queue what clients send until every rank is ready, or one sends `Shutdown`."""
        started_s = time.monotonic()
        poller = self._make_poller()
        while (num_blocks := self._group.num_blocks_if_ready()) is None:
            self._drain_clients()
            if self._shutdown is not None:
                return
            self._note_requests()
            poller.poll(_LOOK_S * 1000)
            self._raise_if_group_failed()
        if num_blocks != self._scheduler.limits.num_blocks:
            for key in self._scheduler.resize(num_blocks):
                self._fail_request(key, f"the ranks were replaced and have {num_blocks} KV blocks now: too few")
        self._announce_ready()
        self._tell_greeted(greet(self._scheduler, self._group.world_size))
        num_unfinished = len(self._scheduler.unfinished_keys())
        waited_s = time.monotonic() - started_s
        _LOG.warning("the ranks are ready again after %.1f s; %d requests go on", waited_s, num_unfinished)

    def _announce_ready(self) -> None:
        self._group.begin_serving()
        if self._keeper is not None:
            self._keeper.is_ready(self._group.epoch)

    def _fail_request(self, key: Hashable, message: str) -> None:
        self._scheduler.abort(key)
        assert isinstance(key, RequestKey)
        self._send(key.client_id, RequestFailed(key.request_id, message))

    def _drain_clients(self) -> None:
        while (received := self._clients.receive(0.0)) is not None:
            client_id, payload = received
            try:
                message = decode(payload)
            except (TransportError, InvalidRequestError) as error:
                _LOG.warning("client %s sent what cannot be read: %s", client_id.hex(), error)
            else:
                self._take(client_id, message)

    def _take(self, client_id: bytes, message: Message) -> None:
        if isinstance(message, AddRequest):
            self._add(client_id, message)
        elif isinstance(message, AbortRequest):
            self._scheduler.abort(RequestKey(client_id, message.request_id))
        elif isinstance(message, Hello):
            self._greeted.add(client_id)
            self._send(client_id, greet(self._scheduler, self._group.world_size))
        elif isinstance(message, GetStats):
            self._send(client_id, describe(self._scheduler, self._group.is_ready, time.monotonic_ns()))
        elif isinstance(message, Shutdown):
            self._shutdown = message
        else:
            _LOG.warning("client %s sent an unexpected %s", client_id.hex(), type(message).__name__)

    def _add(self, client_id: bytes, request: AddRequest) -> None:
        try:
            self._scheduler.add(RequestKey(client_id, request.request_id), request, time.monotonic_ns())
        except InvalidRequestError as error:
            self._send(client_id, RequestFailed(request.request_id, str(error)))

    def _tell_greeted(self, message: Message) -> None:
        for client_id in list(self._greeted):
            self._send(client_id, message)

    def _send(self, client_id: bytes, message: Message) -> None:
        """Send to one client; the requests of one that is gone are aborted."""
        try:
            self._clients.send(client_id, encode(message))
        except PeerLostError:
            self._greeted.discard(client_id)
            keys = [key for key in self._unfinished() if key.client_id == client_id]
            _LOG.info("client %s is gone; %d of its requests are aborted", client_id.hex(), len(keys))
            for key in keys:
                self._scheduler.abort(key)

    def _end(self, reason: str) -> None:
        """End the workers, and tell clients that their requests end unfinished."""
        _LOG.info("shutting down: %s", reason or "a client asked for it")
        self._group.shut_down(reason)
        for client_id, output in aborted_by_client(self._unfinished()):
            self._send(client_id, output)

    def _unfinished(self) -> list[RequestKey]:
        return [key for key in self._scheduler.unfinished_keys() if isinstance(key, RequestKey)]
