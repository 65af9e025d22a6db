"""An engine that costs nothing: speaks the coordinator's request lane, and makes tokens up at a set rate.

Started by scripts/bench_server_overhead.py: `stand_in_coordinator.py ADDRESS VOCAB_SIZE STEPS_PER_S`. Every
step gives each request one token, with one message for all of a client's, as the coordinator does. Knows
nothing of models, ranks and KV blocks.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

# Run as a file, this finds only scripts/ on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tprt.messages import (
    AbortRequest,
    AddRequest,
    EngineReady,
    EngineStats,
    FinishReason,
    GetStats,
    Hello,
    Message,
    RequestOutput,
    Shutdown,
)
from tprt.transport.codec import decode, encode
from tprt.transport.zmq_socket import RequestServer

_NUM_BLOCKS, _BLOCK_SIZE = 100_000, 16
_MAX_MODEL_LEN = 1 << 20
# The first ids of a vocabulary are often marks that end a sequence.
_FIRST_TOKEN = 1000
_IDLE_S = 0.2


class StandIn:
    """One engine; `left` holds how many tokens each request of each client still gets."""

    def __init__(self, server: RequestServer, vocab_size: int, steps_per_s: float) -> None:
        self._server = server
        self._step_s = 1 / steps_per_s
        self._tokens = np.random.default_rng(0).integers(_FIRST_TOKEN, vocab_size, 1 << 16).astype(np.int32)
        self._left: dict[bytes, dict[int, int]] = {}
        self._num_steps = 0
        self._is_over = False

    def run(self) -> None:
        """Serve until a client sends `Shutdown`."""
        next_s = time.monotonic()
        while not self._is_over:
            wait_s = next_s - time.monotonic() if any(self._left.values()) else _IDLE_S
            received = self._server.receive(max(0.0, wait_s))
            if received is not None:
                self._take(received[0], decode(received[1]))
                continue
            # A step that is late is not made up for: a rate, not a burst.
            next_s = max(next_s, time.monotonic() - self._step_s) + self._step_s
            self._step()

    def _take(self, client_id: bytes, message: Message) -> None:
        left = self._left.setdefault(client_id, {})
        if isinstance(message, AddRequest):
            left[message.request_id] = message.sampling.max_tokens
        elif isinstance(message, AbortRequest):
            left.pop(message.request_id, None)
        elif isinstance(message, Hello):
            self._send(client_id, EngineReady(0, 1, _NUM_BLOCKS, _BLOCK_SIZE, _MAX_MODEL_LEN))
        elif isinstance(message, GetStats):
            self._send(client_id, self._stats())
        elif isinstance(message, Shutdown):
            self._is_over = True

    def _step(self) -> None:
        self._num_steps += 1
        for client_id, left in self._left.items():
            if left:
                self._send(client_id, self._output(left))
                for request_id in [request_id for request_id, number in left.items() if number == 1]:
                    del left[request_id]
                for request_id in left:
                    left[request_id] -= 1

    def _output(self, left: dict[int, int]) -> RequestOutput:
        n = len(left)
        at = self._num_steps * 61 % (len(self._tokens) - n)
        ends = np.array([number == 1 for number in left.values()])
        return RequestOutput(
            request_ids=np.array(list(left), np.int64),
            token_ids=self._tokens[at : at + n],
            finish_reasons=np.where(ends, FinishReason.LENGTH, FinishReason.NONE).astype(np.uint8),
            num_cached_tokens=np.zeros(n, np.int32),
        )

    def _stats(self) -> EngineStats:
        num_running = sum(map(len, self._left.values()))
        return EngineStats(
            epoch=0,
            is_serving=True,
            num_running=num_running,
            num_waiting=0,
            oldest_waiting_s=0.0,
            num_free_blocks=_NUM_BLOCKS,
            num_blocks=_NUM_BLOCKS,
            num_preemptions=0,
            num_prompt_tokens=0,
            num_cached_tokens=0,
            num_generated_tokens=0,
            num_steps=self._num_steps,
            last_step_s=0.0,
        )

    def _send(self, client_id: bytes, message: Message) -> None:
        self._server.send(client_id, encode(message))


if __name__ == "__main__":
    lane = RequestServer.bind(sys.argv[1])
    try:
        StandIn(lane, int(sys.argv[2]), float(sys.argv[3])).run()
    finally:
        lane.close()
