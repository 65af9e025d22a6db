"""Starts the processes of a deployment, sees the death of each, and ends them all.

Children are watched by pidfds from the moment they are started. When a rank dies, the others of its epoch are
killed from outside, since a rank that waits in a collective cannot be asked; its coordinator is told of what,
and may ask for the ranks of a next epoch. A server that dies is started again. The death of a coordinator ends
its replica, and that of the last replica, or of any child before all ranks were ready for the first time, ends
the whole deployment. The thread that starts the children lives as long as they do, because their parent-death
signal is tied to it. Knows nothing of models and requests.
"""

from __future__ import annotations

import os
import select
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from launch.child_log import STDERR, LogTee
from launch.child_process import ChildProcess, ChildSpec
from launch.replica_processes import GATHER_S, ReplicaProcesses, ReplicaSpec
from launch.serving.child import ServerChild
from tprt.config import SupervisionConfig
from tprt.coordinator.cause import Cause, CauseKind, first_cause
from tprt.errors import EngineDeadError
from tprt.log import get_logger

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

    def __init__(self, run_dir: Path, supervision: SupervisionConfig) -> None:
        self._run_dir = run_dir
        self._supervision = supervision
        self._tee = LogTee()
        self.server: ServerChild | None = None
        # Those that are not lost, by number.
        self._replicas: dict[int, ReplicaProcesses] = {}
        self._num_replicas = 0
        self._given_up: dict[int, str] = {}
        self._pids: Mapping[str, int] = {}
        self._started = threading.Event()
        self._stop_asked = False
        self._deadline_s = float("inf")
        self._failure: str | None = None
        self._explained = threading.Event()
        self._was_raised = threading.Event()
        self._wake_fd = -1
        self._thread: threading.Thread | None = None

    @property
    def pids(self) -> dict[str, int]:
        """Process ids by name, those of the newest epoch for ranks."""
        return dict(self._pids)

    @property
    def lost_replicas(self) -> list[int]:
        """Replicas that have failed while others go on."""
        return [number for number in range(self._num_replicas) if number not in self._replicas]

    def start(self, replicas: Sequence[ReplicaSpec], server: ChildSpec | None = None) -> None:
        """Start the coordinators, the server and the ranks of the first epoch, and begin to watch them.

        Args:
            replicas: what to start of each.
            server: what serves HTTP, if anything does.

        Raises:
            EngineDeadError: one could not be started; says which and why.
        """
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC)
        self._num_replicas = len(replicas)
        self._replicas = {number: ReplicaProcesses(spec, self._tee) for number, spec in enumerate(replicas)}
        if server is not None:
            self.server = ServerChild(self._run_dir, server, self._tee, self._supervision)
        self._thread = threading.Thread(target=self._watch, name="tprt-supervisor", daemon=True)
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
        return any(replica.has_lost_ranks for replica in list(self._replicas.values()))

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

    def give_up(self, number: int, why: str) -> None:
        """End a replica that is there and cannot go on; does not wait."""
        self._given_up[number] = why
        os.eventfd_write(self._wake_fd, 1)

    def expect_end(self) -> None:
        """From now on children that end have been asked to."""
        self._stop_asked = True

    def stop(self, grace_s: float) -> None:
        """Wait `grace_s` for the children to end, kill those that do not.

        Idempotent; may be called again with less grace when a first call was interrupted.
        """
        if self._thread is None:
            return
        self._stop_asked = True
        self._deadline_s = time.monotonic() + grace_s
        os.eventfd_write(self._wake_fd, 1)
        self._thread.join()
        self._thread = None
        os.close(self._wake_fd)
        for replica in self._replicas.values():
            replica.close()

    def _watch(self) -> None:
        try:
            self._failure = self._start_all()
            self._started.set()
            for replica in self._replicas.values():
                replica.has_started()
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

    def _start_all(self) -> str | None:
        steps = [replica.start for replica in self._replicas.values()]
        if self.server is not None:
            steps.append(self.server.start)
        steps += [replica.start_first_group for replica in self._replicas.values()]
        # The first that fails is the last that is tried.
        failure = next(filter(None, (start() for start in steps)), None)
        self._note_pids()
        return failure

    def _note_pids(self) -> None:
        server = self.server.children if self.server else ()
        pids = {child.name: child.pid for child in server}
        for replica in self._replicas.values():
            pids |= replica.pids
        self._pids = pids

    def _children(self) -> list[ChildProcess]:
        server = self.server.children if self.server else ()
        replicas = self._replicas.values()
        return [*server, *(child for replica in replicas for child in replica.children)]

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
        lanes = [replica.fileno() for replica in self._replicas.values()]
        for fd in (self._wake_fd, *lanes, *pidfds, *logs):
            if fd >= 0:
                poller.register(fd, select.POLLIN)
        if self._tee.has_backlog:
            poller.register(STDERR, select.POLLOUT)
        looks_s = [replica.look_s for replica in self._replicas.values()]
        left_s = min([*looks_s, self._deadline_s - time.monotonic()])
        return {fd for fd, _ in poller.poll(None if left_s == float("inf") else max(left_s, 0.0) * 1000)}

    def _take_in(self, ready: set[int]) -> None:
        self._tee.flush()
        for child in self._children():
            if child.log.fileno() in ready:
                child.log.read()
        if self._wake_fd in ready:
            os.eventfd_read(self._wake_fd)
        for replica in self._replicas.values():
            if replica.fileno() in ready:
                replica.take_requests(self._stop_asked)
        if not self._stop_asked:
            while self._given_up:
                number, why = self._given_up.popitem()
                self._lose(number, Cause(CauseKind.OBSERVED, why))
            has_lost = any(replica.has_lost_adopted() for replica in self._replicas.values())
            if has_lost or any(child.pidfd in ready for child in self._children()):
                self._take_deaths()
        self._note_pids()

    def _take_deaths(self) -> None:
        """Look at what has died about now: groups of ranks, replicas, or the deployment end."""
        time.sleep(GATHER_S)
        for child in self._children():
            child.log.read()
        found = {number: replica.take_deaths() for number, replica in self._replicas.items()}
        server_cause = self.server.death() if self.server else None
        if not self._was_ready or all(found.values()):
            causes = [self._place(number, cause) for number, several in found.items() for cause in several]
            causes += [] if server_cause is None else [server_cause]
            if causes:
                self._failure = first_cause(causes).text
            return
        for number, causes in found.items():
            if causes:
                self._lose(number, first_cause(causes))
        if server_cause is not None:
            self._replace_server(server_cause)

    @property
    def _was_ready(self) -> bool:
        return all(replica.was_ready for replica in self._replicas.values())

    def _place(self, number: int, cause: Cause) -> Cause:
        return replace(cause, text=self._replicas[number].spec.place(cause.text))

    def _lose(self, number: int, cause: Cause) -> None:
        """End a replica, and the deployment with the last one."""
        replica = self._replicas.get(number)
        if replica is None:
            return
        text = replica.spec.place(cause.text)
        if len(self._replicas) == 1 or not self._was_ready:
            self._failure = text
            return
        replica.kill()
        replica.release()
        replica.close()
        # What is not there any more is how others know.
        shutil.rmtree(replica.spec.run_dir, ignore_errors=True)
        del self._replicas[number]
        _LOG.error(
            "%s\n%s has failed and is not replaced; %d of %d replicas go on",
            *(text, replica.spec.name, len(self._replicas), self._num_replicas),
        )

    def _replace_server(self, cause: Cause) -> None:
        assert self.server is not None
        failure = self.server.replace(cause)
        if failure is not None:
            self._failure = failure.text

    def _say_if_nobody_asks(self) -> None:
        """Log the failure of a deployment whose program is busy with something else, which may be for hours."""
        if self._failure is not None and not self._was_raised.wait(_ASKED_S) and not self._stop_asked:
            _LOG.error("the deployment has ended: %s", self._failure)

    def _end_all(self) -> None:
        # The server last: it is by the end of the others that it knows what to tell its clients.
        for replica in self._replicas.values():
            replica.kill()
        if self.server is not None:
            self.server.end(has_last_words=self._failure is not None)
        for replica in self._replicas.values():
            replica.release()
        self._tee.drain(_DRAIN_S)
