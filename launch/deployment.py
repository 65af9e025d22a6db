"""All processes of one deployment on this host, from configuration to first greeting, and their end.

Checks what can be checked before anything is started, so that a wrong path or an impossible world size costs
no start-up.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType

from launch.child import API_KEYS, EPOCH, LISTENER_FD, MEETING
from launch.child_process import ChildSpec
from launch.coordinator_pulse import CoordinatorPulse
from launch.load_progress import LoadProgress
from launch.log_dir import make_log_dir, sink_of
from launch.multihost.head import open_head
from launch.parent_death import RUN_DIR
from launch.planning.rank_weights import resolve_rank_weights
from launch.program_end import ProgramEnd, PutOffEnd
from launch.rank_specs import LOOPBACK, make_rank_specs
from launch.run_dir import RunDir, adopts_ranks, newest_heartbeats, request_address, write_config
from launch.serving.record import read_server
from launch.supervisor import Supervisor
from tprt.checkpoint_config import read_checkpoint_config, resolve_max_model_len
from tprt.config import Config
from tprt.errors import EngineDeadError
from tprt.messages import EngineReady
from tprt.server.engine_client import EngineClient
from tprt.server.tokenizer import Tokenizer
from tprt.sharding import make_shard_plan, shape_of
from tprt.transport.heartbeat import HeartbeatReader
from tprt.transport.zmq_socket import RequestClient

# Between two looks at whether a process has failed.
_LOOK_S = 0.1
# A coordinator that gives up ends at once, and the supervisor then names the cause.
_CAUSE_S = 2.0
# A signal that torchrun sends to all ranks has come to all, and what has failed before is explained; it kills
# those that are still there after 30 s.
_SIGNAL_S = 0.3
_EXPLANATION_S = 10.0
# The coordinator gives up first, since it can name the ranks that are late.
_STARTUP_GRACE_S = 5.0
# The server ends what has not finished in time, and then itself.
_DRAIN_GRACE_S = 5.0


class Deployment:
    """A coordinator and its workers on this host."""

    def __init__(self, config: Config) -> None:
        """Check `config` against the checkpoint; nothing is started yet.

        Raises:
            CheckpointError, ConfigError, ShardPlanError: what is wrong, before any process runs.
        """
        config = resolve_rank_weights(config)
        checkpoint = read_checkpoint_config(config.model.path)
        resolve_max_model_len(checkpoint, config.model.max_model_len)
        parallel = config.parallel
        make_shard_plan(shape_of(checkpoint), parallel.tensor_parallel_size, parallel.rank_weights)
        self.config = config
        self._head = open_head(config)
        self.ready: EngineReady | None = None
        self._pulse: CoordinatorPulse | None = None
        self._run_dir = RunDir.create(name=os.environ.pop(MEETING, None))
        # Ranks that torchrun has started again are no longer those of epoch 0.
        self._first_epoch = int(os.environ.pop(EPOCH, "0"))
        self._supervisor = Supervisor(
            self._run_dir.path, config.supervision, parallel.tensor_parallel_size, self._first_epoch
        )
        self._program_end = ProgramEnd(self.kill)
        self._program_end.guard()

    @property
    def pids(self) -> dict[str, int]:
        """Process ids by name: `coordinator`, `server`, `rank 0`, ..."""
        return self._supervisor.pids

    def start(self, listener: socket.socket | None = None, api_keys: Sequence[str] = ()) -> None:
        """Start the coordinator, every rank, and a server where there is a `listener`; returns at once.

        Args:
            listener: the socket that the server serves; stays the caller's, who keeps it open.
            api_keys: any of them opens the server.
        """
        write_config(self._run_dir.path, self.config)
        make_log_dir(self.config.logging)
        env = {RUN_DIR: str(self._run_dir.path), EPOCH: str(self._first_epoch)}
        sink = sink_of("coordinator", self.config.logging)
        coordinator = ChildSpec("coordinator", "launch.coordinator_entry", env, sink=sink)
        if self._head is not None:
            self._head.announce()
            coordinator = self._head.equip_coordinator(coordinator)
        server = None if listener is None else self._make_server(listener.fileno(), api_keys)
        self._supervisor.start(coordinator, self._make_ranks, server)
        self._pulse = CoordinatorPulse(self.pids["coordinator"], self.config.supervision)

    def _make_server(self, fd: int, api_keys: Sequence[str]) -> ChildSpec:
        env = {RUN_DIR: str(self._run_dir.path), LISTENER_FD: str(fd), API_KEYS: " ".join(api_keys)}
        sink = sink_of("server", self.config.logging)
        return ChildSpec("server", "launch.serving.entry", env, (fd,), sink)

    def wait_for_server(self, client: EngineClient) -> None:
        """Wait until the server serves as well, once the ranks are ready.

        Raises:
            EngineDeadError: a process failed, or it takes longer than `supervision.startup_timeout_s`.
        """
        timeout_s = self.config.supervision.startup_timeout_s
        deadline_s = time.monotonic() + timeout_s
        while (record := read_server(self._run_dir.path)) is None or not record.is_ready:
            self.poll(client)
            if time.monotonic() > deadline_s:
                raise EngineDeadError(
                    f"server (pid {self.pids['server']}) did not serve within {timeout_s:g} s after the ranks"
                    " were ready (supervision.startup_timeout_s)"
                )

    def drain_server(self, client: EngineClient) -> None:
        """Let the server finish what it serves and end, and wait for that; ranks may be replaced meanwhile.

        Raises:
            EngineDeadError: a process failed, or the server has not ended as it should.
        """
        server, timeout_s = self._supervisor.server, self.config.server.drain_timeout_s + _DRAIN_GRACE_S
        assert server is not None
        server.ask_to_end()
        deadline_s = time.monotonic() + timeout_s
        while not server.has_ended:
            self.poll(client)
            if time.monotonic() > deadline_s:
                raise EngineDeadError(f"server (pid {self.pids['server']}) has not drained in {timeout_s:g} s")
        server.raise_if_cut_short()

    def _make_ranks(self, epoch: int) -> list[ChildSpec]:
        """Return the processes of `epoch` on this host."""
        run_dir = self._run_dir.path
        if self._head is None:
            # All ranks are on this host, so gloo needs no interface but the loopback.
            return make_rank_specs(self.config, run_dir, epoch, LOOPBACK)
        specs = make_rank_specs(self.config, run_dir, epoch, self._head.interface)
        return self._head.equip_group(specs, run_dir, epoch)

    def connect(self, tokenizer: Tokenizer | None) -> EngineClient:
        """Return a client of this deployment's coordinator."""
        return EngineClient(RequestClient.connect(request_address(self._run_dir.path)), tokenizer)

    def open_heartbeats(self) -> HeartbeatReader | None:
        """Return what the ranks of the newest epoch note of themselves; None before there are any."""
        path = newest_heartbeats(self._run_dir.path)
        return None if path is None else HeartbeatReader.open(path)

    def wait_until_ready(self, client: EngineClient) -> EngineReady:
        """Wait until all ranks are loaded.

        Raises:
            EngineDeadError: a process failed, or the start took longer than `supervision.startup_timeout_s`.
        """
        timeout_s = self.config.supervision.startup_timeout_s
        deadline_s = time.monotonic() + timeout_s + _STARTUP_GRACE_S
        client.hello()
        with LoadProgress(self.config.logging, self.open_heartbeats) as progress, self._put_off_end() as end:
            while self.ready is None:
                if end is not None and end.is_asked:
                    self.explain_signal()
                    end.catch_up()
                self.raise_if_failed()
                if self._pulse is not None:
                    self._pulse.raise_if_stopped()
                if time.monotonic() > deadline_s:
                    raise EngineDeadError(
                        f"the ranks were not ready after {timeout_s} s (supervision.startup_timeout_s)"
                    )
                self.ready = self._poll_client(client)
                progress.update()
        return self.ready

    def poll(self, client: EngineClient) -> None:
        """Take in what has come for `client`, and notice a failure.

        Raises:
            EngineDeadError: a process failed, or the coordinator is stuck.
        """
        answered = self._poll_client(client) is not None
        self.raise_if_failed()
        if self._pulse is not None:
            self._pulse.feel(answered, client.hello)

    def _poll_client(self, client: EngineClient) -> EngineReady | None:
        try:
            return client.poll(_LOOK_S)
        except EngineDeadError:
            # The supervisor knows more: it has seen how each process ended.
            self._supervisor.wait_for_failure(_CAUSE_S)
            self.raise_if_failed()
            raise

    @property
    def has_failed(self) -> bool:
        """Tell whether the deployment has failed: nobody is left, or will answer, to end it in order."""
        return self._supervisor.has_failed or (self._pulse is not None and self._pulse.is_stuck)

    def raise_if_failed(self) -> None:
        """Raise the first cause if a process has failed."""
        self._supervisor.raise_if_failed()

    def _put_off_end(self) -> AbstractContextManager[PutOffEnd | None]:
        """Return what puts a signal off where there may be something to say before it."""
        return PutOffEnd() if adopts_ranks(self._run_dir.path) else nullcontext()

    def explain_signal(self) -> None:
        """Raise the first cause if torchrun has asked this program to end because of a failure.

        It does so as soon as one of the ranks that it has started is gone, and before that is understood here.
        """
        if adopts_ranks(self._run_dir.path):
            self._supervisor.wait_for_failure(_SIGNAL_S)
            if self._supervisor.has_lost_ranks:
                self._supervisor.wait_for_failure(_EXPLANATION_S)
            self.raise_if_failed()

    def expect_end(self) -> None:
        """From now on processes that end have been asked to."""
        self._supervisor.expect_end()

    def stop(self) -> None:
        """End all processes and remove the run directory; idempotent.

        Processes that serve have `supervision.shutdown_grace_s` to end by themselves when they have been asked
        to; those that still load have nothing to end in order.
        """
        has_order = self.ready is not None and not self.has_failed
        self._end(self.config.supervision.shutdown_grace_s if has_order else 0.0)

    def kill(self) -> None:
        """End all processes at once and remove the run directory; idempotent."""
        self._end(0.0)

    def _end(self, grace_s: float) -> None:
        self._supervisor.stop(grace_s)
        self._run_dir.remove()
        if self._head is not None:
            self._head.close()
        self._program_end.release()

    def __enter__(self) -> Deployment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
