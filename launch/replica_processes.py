"""The coordinator of one replica and its worker group: started, ended and heard.

A deployment has one replica, or several that know nothing of each other. Knows nothing of what else runs beside
this one and of who waits for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from launch.child import SUPERVISOR_FD
from launch.child_log import LogTee
from launch.child_process import ChildProcess, ChildSpec
from launch.failure import cause_of
from launch.group_lane import GroupLane
from launch.rank_group import RankGroup, death_of, start_child
from tprt.coordinator.cause import Cause, CauseKind, first_cause
from tprt.messages import EndGroup, GroupEnded, GroupReady, StartGroup

# Deaths within this time of the first are looked at together when the cause is chosen.
GATHER_S = 0.1


@dataclass(frozen=True, slots=True)
class ReplicaSpec:
    """What to start for one replica.

    Attributes:
        run_dir: its own.
        coordinator: finds the descriptor of its lane to the supervisor in `SUPERVISOR_FD`.
        make_ranks: returns what to start for an epoch.
        world_size: ranks of all hosts.
        name: "replica 1" where there are several; "" for the only one.
        first_epoch: number of the first worker group.
    """

    run_dir: Path
    coordinator: ChildSpec
    make_ranks: Callable[[int], Sequence[ChildSpec]]
    world_size: int
    name: str = ""
    first_epoch: int = 0

    def name_of(self, child: str) -> str:
        """Return the name of a process of it among those of the whole deployment."""
        return f"{self.name} {child}".lstrip()

    def place(self, text: str) -> str:
        """Return a failure's text with the replica's name in its last line, which has the gist."""
        *above, gist = text.split("\n")
        return "\n".join([*above, f"{self.name}: {gist}" if self.name else gist])


class ReplicaProcesses:
    """The children of one replica.

    Attributes:
        spec: what they are.
        was_ready: all ranks were ready once.
        pids: process ids by name, those of the newest epoch for ranks, also while there is none.
    """

    def __init__(self, spec: ReplicaSpec, tee: LogTee) -> None:
        self.spec = spec
        self.was_ready = False
        self.pids: Mapping[str, int] = {}
        self._tee = tee
        self._lane = GroupLane()
        self._coordinator: list[ChildProcess] = []
        self._group: RankGroup | None = None
        self._last_end: GroupEnded | None = None

    @property
    def children(self) -> list[ChildProcess]:
        """The coordinator, and what there is of the newest epoch."""
        return [*self._coordinator, *(self._group.children if self._group else ())]

    @property
    def has_lost_ranks(self) -> bool:
        """Tell whether ranks of the newest epoch have failed, or there are none."""
        return (group := self._group) is None or bool(group.deaths())

    @property
    def look_s(self) -> float:
        """Seconds between two looks at ranks that torchrun has started; infinity where there are none."""
        return float("inf") if self._group is None else self._group.look_s

    def has_lost_adopted(self) -> bool:
        """Tell whether one of those has ended, or is about to."""
        return self._group is not None and self._group.has_lost_adopted()

    def fileno(self) -> int:
        """The descriptor of the coordinator's lane; -1 once nothing more can come."""
        return self._lane.fileno()

    def start(self) -> str | None:
        """Start the coordinator; return None, or why that failed."""
        fd, spec = self._lane.coordinators_fd, self.spec.coordinator
        env = {**spec.env, SUPERVISOR_FD: str(fd)}
        return start_child(self._coordinator, replace(spec, env=env, pass_fds=(*spec.pass_fds, fd)), self._tee)

    def start_first_group(self) -> str | None:
        """Start the ranks; return None, or why that failed."""
        return self._start_group(self.spec.first_epoch)

    def has_started(self) -> None:
        """Let go of what the coordinator has inherited, so that its end is seen."""
        self._lane.close_coordinators_end()

    def take_requests(self, is_ending: bool = False) -> None:
        """Do what the coordinator asks for; nothing of it while the deployment ends."""
        for request in self._lane.requests():
            if not is_ending:
                self._take_request(request)

    def take_deaths(self) -> list[Cause]:
        """Look at what has died about now: mostly the ranks of this epoch end, and the coordinator hears of it.

        Returns:
            The causes where the replica cannot go on.
        """
        # What the coordinator has said last came before its end, and before that of ranks that it gave up.
        self.take_requests()
        (coordinator,) = self._coordinator
        causes = [cause_of(death) for death in (self._group.deaths() if self._group else ())]
        if coordinator.exit_code is not None:
            return [cause_of(death_of(self.spec.run_dir, coordinator)), *causes]
        if not self.was_ready:
            return causes
        if causes:
            self._end_group("")
        return []

    def kill(self) -> None:
        """Kill every child; does not wait."""
        for child in self.children:
            child.kill()

    def release(self) -> None:
        """Wait until every killed child is gone, and let go of what there was of it."""
        if self._group is not None:
            self._group.end()
        for child in self._coordinator:
            child.release()
        self._group = None
        self._coordinator.clear()

    def close(self) -> None:
        """Close the lane; idempotent."""
        self._lane.close()

    def _start_group(self, epoch: int) -> str | None:
        spec = self.spec
        self._group = RankGroup(spec.run_dir, epoch, spec.make_ranks(epoch), self._tee, spec.world_size)
        failure = self._group.start()
        self.pids = {spec.name_of(child.name): child.pid for child in self.children}
        return failure

    def _take_request(self, request: StartGroup | GroupReady | EndGroup) -> None:
        if isinstance(request, GroupReady):
            self.was_ready = True
        elif isinstance(request, StartGroup):
            failure = self._start_group(request.epoch)
            if failure is not None:
                self._end_group(failure)
        elif self._group is not None and self._group.epoch == request.epoch:
            time.sleep(GATHER_S)
            self._end_group(request.cause)
        elif self._last_end is not None and self._last_end.epoch == request.epoch:
            self._lane.send(self._last_end)

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
