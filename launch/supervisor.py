"""Starts the processes of a deployment, sees the death of each, and ends them all.

Children are watched by pidfds from the moment they are started. When a rank dies, the others of its epoch are
killed from outside, since a rank that waits in a collective cannot be asked; the coordinator is told of what,
and may ask for the ranks of a next epoch. A server that dies is started again. The death of the coordinator, or
of any child before all ranks were ready for the first time, ends the whole deployment. The thread that starts
the children lives as long as they do, because their parent-death signal is tied to it. Knows nothing of models
and requests.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from launch.child import SUPERVISOR_FD
from launch.child_log import STDERR, LogTee
from launch.child_process import ChildProcess, ChildSpec
from launch.failure import cause_of
from launch.group_lane import GroupLane
from launch.rank_group import RankGroup, death_of, start_child
from launch.serving.child import ServerChild
from tprt.config import SupervisionConfig
from tprt.coordinator.cause import Cause, CauseKind, first_cause
from tprt.errors import EngineDeadError
from tprt.log import get_logger
from tprt.messages import EndGroup, GroupEnded, GroupReady, StartGroup

# Deaths within this time of the first are looked at together when the cause is chosen.
_GATHER_S = 0.1
# For whoever reads standard error to take the last words.
_DRAIN_S = 1.0
# A program that waits for results asks every 0.1 s whether the deployment has failed.
_ASKED_S = 0.25
_LOG = get_logger(__name__)


class Supervisor:
    """The children of one deployment.

    Attributes:
        server: the one that serves HTTP, if there is one.
    """

    def __init__(self, run_dir: Path, supervision: SupervisionConfig, world_size: int, epoch: int = 0) -> None:
        self._run_dir = run_dir
        self._first_epoch = epoch
        self._supervision = supervision
        self._world_size = world_size
        self._tee = LogTee()
        self._lane: GroupLane
        self._make_ranks: Callable[[int], Sequence[ChildSpec]]
        self._coordinator: list[ChildProcess] = []
        self.server: ServerChild | None = None
        self._group: RankGroup | None = None
        self._last_end: GroupEnded | None = None
        self._was_ready = False
        self._pids: Mapping[str, int] = {}
        self._started = threading.Event()
        self._stop_asked = False
        self._deadline_s = float("inf")
        self._grace_s = 0.0
        self._failure: str | None = None
        self._explained = threading.Event()
        self._was_raised = threading.Event()
        self._stop_fd = -1
        self._thread: threading.Thread | None = None

    @property
    def pids(self) -> dict[str, int]:
        """Process ids by name, those of the newest epoch for ranks."""
        return dict(self._pids)

    def start(
        self,
        coordinator: ChildSpec,
        make_ranks: Callable[[int], Sequence[ChildSpec]],
        server: ChildSpec | None = None,
    ) -> None:
        """Start the coordinator, the ranks of the first epoch, and a `server` of HTTP, and begin to watch them.

        The coordinator finds the descriptor of its lane to the supervisor in `SUPERVISOR_FD`.

        Raises:
            EngineDeadError: one could not be started; says which and why.
        """
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC)
        self._lane = GroupLane()
        self._make_ranks = make_ranks
        if server is not None:
            self.server = ServerChild(self._run_dir, server, self._tee, self._supervision)
        self._thread = threading.Thread(
            target=self._watch, args=(coordinator,), name="tprt-supervisor", daemon=True
        )
        self._thread.start()
        self._started.wait()
        self.raise_if_failed()

    @property
    def has_failed(self) -> bool:
        """Tell whether a failure has ended the deployment."""
        return self._failure is not None

    @property
    def has_lost_ranks(self) -> bool:
        """Tell whether ranks have failed, which may be about to end the deployment."""
        return (group := self._group) is None or bool(group.deaths())

    def raise_if_failed(self) -> None:
        """Raise the first cause if the deployment has failed.

        Raises:
            EngineDeadError: says which process died where of what, with its traceback.
        """
        if self._failure is not None:
            self._was_raised.set()
            raise EngineDeadError(self._failure)

    def wait_for_failure(self, timeout_s: float) -> None:
        """Wait until a failure has been explained, `timeout_s` at most."""
        self._explained.wait(timeout_s)

    def expect_end(self) -> None:
        """From now on children that end have been asked to."""
        self._stop_asked = True

    def stop(self, grace_s: float) -> None:
        """Wait `grace_s` for the children to end, kill those that do not.

        Idempotent; may be called again with less grace when a first call was interrupted.
        """
        if self._thread is None:
            return
        self._grace_s = grace_s
        self._stop_asked = True
        os.eventfd_write(self._stop_fd, 1)
        self._thread.join()
        self._thread = None
        os.close(self._stop_fd)
        self._lane.close()

    def _watch(self, coordinator: ChildSpec) -> None:
        try:
            self._failure = self._start_all(coordinator)
            self._started.set()
            self._lane.close_coordinators_end()
            while self._failure is None and self._may_go_on():
                self._take_in(self._wait())
        except BaseException:
            self._failure = "the supervisor of the processes failed; its traceback is above"
            raise
        finally:
            self._explained.set()
            self._started.set()
            self._end_all()
            self._say_if_nobody_asks()

    def _start_all(self, coordinator: ChildSpec) -> str | None:
        fd = self._lane.coordinators_fd
        spec = replace(
            coordinator, env={**coordinator.env, SUPERVISOR_FD: str(fd)}, pass_fds=(*coordinator.pass_fds, fd)
        )
        failure = start_child(self._coordinator, spec, self._tee)
        if failure is None and self.server is not None:
            failure = self.server.start()
        return failure or self._start_group(self._first_epoch)

    def _start_group(self, epoch: int) -> str | None:
        """Start the ranks of `epoch`; return why that failed, if it did."""
        self._group = RankGroup(self._run_dir, epoch, self._make_ranks(epoch), self._tee, self._world_size)
        failure = self._group.start()
        self._note_pids()
        return failure

    def _note_pids(self) -> None:
        self._pids = {child.name: child.pid for child in self._children()}

    def _children(self) -> list[ChildProcess]:
        server = self.server.children if self.server else ()
        return [*self._coordinator, *server, *(self._group.children if self._group else ())]

    def _may_go_on(self) -> bool:
        # Where nobody has asked them to, the end of the last ones is still to be looked at.
        is_any_left = any(child.exit_code is None for child in self._children())
        return (is_any_left or not self._stop_asked) and time.monotonic() < self._deadline_s

    def _wait(self) -> set[int]:
        """Return the descriptors that have something, once one has."""
        poller = select.poll()
        children = self._children()
        drained = self.server.children if self.server is not None and self.server.has_ended else []
        may_end = children if self._stop_asked else drained
        pidfds = [child.pidfd for child in children if child not in may_end or child.exit_code is None]
        logs = [child.log.fileno() for child in children]
        for fd in (self._stop_fd, self._lane.fileno(), *pidfds, *logs):
            if fd >= 0:
                poller.register(fd, select.POLLIN)
        if self._tee.has_backlog:
            poller.register(STDERR, select.POLLOUT)
        look_s = float("inf") if self._group is None else self._group.look_s
        left_s = min(look_s, self._deadline_s - time.monotonic())
        return {fd for fd, _ in poller.poll(None if left_s == float("inf") else max(left_s, 0.0) * 1000)}

    def _take_in(self, ready: set[int]) -> None:
        self._tee.flush()
        for child in self._children():
            if child.log.fileno() in ready:
                child.log.read()
        if self._stop_fd in ready:
            os.eventfd_read(self._stop_fd)
            self._deadline_s = time.monotonic() + self._grace_s
        if self._lane.fileno() in ready:
            for request in self._lane.requests():
                self._take_request(request)
        has_lost = self._group is not None and self._group.has_lost_adopted()
        if not self._stop_asked and (has_lost or any(child.pidfd in ready for child in self._children())):
            self._take_deaths()

    def _take_request(self, request: StartGroup | GroupReady | EndGroup) -> None:
        if self._stop_asked:
            return
        if isinstance(request, GroupReady):
            self._was_ready = True
        elif isinstance(request, StartGroup):
            failure = self._start_group(request.epoch)
            if failure is not None:
                self._end_group(failure)
        elif self._group is not None and self._group.epoch == request.epoch:
            time.sleep(_GATHER_S)
            self._end_group(request.cause)
        elif self._last_end is not None and self._last_end.epoch == request.epoch:
            self._lane.send(self._last_end)

    def _take_deaths(self) -> None:
        """Look at what has died about now: the deployment ends, or the ranks of this epoch do."""
        time.sleep(_GATHER_S)
        for child in self._children():
            child.log.read()
        # What the coordinator has said last came before its end, and before that of ranks that it gave up.
        for request in self._lane.requests():
            self._take_request(request)
        (coordinator,) = self._coordinator
        causes = [cause_of(death) for death in (self._group.deaths() if self._group else ())]
        server_cause = self.server.death() if self.server else None
        if coordinator.exit_code is not None:
            causes.insert(0, cause_of(death_of(self._run_dir, coordinator)))
        elif self._was_ready:
            if causes:
                self._end_group("")
            if server_cause is not None:
                self._replace_server(server_cause)
            return
        if server_cause is not None:
            causes.append(server_cause)
        if causes:
            self._failure = first_cause(causes).text

    def _replace_server(self, cause: Cause) -> None:
        assert self.server is not None
        failure = self.server.replace(cause)
        self._note_pids()
        if failure is not None:
            self._failure = failure.text

    def _end_group(self, noticed: str) -> None:
        """Kill the ranks of this epoch and tell the coordinator the first cause, or what it has noticed."""
        group, self._group = self._group, None
        assert group is not None
        causes = [cause_of(death) for death in group.deaths()]
        if noticed:
            causes.append(Cause(CauseKind.OBSERVED, noticed))
        group.end()
        cause = first_cause(causes)
        self._last_end = GroupEnded(
            group.epoch, cause.text, cause.kind, cause.is_input_error, cause.is_from_outside
        )
        self._lane.send(self._last_end)

    def _say_if_nobody_asks(self) -> None:
        """Log the failure of a deployment whose program is busy with something else, which may be for hours."""
        if self._failure is not None and not self._was_raised.wait(_ASKED_S) and not self._stop_asked:
            _LOG.error("the deployment has ended: %s", self._failure)

    def _end_all(self) -> None:
        # The server last: it is by the end of the others that it knows what to tell its clients.
        for child in [*self._coordinator, *(self._group.children if self._group else ())]:
            child.kill()
        if self.server is not None:
            self.server.end(has_last_words=self._failure is not None)
        if self._group is not None:
            self._group.end()
        for child in self._coordinator:
            child.release()
        self._tee.drain(_DRAIN_S)
