"""An `AsyncEngine` over a lane whose other side the test plays."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tprt.config import Config
from tprt.messages import EngineReady, EngineStats, FinishReason, Message, RequestOutput, SamplingParams
from tprt.server.async_engine import AsyncEngine
from tprt.server.tokenizer import Tokenizer
from tprt.transport.channel import Buffer
from tprt.transport.codec import decode, encode

READY = EngineReady(epoch=0, world_size=2, num_blocks=10, block_size=16, max_model_len=100)


def stats(**changed: object) -> EngineStats:
    """Return stats of an engine that serves and has done nothing, but for what is given."""
    idle = EngineStats(0, True, 0, 0, 0.0, 10, 10, 0, 0, 0, 0, 0, 0.0)
    return replace(idle, **changed)  # type: ignore[arg-type]


class EdgeLane:
    """A lane that signals as ZeroMQ does: once for what comes, whether or not anyone looks, and never again."""

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self.loss: str | None = None
        self.closed = False
        self._coming: deque[bytes] = deque()
        self._signal, self._signalled = os.pipe()
        os.set_blocking(self._signal, False)

    def send(self, parts: Sequence[Buffer]) -> None:
        self.sent.append(decode(b"".join(parts)))
        self._take_signal()

    def receive(self, timeout_s: float) -> bytes | None:
        self._take_signal()
        return self._coming.popleft() if self._coming else None

    def filenos(self) -> tuple[int, ...]:
        return (self._signal,)

    def close(self, flush: bool = True) -> None:
        if not self.closed:
            os.close(self._signal)
            os.close(self._signalled)
        self.closed = True

    def bring(self, message: Message, signal: bool = True) -> None:
        self._coming.append(b"".join(encode(message)))
        if signal:
            os.write(self._signalled, b"x")

    def lose(self) -> None:
        self.loss = "the server has closed the connection"
        os.write(self._signalled, b"x")

    def sent_of(self, kind: type[Message]) -> list[Message]:
        return [message for message in self.sent if isinstance(message, kind)]

    def _take_signal(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._signal, 4096)


class Meter:
    """Counts as a `RequestMeter` of all requests."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.num_tokens = 0
        self.ends: list[str] = []
        self.stats: list[EngineStats] = []
        self.stats_of: dict[int, EngineStats] = {}

    def begin(self, replica: int, num_prompt_tokens: int, sampling: SamplingParams) -> Meter:
        self.begun.append(num_prompt_tokens)
        return self

    def on_tokens(self, count: int) -> None:
        self.num_tokens += count

    def on_end(self, reason: str) -> None:
        self.ends.append(reason)

    def set_engine(self, replica: int, stats: EngineStats) -> None:
        self.stats.append(stats)
        self.stats_of[replica] = stats


def make_engine(
    lane: EdgeLane | list[EdgeLane], meter: Meter, tokenizer: Tokenizer | None = None, **settings: object
) -> AsyncEngine:
    """Return an engine that is not started, with a lane to each replica.

    `settings` are those of the sections, as `server__max_...`.
    """
    sections: dict[str, dict[str, object]] = {"model": {"path": "/nowhere"}}
    for name, value in settings.items():
        section, _, key = name.partition("__")
        sections.setdefault(section, {})[key] = value
    lanes = lane if isinstance(lane, list) else [lane]
    return AsyncEngine(lanes, tokenizer, Config.model_validate(sections), meter)


def output(*rows: tuple[int, int, FinishReason]) -> RequestOutput:
    ids, tokens, reasons = zip(*rows, strict=True)
    return RequestOutput(
        request_ids=np.array(ids, np.int64),
        token_ids=np.array(tokens, np.int32),
        finish_reasons=np.array(reasons, np.uint8),
        num_cached_tokens=np.full(len(ids), 16, np.int32),
    )
