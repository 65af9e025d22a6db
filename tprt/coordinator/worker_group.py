"""One worker group as the coordinator sees it: until it is ready, step by step, and why it failed.

Knows nothing of clients and of what a step is for.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NoReturn

from tprt.config import SupervisionConfig
from tprt.errors import EngineDeadError, TransportError, TransportTimeoutError
from tprt.log import get_logger
from tprt.messages import Shutdown, StepInput, StepOutput, WorkerFailed, WorkerReady
from tprt.transport.channel import ControlEvent, WorkerHub
from tprt.transport.codec import decode, encode

_LOG = get_logger(__name__)
# A rank's failure makes others fail: reports within this time of the first are looked at together.
_GATHER_S = 0.1
_CONSEQUENCE = "PeerLostError"


class WorkerGroup:
    """The ranks of one epoch, through their lanes; every failure of theirs is an `EngineDeadError`."""

    def __init__(self, hub: WorkerHub, world_size: int, epoch: int, supervision: SupervisionConfig) -> None:
        self._hub = hub
        self._world_size = world_size
        self._epoch = epoch
        self._supervision = supervision
        self._ready: dict[int, WorkerReady] = {}

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self._world_size

    def filenos(self) -> list[int]:
        """Descriptors that become readable when `raise_if_failed` may have something to raise."""
        return self._hub.filenos()

    def wait_until_ready(self) -> int:
        """Wait until every rank has loaded; return the KV blocks that all of them have.

        Raises:
            EngineDeadError: a rank failed, is gone, or is not ready within `startup_timeout_s`.
        """
        deadline_s = time.monotonic() + self._supervision.startup_timeout_s
        try:
            self._hub.accept_all(self._supervision.startup_timeout_s)
        except TransportError as error:
            self._fail_in_transport("the start", "startup_timeout_s", error)
        while len(self._ready) < self._world_size:
            event = self._hub.receive_control(max(0.0, deadline_s - time.monotonic()))
            if event is None and time.monotonic() >= deadline_s:
                self._fail_late_start()
            if event is not None:
                self._take(event)
        return min(ready.num_blocks for ready in self._ready.values())

    def run_step(self, step: StepInput) -> StepOutput:
        """Let every rank run `step` and return rank 0's answer.

        Raises:
            EngineDeadError: a rank failed, is gone, or did not take or answer the step in `step_timeout_s`.
        """
        deadline_s = time.monotonic() + self._supervision.step_timeout_s
        try:
            self._hub.steps.send(encode(step), self._supervision.step_timeout_s)
            while True:
                received = self._hub.receive_output(max(0.0, deadline_s - time.monotonic()))
                if not isinstance(received, bytes):
                    self._take(received)
                elif (output := self._check_output(step, received)) is not None:
                    return output
        except TransportError as error:
            self._fail_in_transport(f"step {step.step}", "step_timeout_s", error)

    def raise_if_failed(self) -> None:
        """Take in what ranks have said on their control lanes, without waiting.

        Raises:
            EngineDeadError: a rank failed or is gone.
        """
        while (event := self._hub.receive_control(0.0)) is not None:
            self._take(event)

    def shut_down(self, reason: str) -> None:
        """Ask every rank to end; a rank that cannot be asked has ended or will be killed."""
        try:
            self._hub.steps.send(encode(Shutdown(reason)), self._supervision.shutdown_grace_s)
        except TransportError as error:
            _LOG.warning("a rank could not be asked to shut down: %s", error)

    def _take(self, event: ControlEvent) -> None:
        message = None if event.payload is None else decode(event.payload)
        if message is None or isinstance(message, WorkerFailed):
            self._fail([(event.rank, message), *self._gather_failures()])
        elif isinstance(message, WorkerReady) and message.epoch == self._epoch:
            self._ready[event.rank] = message
        else:
            _LOG.warning("rank %d sent an unexpected %s", event.rank, type(message).__name__)

    def _check_output(self, step: StepInput, payload: bytes) -> StepOutput | None:
        """Return the answer to `step`; None for one of an older epoch."""
        output = decode(payload)
        if not isinstance(output, StepOutput):
            raise EngineDeadError(f"rank 0 sent {type(output).__name__}; expected StepOutput")
        if output.epoch < self._epoch:
            return None
        found = (output.epoch, output.step, len(output.token_ids))
        expected = (step.epoch, step.step, int(step.samples.sum()))
        if found != expected:
            raise EngineDeadError(
                f"rank 0 answered with (epoch, step, tokens) {found}; expected {expected}: coordinator and"
                " workers must be of one version"
            )
        return output

    def _gather_failures(self) -> list[tuple[int, WorkerFailed | None]]:
        """Collect what ranks report about now: a `WorkerFailed`, or None for one that is gone."""
        failures: list[tuple[int, WorkerFailed | None]] = []
        deadline_s = time.monotonic() + _GATHER_S
        while (left_s := deadline_s - time.monotonic()) > 0:
            event = self._hub.receive_control(left_s)
            if event is None:
                continue
            message = None if event.payload is None else decode(event.payload)
            if message is None or isinstance(message, WorkerFailed):
                failures.append((event.rank, message))
        return failures

    def _fail(self, failures: Sequence[tuple[int, WorkerFailed | None]]) -> NoReturn:
        rank, failed = first_cause(failures)
        if failed is None:
            raise EngineDeadError(f"rank {rank} is gone: its process ended without a report")
        raise EngineDeadError(f"{failed.traceback}rank {rank} failed in phase {failed.phase}: {failed.error}")

    def _fail_late_start(self) -> NoReturn:
        late = sorted(set(range(self._world_size)) - self._ready.keys())
        raise EngineDeadError(
            f"of {self._world_size} ranks, {late} were not ready after {self._supervision.startup_timeout_s} s;"
            " raise supervision.startup_timeout_s if loading takes longer"
        )

    def _fail_in_transport(self, what: str, setting: str, error: TransportError) -> NoReturn:
        """Report what a rank says of itself rather than how it was noticed here."""
        if failures := self._gather_failures():
            self._fail(failures)
        limit = f" (supervision.{setting})" if isinstance(error, TransportTimeoutError) else ""
        raise EngineDeadError(f"{what} failed: {error}{limit}") from error


def first_cause(failures: Sequence[tuple[int, WorkerFailed | None]]) -> tuple[int, WorkerFailed | None]:
    """Return the failure that the others follow from.

    A rank's own error comes before a loss without a word, and that before those that only report the loss of
    another process; among equals the one that came first.

    Args:
        failures: (rank, its report), in the order in which they came; None where a rank is just gone.
    """
    reported = {rank for rank, failed in failures if failed is not None}

    def order(failure: tuple[int, WorkerFailed | None]) -> int:
        rank, failed = failure
        if failed is None:
            # A rank that has reported goes soon after; that is no further failure.
            return 3 if rank in reported else 1
        return 2 if failed.error.startswith(_CONSEQUENCE) else 0

    return min(failures, key=order)
