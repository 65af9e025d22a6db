"""The loop between clients and workers: requests in, steps out, tokens back.

All I/O of the coordinator is here and in `worker_group`. Whatever a client sends harms no other; whatever
happens to a rank ends the loop with the first cause. Knows nothing of how lanes are made, processes started
and configurations read.
"""

from __future__ import annotations

import select
from collections.abc import Callable, Sequence
from typing import Protocol

from tprt.config import SupervisionConfig
from tprt.coordinator.client_output import RequestKey, aborted_by_client, split_by_client
from tprt.coordinator.scheduler import Scheduler
from tprt.coordinator.worker_group import WorkerGroup
from tprt.errors import EngineDeadError, InvalidRequestError, PeerLostError, TransportError
from tprt.log import get_logger
from tprt.messages import (
    AbortRequest,
    AddRequest,
    EngineFailed,
    EngineReady,
    Hello,
    Message,
    RequestFailed,
    Shutdown,
)
from tprt.transport.channel import Buffer, WorkerHub
from tprt.transport.codec import decode, encode

_LOG = get_logger(__name__)


class ClientLane(Protocol):
    """The coordinator's end of the lane to all clients."""

    def receive(self, timeout_s: float) -> tuple[bytes, bytes] | None:
        """Return the next message with its sender, or None when there is none in time (0: do not wait)."""

    def send(self, client_id: bytes, parts: Sequence[Buffer]) -> None:
        """Send the concatenation of `parts` to one client.

        Raises:
            PeerLostError: that client is gone.
        """

    def fileno(self) -> int:
        """A descriptor that becomes readable when something comes after `receive` has returned None."""


class Coordinator:
    """One engine: its clients, its sequences and its worker group."""

    def __init__(
        self,
        clients: ClientLane,
        hub: WorkerHub,
        make_scheduler: Callable[[int], Scheduler],
        world_size: int,
        supervision: SupervisionConfig,
        epoch: int = 0,
    ) -> None:
        """Assign only; `run` does the work, and the caller closes `clients` and `hub` after it.

        Args:
            clients: where requests come from.
            hub: lanes to the ranks.
            make_scheduler: makes the scheduler from the number of KV blocks that every rank has.
            world_size: number of ranks.
            supervision: deadlines.
            epoch: number of the worker group.
        """
        self._clients = clients
        self._group = WorkerGroup(hub, world_size, epoch, supervision)
        self._make_scheduler = make_scheduler
        self._shutdown: Shutdown | None = None
        self._scheduler: Scheduler

    def run(self) -> None:
        """Wait for the ranks, then serve until a client sends `Shutdown`.

        Requests that come before the ranks are ready wait in the lane.

        Raises:
            EngineDeadError: the engine cannot go on; carries the first cause.
        """
        self._scheduler = self._make_scheduler(self._group.wait_until_ready())
        self._log_ready()
        try:
            self._serve()
        except EngineDeadError as error:
            for client_id in {key.client_id for key in self._unfinished()}:
                self._send(client_id, EngineFailed(str(error)))
            raise

    def _serve(self) -> None:
        poller = select.poll()
        for fd in (self._clients.fileno(), *self._group.filenos()):
            poller.register(fd, select.POLLIN)
        while True:
            # Nothing may be sent to clients between this and the wait: it is the empty receive at the end of
            # this that arms the descriptor for what comes next.
            self._drain_clients()
            if self._shutdown is not None:
                self._end(self._shutdown.reason)
                return
            if not self._run_step():
                poller.poll()
                self._group.raise_if_failed()

    def _run_step(self) -> bool:
        """Run one step and tell clients; False when there is nothing to run."""
        step = self._scheduler.schedule()
        if step is None:
            return False
        result = self._scheduler.update(self._group.run_step(step))
        for client_id, output in split_by_client(result):
            self._send(client_id, output)
        return True

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
            self._send(client_id, self._engine_ready())
        elif isinstance(message, Shutdown):
            self._shutdown = message
        else:
            _LOG.warning("client %s sent an unexpected %s", client_id.hex(), type(message).__name__)

    def _add(self, client_id: bytes, request: AddRequest) -> None:
        try:
            self._scheduler.add(RequestKey(client_id, request.request_id), request)
        except InvalidRequestError as error:
            self._send(client_id, RequestFailed(request.request_id, str(error)))

    def _send(self, client_id: bytes, message: Message) -> None:
        """Send to one client; the requests of one that is gone are aborted."""
        try:
            self._clients.send(client_id, encode(message))
        except PeerLostError:
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

    def _engine_ready(self) -> EngineReady:
        limits = self._scheduler.limits
        return EngineReady(
            epoch=self._scheduler.epoch,
            world_size=self._group.world_size,
            num_blocks=limits.num_blocks,
            block_size=limits.block_size,
            max_model_len=limits.max_sequence_len,
        )

    def _log_ready(self) -> None:
        limits = self._scheduler.limits
        _LOG.info(
            "%d ranks are ready: %d KV blocks of %d tokens, sequences of up to %d tokens",
            *(self._group.world_size, limits.num_blocks, limits.block_size, limits.max_sequence_len),
        )
        if limits.max_sequence_len < limits.max_model_len:
            _LOG.warning(
                "the KV blocks hold %d tokens, less than max_model_len %d; longer outputs end there",
                *(limits.num_blocks * limits.block_size, limits.max_model_len),
            )
