"""One rank of `tprt bench step`: `python -m launch.bench.step_worker`, started by the bench.

It receives, decodes and prepares every step as a worker does; instead of a model, the tokens are made up at
once. Ends with `Shutdown`, or when the bench is gone. Knows nothing of how the times are shown.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pydantic import TypeAdapter

from launch.devices import threads_per_rank
from launch.parent_death import die_with_parent
from tprt.errors import PeerLostError, TransportError
from tprt.messages import StepInput, StepOutput, WorkerReady
from tprt.sharding import Range
from tprt.transport.codec import decode, encode
from tprt.transport.link import ShmWorkerLink
from tprt.worker.input_batch import InputBuilder

EPOCH = 0
_WAIT_S = 30.0
# Any token that is not special; what it is does not matter.
_TOKEN_ID = 5


@dataclass(frozen=True, slots=True)
class BenchRank:
    """What one rank must know; travels as JSON in the first argument.

    Attributes:
        folder: where the socket is, and where the times go.
        rank, world_size: its place.
        block_size, num_blocks, max_num_seqs: of the deployment.
        num_threads: CPU threads, or None for its share of the cores.
    """

    folder: str
    rank: int
    world_size: int
    block_size: int
    num_blocks: int
    max_num_seqs: int
    num_threads: int | None

    def to_json(self) -> str:
        """Return what `from_json` reads."""
        return TypeAdapter(BenchRank).dump_json(self).decode()

    @classmethod
    def from_json(cls, text: str) -> BenchRank:
        """Read what `to_json` gave."""
        return TypeAdapter(BenchRank).validate_json(text)


def socket_path(folder: str) -> str:
    """Return where the ranks find the bench."""
    return str(Path(folder) / "ranks.sock")


def times_path(folder: str, rank: int) -> Path:
    """Return the file that a rank leaves: `[steps, 3]` monotonic ns when received, decoded and prepared."""
    return Path(folder) / f"times-{rank}.npy"


def play_rank(place: BenchRank) -> None:
    """Answer steps until told to stop, and leave the times."""
    torch.set_num_threads(place.num_threads or threads_per_rank(place.world_size))
    path = socket_path(place.folder)
    with closing(ShmWorkerLink.connect(path, epoch=EPOCH, rank=place.rank, timeout_s=_WAIT_S)) as link:
        ready = WorkerReady(EPOCH, place.rank, place.num_blocks, weight_bytes=0, kv_bytes=0, load_s=0.0)
        link.send_control(b"".join(encode(ready)), _WAIT_S)
        # No logits, so none of the vocabulary.
        inputs = InputBuilder(place.block_size, place.max_num_seqs, torch.device("cpu"), Range(0, 0))
        times = run_steps(link, inputs)
        np.save(times_path(place.folder, place.rank), np.array(times, np.int64).reshape(-1, 3))


@torch.inference_mode()
def run_steps(link: ShmWorkerLink, inputs: InputBuilder) -> list[tuple[int, int, int]]:
    """Take in steps until `Shutdown`; return when each was received, decoded and prepared."""
    times: list[tuple[int, int, int]] = []
    while True:
        payload = link.steps.receive(_WAIT_S)
        received_ns = time.monotonic_ns()
        step = decode(payload)
        decoded_ns = time.monotonic_ns()
        if not isinstance(step, StepInput):
            return times
        batch = inputs.build(step)
        times.append((received_ns, decoded_ns, time.monotonic_ns()))
        token_ids = torch.full((len(batch.sampled_slots),), _TOKEN_ID)
        inputs.keep_sampled(batch.sampled_slots, token_ids)
        if link.outputs is not None:
            sampled = token_ids.to(torch.int32).cpu().numpy()
            link.outputs.send(encode(StepOutput(step.epoch, step.step, sampled)), _WAIT_S)


def main() -> None:
    """Play the rank in the first argument."""
    die_with_parent()
    # Ctrl-C is for the bench, which ends its ranks.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    place = BenchRank.from_json(sys.argv[1])
    try:
        play_rank(place)
    except PeerLostError:
        # The bench has failed and says why.
        sys.exit(1)
    except TransportError as error:
        sys.exit(f"rank {place.rank} (process {os.getpid()}): {error}")


if __name__ == "__main__":
    main()
