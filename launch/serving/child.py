"""The child that serves HTTP: started anew when it dies, and ended before all others.

Its listening socket is the launcher's, so connections that come meanwhile wait. Knows nothing of ranks and of
the coordinator; to that one, a server that has died is a client that has left.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

from launch.child_log import LogTee
from launch.child_process import ChildProcess, ChildSpec
from launch.failure import cause_of, forget_failures
from launch.job_signals import DRAIN_SIGNAL
from launch.rank_group import death_of, start_child
from launch.run_dir import stack_path
from tprt.config import SupervisionConfig
from tprt.coordinator.cause import Cause
from tprt.coordinator.restart_budget import RestartBudget
from tprt.errors import EngineDeadError
from tprt.log import get_logger

_LOG = get_logger(__name__)
# For a server whose engine has failed to tell its clients.
_LAST_WORDS_S = 2.0


class ServerChild:
    """The process of the HTTP server, and those that have taken its place.

    Attributes:
        children: the newest one, once started.
    """

    def __init__(self, run_dir: Path, spec: ChildSpec, tee: LogTee, supervision: SupervisionConfig) -> None:
        self.children: list[ChildProcess] = []
        self._run_dir = run_dir
        self._spec = spec
        self._tee = tee
        self._budget = RestartBudget(supervision.max_restarts, supervision.restart_window_s)
        self._num_starts = 0
        self._may_end = False
        # Another thread may ask it to end while this one starts it anew.
        self._lock = threading.Lock()

    @property
    def has_ended(self) -> bool:
        """Tell whether it was asked to end, and has."""
        return self._may_end and all(child.exit_code is not None for child in self.children)

    def start(self) -> str | None:
        """Start it; return None, or why that failed."""
        with self._lock:
            forget_failures(self._run_dir, [self._spec.name])
            stack_path(self._run_dir, self._spec.name).unlink(missing_ok=True)
            self._num_starts += 1
            return None if self._may_end else start_child(self.children, self._spec, self._tee)

    def ask_to_end(self) -> None:
        """Let it finish what it serves, and end; does not wait."""
        with self._lock:
            self._may_end = True
            for child in self.children:
                child.ask_to_end()

    def raise_if_cut_short(self) -> None:
        """Look at how it has ended once it was asked to.

        Raises:
            EngineDeadError: it died before all was done.
        """
        for child in self.children:
            # One that was asked before it served anything dies of the asking.
            if child.exit_code not in (0, -DRAIN_SIGNAL):
                raise EngineDeadError(cause_of(death_of(self._run_dir, child)).text)

    def death(self) -> Cause | None:
        """Return what there is to say if it has ended without having been asked to."""
        for child in self.children:
            if child.exit_code is not None and not self._may_end:
                child.log.read()
                return cause_of(death_of(self._run_dir, child))
        return None

    def replace(self, cause: Cause) -> Cause | None:
        """Start another one in the place of one that died of `cause`; return None, or why that was not done."""
        if cause.is_input_error or not self._budget.try_spend(time.monotonic(), self._num_starts):
            return cause
        _LOG.warning("%s; its connections are lost, and it is started again", cause.gist)
        _LOG.info("the failure in full:\n%s", cause.text)
        for child in self.children:
            child.release()
        self.children.clear()
        failure = self.start()
        return None if failure is None else Cause(cause.kind, failure)

    def end(self, has_last_words: bool) -> None:
        """Kill it; with last words, after it has had a moment to tell its clients of a failure."""
        if has_last_words:
            self.ask_to_end()
            for child in self.children:
                child.wait(_LAST_WORDS_S)
        for child in self.children:
            child.kill()
            child.release()
