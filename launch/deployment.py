"""All processes of one deployment on this host, from configuration to first greeting, and their end.

Checks what can be checked before anything is started, so that a wrong path or an impossible world size costs
no start-up.
"""

from __future__ import annotations

import time
from types import TracebackType

from launch.child import EPOCH
from launch.child_process import ChildSpec
from launch.coordinator_pulse import CoordinatorPulse
from launch.load_progress import LoadProgress
from launch.parent_death import RUN_DIR
from launch.program_end import ProgramEnd
from launch.rank_weights import resolve_rank_weights
from launch.run_dir import RunDir, newest_heartbeats, request_address, write_config
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
# The coordinator gives up first, since it can name the ranks that are late.
_STARTUP_GRACE_S = 5.0


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
        self.ready: EngineReady | None = None
        self._pulse: CoordinatorPulse | None = None
        self._run_dir = RunDir.create()
        self._supervisor = Supervisor(self._run_dir.path)
        self._program_end = ProgramEnd(self.kill)
        self._program_end.guard()

    @property
    def pids(self) -> dict[str, int]:
        """Process ids by name: `coordinator`, `rank 0`, ..."""
        return self._supervisor.pids

    def start(self) -> None:
        """Start the coordinator and every rank; returns at once."""
        write_config(self._run_dir.path, self.config)
        env = {RUN_DIR: str(self._run_dir.path)}
        self._supervisor.start(ChildSpec("coordinator", "launch.coordinator_entry", env), self._make_ranks)
        self._pulse = CoordinatorPulse(self.pids["coordinator"], self.config.supervision)

    def _make_ranks(self, epoch: int) -> list[ChildSpec]:
        """Return the rank processes of `epoch`."""
        world_size = self.config.parallel.tensor_parallel_size
        # All ranks are on this host, so gloo needs no interface but the loopback.
        common = {RUN_DIR: str(self._run_dir.path), EPOCH: str(epoch), "GLOO_SOCKET_IFNAME": "lo"}
        specs = []
        for rank in range(world_size):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
            env = common | {key: str(value) for key, value in place.items()}
            specs.append(ChildSpec(f"rank {rank}", "launch.worker_entry", env))
        return specs

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
        with LoadProgress(self.config.logging, self.open_heartbeats) as progress:
            while self.ready is None:
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
        self._program_end.release()

    def __enter__(self) -> Deployment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
