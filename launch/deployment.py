"""All processes of one deployment on this host, from configuration to first greeting, and their end.

Checks what can be checked before anything is started, so that a wrong path or an impossible world size costs
no start-up.
"""

from __future__ import annotations

import time
from types import TracebackType

from launch.child import EPOCH, RUN_DIR
from launch.program_end import ProgramEnd
from launch.run_dir import RunDir, request_address, write_config
from launch.supervisor import ChildSpec, Supervisor
from tprt.checkpoint_config import read_checkpoint_config, resolve_max_model_len
from tprt.config import Config
from tprt.errors import EngineDeadError
from tprt.messages import EngineReady
from tprt.server.engine_client import EngineClient
from tprt.server.tokenizer import Tokenizer
from tprt.sharding import make_shard_plan, shape_of
from tprt.transport.zmq_socket import RequestClient

# Between two looks at whether a process has failed.
_LOOK_S = 0.1
# A coordinator that gives up ends at once, and the supervisor then names the cause.
_CAUSE_S = 2.0
# A coordinator answers between two steps, and says so itself when a step takes too long; it is asked now and
# then whether it still does, and has this much longer than a step.
_PULSE_S = 5.0
_PULSE_GRACE_S = 2.0
_FIRST_EPOCH = 0


class Deployment:
    """A coordinator and its workers on this host."""

    def __init__(self, config: Config) -> None:
        """Check `config` against the checkpoint; nothing is started yet.

        Raises:
            CheckpointError, ConfigError, ShardPlanError: what is wrong, before any process runs.
        """
        checkpoint = read_checkpoint_config(config.model.path)
        resolve_max_model_len(checkpoint, config.model.max_model_len)
        parallel = config.parallel
        make_shard_plan(shape_of(checkpoint), parallel.tensor_parallel_size, parallel.rank_weights)
        self.config = config
        self.ready: EngineReady | None = None
        self._asked_s: float | None = None
        self._last_asked_s = -_PULSE_S
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
        world_size = self.config.parallel.tensor_parallel_size
        common = {RUN_DIR: str(self._run_dir.path), EPOCH: str(_FIRST_EPOCH)}
        specs = [ChildSpec("coordinator", "launch.coordinator_entry", common)]
        for rank in range(world_size):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
            # All ranks are on this host, so gloo needs no interface but the loopback.
            env = common | {key: str(value) for key, value in place.items()} | {"GLOO_SOCKET_IFNAME": "lo"}
            specs.append(ChildSpec(f"rank {rank}", "launch.worker_entry", env))
        self._supervisor.start(specs)

    def connect(self, tokenizer: Tokenizer | None) -> EngineClient:
        """Return a client of this deployment's coordinator."""
        return EngineClient(RequestClient.connect(request_address(self._run_dir.path)), tokenizer)

    def wait_until_ready(self, client: EngineClient) -> EngineReady:
        """Wait until all ranks are loaded.

        Raises:
            EngineDeadError: a process failed, or the start took longer than `supervision.startup_timeout_s`.
        """
        timeout_s = self.config.supervision.startup_timeout_s
        deadline_s = time.monotonic() + timeout_s
        client.hello()
        while self.ready is None:
            self.raise_if_failed()
            if time.monotonic() > deadline_s:
                raise EngineDeadError(
                    f"the ranks were not ready after {timeout_s} s (supervision.startup_timeout_s)"
                )
            self.ready = client.poll(_LOOK_S)
        return self.ready

    def poll(self, client: EngineClient) -> None:
        """Take in what has come for `client`, and notice a failure.

        Raises:
            EngineDeadError: a process failed, or the coordinator is stuck.
        """
        try:
            answered = client.poll(_LOOK_S) is not None
        except EngineDeadError:
            # The supervisor knows more: it has seen how each process ended.
            self._supervisor.wait_for_failure(_CAUSE_S)
            self.raise_if_failed()
            raise
        self.raise_if_failed()
        self._feel_pulse(client, answered)

    def _feel_pulse(self, client: EngineClient, answered: bool) -> None:
        """Ask the coordinator now and then for a sign of life, and raise when none comes."""
        now_s = time.monotonic()
        if answered:
            self._asked_s = None
        limit_s = self.config.supervision.step_timeout_s + _PULSE_GRACE_S
        if self._asked_s is not None and now_s - self._asked_s > limit_s:
            raise EngineDeadError(
                f"coordinator (pid {self.pids['coordinator']}) is there but has not answered for {limit_s:g} s"
                " (supervision.step_timeout_s and a little more): it is stopped or stuck"
            )
        if self._asked_s is None and now_s - self._last_asked_s >= _PULSE_S:
            self._asked_s = self._last_asked_s = now_s
            client.hello()

    def raise_if_failed(self) -> None:
        """Raise the first cause if a process has failed."""
        self._supervisor.raise_if_failed()

    def stop(self) -> None:
        """End all processes and remove the run directory; idempotent.

        Processes that serve have `supervision.shutdown_grace_s` to end by themselves when they have been asked
        to; those that still load have nothing to end in order.
        """
        self._end(0.0 if self.ready is None else self.config.supervision.shutdown_grace_s)

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
