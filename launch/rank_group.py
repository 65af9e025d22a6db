"""The processes of one epoch on this host: started together, ended together, and what their deaths say.

Ranks that torchrun has started are told to begin, and end with the others, since they lose the coordinator.
Knows nothing of who decides that there is another epoch.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.child_log import LogTee
from launch.child_process import ChildProcess, ChildSpec
from launch.failure import Death, forget_failures, read_failure
from launch.run_dir import epoch_dir, heartbeats_path, stack_path
from launch.torchrun.adoption import adopt
from tprt.errors import TransportError
from tprt.transport.heartbeat import HeartbeatReader, Phase, RankBeat, announce_process
from tprt.transport.heartbeat_file import create_heartbeats
from tprt.transport.peer_process import is_gone

# Signals on which a process shows its stacks before it dies.
_CRASHES = {-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS, -signal.SIGFPE, -signal.SIGILL}
_MAX_STACK_CHARS = 20_000
_LOOK_S = 0.2


class RankGroup:
    """The processes that live and die with one epoch; `world_size` counts the ranks of all hosts."""

    def __init__(
        self, run_dir: Path, epoch: int, specs: Sequence[ChildSpec], tee: LogTee, world_size: int
    ) -> None:
        self.epoch = epoch
        self.children: list[ChildProcess] = []
        self._run_dir = run_dir
        self._specs = specs
        self._tee = tee
        self._world_size = world_size
        self._adopted = {spec.rank for spec in specs if spec.is_adopted}
        self._oom_kills_before = _count_oom_kills()

    def start(self) -> str | None:
        """Start all ranks; return None, or why one could not be started."""
        names = [spec.name for spec in self._specs]
        forget_failures(self._run_dir, names)
        for name in names:
            stack_path(self._run_dir, name).unlink(missing_ok=True)
        try:
            create_heartbeats(heartbeats_path(self._run_dir, self.epoch), self._world_size)
            epoch_dir(self._run_dir, self.epoch).mkdir(mode=0o700, exist_ok=True)
            for spec in self._specs:
                if spec.is_adopted:
                    adopt(self._run_dir, spec)
                    continue
                failure = start_child(self.children, spec, self._tee)
                if failure is not None:
                    return failure
                if spec.rank is not None:
                    path = heartbeats_path(self._run_dir, self.epoch)
                    announce_process(path, spec.rank, self.children[-1].pid, self.epoch)
        except (TransportError, OSError) as error:
            return f"the ranks could not be started: {error}"
        return None

    def deaths(self) -> list[Death]:
        """Return what there is to say of processes that have ended, or are about to, as their records say."""
        beats = self._beats()
        is_out_of_memory = _count_oom_kills() > self._oom_kills_before
        children = [
            Death(
                child.name,
                child.pid,
                child.exit_code,
                record,
                beats[child.rank].phase.words if beats and child.rank is not None else "",
                beats[child.rank].step if beats and child.rank is not None else -1,
                tuple(child.log.last_lines()),
                crash_stack(self._run_dir, child),
                is_out_of_memory,
            )
            for child in self.children
            if (record := read_failure(self._run_dir, child.name)) is not None or child.exit_code is not None
        ]
        return children + self._deaths_of_adopted(beats)

    @property
    def look_s(self) -> float:
        """Seconds between two looks at adopted ranks, whose end no descriptor tells."""
        return _LOOK_S if self._adopted else float("inf")

    def has_lost_adopted(self) -> bool:
        """Tell whether one of them has ended, or is about to."""
        return bool(self._adopted and self._deaths_of_adopted(self._beats()))

    def _deaths_of_adopted(self, beats: Sequence[RankBeat]) -> list[Death]:
        return [
            Death(f"rank {beat.rank}", beat.pid, None, record, beat.phase.words, beat.step)
            for beat in beats
            if beat.rank in self._adopted
            if (record := read_failure(self._run_dir, f"rank {beat.rank}")) is not None
            or (beat.pid and is_gone(beat.state) and beat.phase != Phase.SHUTDOWN)
        ]

    def end(self) -> None:
        """Kill every process, wait until they are gone, and remove what they have left."""
        for child in self.children:
            child.kill()
        for child in self.children:
            child.release()
        shutil.rmtree(epoch_dir(self._run_dir, self.epoch), ignore_errors=True)
        heartbeats_path(self._run_dir, self.epoch).unlink(missing_ok=True)

    def _beats(self) -> list[RankBeat]:
        with contextlib.suppress(TransportError):
            reader = HeartbeatReader.open(heartbeats_path(self._run_dir, self.epoch))
            try:
                return reader.read()
            finally:
                reader.close()
        return []


def crash_stack(run_dir: Path, child: ChildProcess) -> str:
    """Return the Python stacks that a child has left if it has crashed."""
    if child.exit_code not in _CRASHES:
        return ""
    try:
        return stack_path(run_dir, child.name).read_text("utf-8", "replace")[-_MAX_STACK_CHARS:]
    except OSError:
        return ""


def death_of(run_dir: Path, child: ChildProcess) -> Death:
    """Return what there is to say of the end of a child that is no rank."""
    record = read_failure(run_dir, child.name)
    log, stack = tuple(child.log.last_lines()), crash_stack(run_dir, child)
    return Death(child.name, child.pid, child.exit_code, record, log=log, stack=stack)


def start_child(children: list[ChildProcess], spec: ChildSpec, tee: LogTee) -> str | None:
    """Add a new child to `children`; return None, or why it could not be started."""
    try:
        children.append(ChildProcess.start(spec, tee))
    except OSError as error:
        return f"{spec.name} could not be started with {sys.executable}: {error}"
    return None


def _count_oom_kills() -> int:
    """Return how many processes the kernel has ever killed for want of memory; 0 where it does not tell."""
    try:
        words = Path("/proc/vmstat").read_text(encoding="ascii").split()
        return int(words[words.index("oom_kill") + 1])
    except (OSError, ValueError):
        return 0
