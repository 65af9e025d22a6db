"""All processes of one deployment on this host, from configuration to first greetings, and their end.

Checks what can be checked before anything is started, so that a wrong path or an impossible world size costs
no start-up.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping, Sequence
from functools import partial
from types import TracebackType

from launch.child import API_KEYS, EPOCH, LISTENER_FD, MEETING
from launch.child_process import ChildSpec
from launch.coordinator_pulse import CoordinatorPulse
from launch.load_progress import LoadProgress
from launch.log_dir import make_log_dir, sink_of
from launch.multihost.head import Head, open_head
from launch.parent_death import RUN_DIR
from launch.program_end import ProgramEnd
from launch.rank_specs import LOOPBACK, make_rank_specs
from launch.replica_processes import ReplicaSpec
from launch.replica_pulses import ReplicaPulses
from launch.replicas import Replica, share_out
from launch.run_dir import RunDir, newest_heartbeats, request_address, write_config
from launch.serving.record import read_server
from launch.supervisor import Supervisor
from launch.torchrun.end import explain_signal, put_off_end
from tprt.checkpoint_config import read_checkpoint_config, resolve_max_model_len
from tprt.config import Config
from tprt.errors import EngineDeadError
from tprt.messages import EngineReady
from tprt.server.replica_router import ReplicaRouter
from tprt.server.routed_client import RoutedClient
from tprt.server.tokenizer import Tokenizer
from tprt.sharding import make_shard_plan, shape_of
from tprt.transport.heartbeat import HeartbeatReader
from tprt.transport.zmq_socket import RequestClient

# Between two looks at whether a process has failed.
_LOOK_S = 0.1
# A coordinator that gives up ends at once, and the supervisor then names the cause.
_CAUSE_S = 2.0
# The coordinator gives up first, since it can name the ranks that are late.
_STARTUP_GRACE_S = 5.0
# The server ends what has not finished in time, and then itself.
_DRAIN_GRACE_S = 5.0


class Deployment:
    """Its replicas on this host, each a coordinator and its workers.

    Attributes:
        config: its settings; `parallel.rank_weights` are those of the first replica.
        ready: what the replicas have said of themselves, that with the fewest KV blocks; None until all have.
    """

    def __init__(self, config: Config) -> None:
        """Check `config` against the checkpoint and this host; nothing is started yet.

        Raises:
            CheckpointError, ConfigError, ShardPlanError: what is wrong, before any process runs.
        """
        checkpoint = read_checkpoint_config(config.model.path)
        resolve_max_model_len(checkpoint, config.model.max_model_len)
        # Ranks that torchrun has started again are no longer those of epoch 0.
        self._first_epoch = int(os.environ.pop(EPOCH, "0"))
        self._run_dir = RunDir.create(name=os.environ.pop(MEETING, None))
        self._head: Head | None = None
        try:
            self._replicas = share_out(config, self._run_dir.path)
            self.config = config = self._replicas[0].config
            for replica in self._replicas:
                parallel = replica.config.parallel
                make_shard_plan(shape_of(checkpoint), parallel.tensor_parallel_size, parallel.rank_weights)
            self._head = open_head(config)
        except BaseException:
            self._run_dir.remove()
            raise
        self.ready: EngineReady | None = None
        self._greetings: dict[int, EngineReady] = {}
        self._pulses: ReplicaPulses | None = None
        self._supervisor = Supervisor(self._run_dir.path, config.supervision)
        self._program_end = ProgramEnd(self.kill)
        self._program_end.guard()

    @property
    def pids(self) -> dict[str, int]:
        """Process ids by name: `coordinator`, `server`, `rank 0`; with several replicas `replica 1 rank 0`."""
        return self._supervisor.pids

    def start(self, listener: socket.socket | None = None, api_keys: Sequence[str] = ()) -> None:
        """Start the coordinators, every rank, and a server where there is a `listener`; returns at once.

        Args:
            listener: the socket that the server serves; stays the caller's, who keeps it open.
            api_keys: any of them opens the server.
        """
        make_log_dir(self.config.logging)
        write_config(self._run_dir.path, self.config)
        server = None if listener is None else self._make_server(listener.fileno(), api_keys)
        specs = [self._specify(replica) for replica in self._replicas]
        self._supervisor.start(specs, server)
        pids = self.pids
        pulses = {
            number: CoordinatorPulse(pids[spec.name_of("coordinator")], self.config.supervision)
            for number, spec in enumerate(specs)
        }
        self._pulses = ReplicaPulses(pulses, self._supervisor.give_up)

    def _specify(self, replica: Replica) -> ReplicaSpec:
        """Return what to start of a replica, and leave there what its processes read."""
        logging, world_size = replica.config.logging, replica.config.parallel.tensor_parallel_size
        if replica.name:
            replica.run_dir.mkdir(mode=0o700)
            write_config(replica.run_dir, replica.config)
        env, sink = {EPOCH: str(self._first_epoch)}, sink_of("coordinator", logging)
        coordinator = replica.equip(ChildSpec("coordinator", "launch.coordinator_entry", env, sink=sink))
        if self._head is not None:
            self._head.announce()
            coordinator = self._head.equip_coordinator(coordinator)
        make_ranks = partial(self._make_ranks, replica)
        return ReplicaSpec(
            replica.run_dir, coordinator, make_ranks, world_size, replica.name, self._first_epoch
        )

    def _make_server(self, fd: int, api_keys: Sequence[str]) -> ChildSpec:
        env = {RUN_DIR: str(self._run_dir.path), LISTENER_FD: str(fd), API_KEYS: " ".join(api_keys)}
        sink = sink_of("server", self.config.logging)
        return ChildSpec("server", "launch.serving.entry", env, (fd,), sink)

    def wait_for_server(self, client: RoutedClient) -> None:
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

    def drain_server(self, client: RoutedClient) -> None:
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

    def _make_ranks(self, replica: Replica, epoch: int) -> list[ChildSpec]:
        """Return the processes of `epoch` on this host."""
        run_dir = replica.run_dir
        if self._head is None:
            # All ranks are on this host, so gloo needs no interface but the loopback.
            specs = make_rank_specs(replica.config, run_dir, epoch, LOOPBACK)
            return [replica.equip(spec) for spec in specs]
        specs = make_rank_specs(replica.config, run_dir, epoch, self._head.interface)
        return self._head.equip_group(specs, run_dir, epoch)

    def connect(self, tokenizer: Tokenizer | None) -> RoutedClient:
        """Return a client of this deployment's coordinators."""
        router = ReplicaRouter.for_cache(self.config.cache, len(self._replicas))
        lanes = [RequestClient.connect(request_address(replica.run_dir)) for replica in self._replicas]
        return RoutedClient(lanes, tokenizer, router)

    def open_heartbeats(self, number: int = 0) -> HeartbeatReader | None:
        """Return what the ranks of a replica's newest epoch note of themselves; None before there are any."""
        path = newest_heartbeats(self._replicas[number].run_dir)
        return None if path is None else HeartbeatReader.open(path)

    def wait_until_ready(self, client: RoutedClient) -> EngineReady:
        """Wait until all ranks are loaded.

        Raises:
            EngineDeadError: a process failed, or the start took longer than `supervision.startup_timeout_s`.
        """
        timeout_s = self.config.supervision.startup_timeout_s
        deadline_s = time.monotonic() + timeout_s + _STARTUP_GRACE_S
        client.hello()
        openers = [partial(self.open_heartbeats, number) for number in range(len(self._replicas))]
        with LoadProgress(self.config.logging, openers) as progress, put_off_end(self._run_dir.path) as end:
            while self.ready is None:
                if end is not None and end.is_asked:
                    self.explain_signal()
                    end.catch_up()
                self.raise_if_failed()
                if self._pulses is not None:
                    self._pulses.raise_if_stopped()
                if time.monotonic() > deadline_s:
                    raise EngineDeadError(
                        f"the ranks were not ready after {timeout_s} s (supervision.startup_timeout_s)"
                    )
                self.look_for_greetings(client)
                progress.update()
        return self.ready

    def look_for_greetings(self, client: RoutedClient, timeout_s: float = _LOOK_S) -> None:
        """Take in what comes for `client` in `timeout_s`; sets `ready` once every replica has said hello.

        Raises:
            EngineDeadError: a process failed.
        """
        self._greetings |= self._poll_client(client, timeout_s)
        if len(self._greetings) == len(self._replicas):
            self.ready = min(self._greetings.values(), key=lambda ready: ready.num_blocks)

    def poll(self, client: RoutedClient) -> None:
        """Take in what has come for `client`, and notice a failure.

        Raises:
            EngineDeadError: a process failed, or the coordinator is stuck.
        """
        answered = self._poll_client(client)
        self.raise_if_failed()
        if self._pulses is not None:
            self._pulses.forget(self._supervisor.lost_replicas)
            self._pulses.feel(answered, lambda number: client.engines[number].hello())

    def _poll_client(self, client: RoutedClient, timeout_s: float = _LOOK_S) -> Mapping[int, EngineReady]:
        try:
            return client.poll(timeout_s)
        except EngineDeadError:
            # The supervisor knows more: it has seen how each process ended.
            self._supervisor.wait_for_failure(_CAUSE_S)
            self.raise_if_failed()
            raise

    @property
    def has_failed(self) -> bool:
        """Tell whether the deployment has failed: nobody is left, or will answer, to end it in order."""
        return self._supervisor.has_failed or (self._pulses is not None and self._pulses.is_stuck)

    def raise_if_failed(self) -> None:
        """Raise the first cause if a process has failed."""
        self._supervisor.raise_if_failed()

    def explain_signal(self) -> None:
        """Raise the first cause if torchrun has asked this program to end because of a failure."""
        explain_signal(self._run_dir.path, self._supervisor)

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
