"""The life of one rank: load, allocate, announce, then run steps until told to stop.

The edge (`launch.worker_entry`) reads the environment, opens the lanes and the group, and reports what this
raises; `Worker.phase` says where it was.
"""

from __future__ import annotations

import time
from contextlib import nullcontext

import torch

from tprt.checkpoint_config import CheckpointConfig
from tprt.config import Config
from tprt.distributed import TPGroup
from tprt.errors import SequenceGapError, TransportTimeoutError
from tprt.log import get_logger
from tprt.messages import Shutdown, StepInput, WorkerReady
from tprt.transport.channel import WorkerLink
from tprt.transport.codec import decode, encode
from tprt.transport.heartbeat import HeartbeatWriter, Phase
from tprt.weights import LoadExchange
from tprt.worker.model_runner import ModelRunner
from tprt.worker.output_transfer import PendingOutput

_LOG = get_logger(__name__)
# An idle rank sleeps in the kernel; it is woken by a step or by the loss of the coordinator, and looks up
# this often for nothing else.
_IDLE_WAIT_S = 60.0


class Worker:
    """One rank between its lanes and its model."""

    def __init__(
        self, config: Config, link: WorkerLink, epoch: int, beat: HeartbeatWriter | None = None
    ) -> None:
        """Assign only; `beat` is where the rank notes how far it is, for others to see."""
        self._beat = beat or HeartbeatWriter.detached()
        self._config = config
        self._link = link
        self._epoch = epoch
        self._next_step = 0
        self._runner: ModelRunner

    @property
    def phase(self) -> Phase:
        """What this rank is at."""
        return self._beat.phase

    def prepare(
        self,
        checkpoint: CheckpointConfig,
        group: TPGroup,
        device: torch.device,
        exchange: LoadExchange | None = None,
        num_sharers: int = 1,
    ) -> None:
        """Load the model, allocate KV blocks and tell the coordinator that this rank is ready.

        `exchange` joins the ranks of this host while they load; it is closed afterwards. `num_sharers` ranks
        are on `device`, this one included.
        """
        started_s = time.monotonic()
        group.observer = self._beat
        self._beat.set_phase(Phase.LOAD)
        self._runner = ModelRunner(self._config, checkpoint, group, device, num_sharers)
        with exchange or nullcontext():
            weight_bytes = self._runner.load(exchange, self._beat.on_progress)
        load_s = time.monotonic() - started_s
        self._beat.set_phase(Phase.KV_ALLOCATION)
        num_blocks, kv_bytes = self._runner.allocate_kv_blocks()
        # Whoever hears that this rank is ready may look where it is.
        self._beat.set_phase(Phase.IDLE)
        ready = WorkerReady(self._epoch, group.rank, num_blocks, weight_bytes, kv_bytes, load_s)
        self._link.send_control(b"".join(encode(ready)), self._config.supervision.step_timeout_s)
        _LOG.info(
            "loaded %.1f MiB of weights in %.1f s; %d KV blocks, %.1f MiB",
            *(weight_bytes / 2**20, load_s, num_blocks, kv_bytes / 2**20),
        )

    def run(self) -> None:
        """Run steps until `Shutdown` comes.

        While a device runs one step, the next is begun if it is there already.

        Raises:
            SequenceGapError: a step is missing or came twice.
            PeerLostError: the coordinator is gone.
        """
        pending: PendingOutput | None = None
        while True:
            if pending is not None and pending.is_there():
                self._answer(pending)
                pending = None
            if pending is None:
                self._beat.set_phase(Phase.IDLE)
            message = self._next_message(waits=pending is None)
            if message is None:
                continue
            if isinstance(message, Shutdown):
                self._beat.set_phase(Phase.SHUTDOWN)
                return
            if message.epoch == self._epoch:
                launched = self._launch(message)
                if pending is not None:
                    self._answer(pending)
                pending = launched

    def _next_message(self, waits: bool) -> StepInput | Shutdown | None:
        """Return the next message; None when there is none and this rank does not wait for one."""
        payload = self._link.steps.try_receive()
        while payload is None and waits:
            try:
                payload = self._link.steps.receive(_IDLE_WAIT_S)
            except TransportTimeoutError:
                continue
        message = None if payload is None else decode(payload)
        if not isinstance(message, StepInput | Shutdown | None):
            raise TypeError(f"a worker received {type(message).__name__}; expected StepInput or Shutdown")
        return message

    def _launch(self, step: StepInput) -> PendingOutput:
        if step.step != self._next_step:
            raise SequenceGapError(f"received step {step.step}; expected step {self._next_step}")
        self._next_step += 1
        is_decode = step.num_decodes == len(step.query_lens)
        self._beat.begin_step(step.step, Phase.DECODE if is_decode else Phase.PREFILL)
        return self._runner.launch(step)

    def _answer(self, pending: PendingOutput) -> None:
        """Rank 0 answers for all; the others have the same tokens."""
        output = pending.wait()
        if self._link.outputs is not None:
            self._link.outputs.send(encode(output), self._config.supervision.step_timeout_s)
