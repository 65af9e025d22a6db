"""One worker group as the coordinator sees it: until it is ready, step by step, and why it failed.

Knows nothing of clients and of what a step is for.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NoReturn

from tprt.config import SupervisionConfig
from tprt.coordinator.cause import Cause, CauseKind, GroupFailedError, first_cause
from tprt.coordinator.group_watch import GroupWatch
from tprt.errors import TransportError, TransportTimeoutError
from tprt.log import get_logger
from tprt.messages import Shutdown, StepInput, StepOutput, WorkerFailed, WorkerReady
from tprt.transport.channel import ControlEvent, WorkerHub
from tprt.transport.codec import decode, encode

_LOG = get_logger(__name__)
# A rank's failure makes others fail: reports within this time of the first are looked at together.
_GATHER_S = 0.1
_CONSEQUENCE = "PeerLostError"


class WorkerGroup:
    """The ranks of one epoch, through their lanes; every failure of theirs is a `GroupFailedError`."""

    def __init__(
        self,
        hub: WorkerHub,
        world_size: int,
        epoch: int,
        supervision: SupervisionConfig,
        watch: GroupWatch | None = None,
    ) -> None:
        self._hub = hub
        self._watch = watch
        self._world_size = world_size
        self._epoch = epoch
        self._supervision = supervision
        self._ready: dict[int, WorkerReady] = {}
        self._start_deadline_s = time.monotonic() + supervision.startup_timeout_s
        # Often enough that a stall is noticed soon after it is one.
        self._look_s = min(1.0, supervision.stall_timeout_s / 8)
        if watch is not None:
            watch.begin_wait(None)

    @property
    def epoch(self) -> int:
        """Number of this group."""
        return self._epoch

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self._world_size

    @property
    def is_ready(self) -> bool:
        """Tell whether every rank has loaded."""
        return len(self._ready) == self._world_size

    def filenos(self) -> list[int]:
        """Descriptors that become readable when `raise_if_failed` may have something to raise."""
        return self._hub.filenos()

    def wait_until_ready(self) -> int:
        """Wait until every rank has loaded; return the KV blocks that all of them have.

        Raises:
            GroupFailedError: a rank failed, is gone, or is not ready within `startup_timeout_s`.
        """
        self._start_deadline_s = time.monotonic() + self._supervision.startup_timeout_s
        while (num_blocks := self.num_blocks_if_ready()) is None:
            left_s = self._start_deadline_s - time.monotonic()
            event = self._hub.receive_control(max(0.0, min(left_s, self._look_s)))
            if event is not None:
                self._take(event)
        return num_blocks

    def num_blocks_if_ready(self) -> int | None:
        """Return the KV blocks that all ranks have once every rank has loaded, None before that.

        Does not wait; `raise_if_failed` takes in what makes the difference.

        Raises:
            GroupFailedError: a rank is not ready within `startup_timeout_s`, or is stopped.
        """
        if self.is_ready:
            return min(ready.num_blocks for ready in self._ready.values())
        if self._watch is not None and (
            stall := self._watch.find_stuck_start(self._supervision.stall_timeout_s)
        ):
            _fail_observed(f"{stall} (supervision.stall_timeout_s)")
        if time.monotonic() >= self._start_deadline_s:
            self._fail_late_start()
        return None

    def send_step(self, step: StepInput) -> None:
        """Have every rank run `step` after those sent before.

        Raises:
            GroupFailedError: a rank failed, is gone, or did not take the step in `step_timeout_s`.
        """
        try:
            self._hub.steps.send(encode(step), self._supervision.step_timeout_s)
        except TransportError as error:
            self._fail_in_transport(f"step {step.step}", "step_timeout_s", error)

    def receive_answer(self, step: StepInput) -> StepOutput:
        """Return rank 0's answer to `step`, the oldest that has been sent and not answered.

        Raises:
            GroupFailedError: a rank failed, is gone, or did not answer the step in `step_timeout_s`.
        """
        if self._watch is not None:
            self._watch.begin_wait(step.step)
        try:
            while True:
                received = self._receive_output(step)
                if not isinstance(received, bytes):
                    self._take(received)
                elif (output := self._check_output(step, received)) is not None:
                    if self._watch is not None:
                        self._watch.finish_step(step.step)
                    return output
        except TransportError as error:
            self._fail_in_transport(f"step {step.step}", "step_timeout_s", error)

    def _receive_output(self, step: StepInput) -> bytes | ControlEvent:
        """Wait for the answer to `step` or news of a rank, and look now and then whether any rank moves on."""
        timeout_s, watch = self._supervision.step_timeout_s, self._watch
        if watch is None:
            return self._hub.receive_output(timeout_s)
        deadline_s = time.monotonic() + timeout_s
        while (left_s := deadline_s - time.monotonic()) > 0:
            try:
                return self._hub.receive_output(min(left_s, self._look_s))
            except TransportTimeoutError:
                if (stall := watch.find_stall(self._supervision.stall_timeout_s)) is not None:
                    _fail_observed(f"{stall} (supervision.stall_timeout_s)")
        raise TransportTimeoutError(f"rank 0 has not answered within {timeout_s:g} s; {watch.where_all_are()}")

    def raise_if_failed(self) -> None:
        """Take in what ranks have said on their control lanes, without waiting.

        Raises:
            GroupFailedError: a rank failed or is gone.
        """
        while (event := self._hub.receive_control(0.0)) is not None:
            self._take(event)

    def shut_down(self, reason: str) -> None:
        """Ask every rank to end, and wait until they have, or `shutdown_grace_s` is over.

        A rank that cannot be asked has ended or will be killed. Whoever cleans up after this process if its
        parent is killed must not be gone before the ranks are.
        """
        deadline_s = time.monotonic() + self._supervision.shutdown_grace_s
        try:
            self._hub.steps.send(encode(Shutdown(reason)), self._supervision.shutdown_grace_s)
        except TransportError as error:
            _LOG.warning("a rank could not be asked to shut down: %s", error)
            return
        left = set(range(self._world_size))
        while left and (left_s := deadline_s - time.monotonic()) > 0:
            event = self._hub.receive_control(left_s)
            if event is not None and event.payload is None:
                left.discard(event.rank)

    def begin_serving(self) -> None:
        """Note that all ranks are ready, for whoever looks at the heartbeats."""
        if self._watch is not None:
            self._watch.begin_serving()

    def note_requests(self, num_running: int, num_waiting: int, oldest_waiting_ns: int) -> None:
        """Note how many requests run and wait, for whoever looks at the heartbeats."""
        if self._watch is not None:
            self._watch.set_requests(num_running, num_waiting, oldest_waiting_ns)

    def close(self, but_lanes: bool = False) -> None:
        """Close the lanes and the heartbeats; ranks that are still there see the loss of the coordinator."""
        if self._watch is not None:
            self._watch.close()
        if not but_lanes:
            self._hub.close()

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
            _fail_observed(f"rank 0 sent {type(output).__name__}; expected StepOutput")
        if output.epoch < self._epoch:
            return None
        found = (output.epoch, output.step, len(output.token_ids))
        expected = (step.epoch, step.step, int(step.samples.sum()))
        if found != expected:
            _fail_observed(
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

    @staticmethod
    def _fail(failures: Sequence[tuple[int, WorkerFailed | None]]) -> NoReturn:
        raise GroupFailedError(first_cause(causes_of(failures)))

    def _fail_late_start(self) -> NoReturn:
        late = sorted(set(range(self._world_size)) - self._ready.keys())
        where = "" if self._watch is None else f"{self._watch.where_all_are()}; "
        _fail_observed(
            f"{where}of {self._world_size} ranks, {late} were not ready after"
            f" {self._supervision.startup_timeout_s} s; raise supervision.startup_timeout_s if loading takes"
            " longer"
        )

    def _fail_in_transport(self, what: str, setting: str, error: TransportError) -> NoReturn:
        """Report what a rank says of itself rather than how it was noticed here."""
        if failures := self._gather_failures():
            self._fail(failures)
        limit = f" (supervision.{setting})" if isinstance(error, TransportTimeoutError) else ""
        _fail_observed(f"{what} failed: {error}{limit}")


def causes_of(failures: Sequence[tuple[int, WorkerFailed | None]]) -> list[Cause]:
    """Return what each of `failures` says about the cause.

    Args:
        failures: (rank, its report), in the order in which they came; None where a rank is just gone. A rank
            that has reported goes soon after; that is no further failure.
    """
    reported = {rank for rank, failed in failures if failed is not None}
    return [_cause_of(rank, failed) for rank, failed in failures if failed is not None or rank not in reported]


def _cause_of(rank: int, failed: WorkerFailed | None) -> Cause:
    if failed is None:
        return Cause(CauseKind.SILENT_DEATH, f"rank {rank} is gone: its process ended without a report")
    kind = CauseKind.CONSEQUENCE if failed.error.startswith(_CONSEQUENCE) else CauseKind.OWN_ERROR
    return Cause(kind, f"{failed.traceback}rank {rank} failed in phase {failed.phase}: {failed.error}")


def _fail_observed(text: str) -> NoReturn:
    raise GroupFailedError(Cause(CauseKind.OBSERVED, text))
