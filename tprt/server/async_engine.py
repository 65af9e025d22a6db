"""The engine for tasks of an event loop: requests in, a stream of news for each.

One callback takes in what has come for all streams, as `EngineClient` does for a program that waits; no task is
made for a token. All of it belongs to the thread of the loop. Ranks that are replaced are a pause. Knows
nothing of HTTP and of how the coordinator was started.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import Protocol

from tprt.config import Config
from tprt.errors import EngineBusyError, EngineDeadError, TprtError, TransportError
from tprt.messages import EngineReady, EngineStats, SamplingParams
from tprt.server.admission import Admission
from tprt.server.completion import Completion
from tprt.server.engine_client import EngineClient, RequestLane
from tprt.server.engine_health import EngineSigns, judge
from tprt.server.request_stream import Delta, RequestMeter, RequestStream
from tprt.server.tokenizer import Tokenizer
from tprt.transport.heartbeat import HeartbeatReader

__all__ = ["AsyncEngine", "AsyncRequestLane", "Delta", "EngineMeter", "RequestStream"]

_STATS_S = 1.0


class AsyncRequestLane(RequestLane, Protocol):
    """What the engine needs of its connection: see `tprt.transport.zmq_socket.RequestClient`."""

    @property
    def loss(self) -> str | None: ...

    def filenos(self) -> tuple[int, ...]: ...


class EngineMeter(Protocol):
    """Who counts requests and their tokens."""

    def begin(self, num_prompt_tokens: int, sampling: SamplingParams) -> RequestMeter:
        """Take note of a request."""

    def set_engine(self, stats: EngineStats) -> None:
        """Take note of how the engine does."""


def _no_heartbeats() -> HeartbeatReader | None:
    return None


class AsyncEngine:
    """The requests of one server.

    Attributes:
        ready: what the engine has said of itself; None until all ranks were ready for the first time.
    """

    def __init__(
        self,
        lane: AsyncRequestLane,
        tokenizer: Tokenizer | None,
        config: Config,
        meter: EngineMeter,
        heartbeats: Callable[[], HeartbeatReader | None] = _no_heartbeats,
    ) -> None:
        """Assign only; `start` begins.

        Args:
            lane: the connection to the coordinator; the engine closes it.
            tokenizer: None where the checkpoint has none.
            config: the deployment.
            meter: counts requests and tokens.
            heartbeats: opens what the ranks say of themselves.
        """
        self.ready: EngineReady | None = None
        self._lane = lane
        self._client = EngineClient(lane, tokenizer, self._on_news)
        self._config = config
        self._meter = meter
        self._heartbeats = heartbeats
        self._admission = Admission(config.scheduler.max_num_seqs, config.server.max_queued_requests)
        self._streams: dict[int, RequestStream] = {}
        self._deadlines: dict[int, asyncio.TimerHandle] = {}
        self._failure: str | None = None
        self._asked_s: float | None = None
        self._heard_s = self._output_s = monotonic()
        self._num_news = 0
        self._seen_stats: EngineStats | None = None
        self._filenos: tuple[int, ...] = ()
        self._tick_timer: asyncio.TimerHandle | None = None
        self._will_look = False
        self._was_greeted = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop

    def start(self) -> None:
        """Begin to take in what comes, in the running loop."""
        self._loop = asyncio.get_running_loop()
        self._filenos = self._lane.filenos()
        for fd in self._filenos:
            self._loop.add_reader(fd, self._take_in)
        self._client.hello()
        self._look_soon()
        self._tick()

    async def wait_until_ready(self) -> None:
        """Return once all ranks were ready."""
        await self._was_greeted.wait()

    @property
    def stats(self) -> EngineStats | None:
        """What the engine has said last of how it does; asked once a second."""
        return self._seen_stats

    @property
    def num_running(self) -> int:
        """Requests that have not ended, those that wait for a place among them."""
        return len(self._streams)

    def running(self) -> list[tuple[str, Completion, float]]:
        """Return the requests that have not ended: name, what there is of each, and its start (monotonic s)."""
        return [(stream.name, stream.completion, stream.started_s) for stream in self._streams.values()]

    def submit(
        self, prompt_token_ids: list[int], sampling: SamplingParams, request_id: str = ""
    ) -> RequestStream:
        """Send a request; the stream brings what comes of it.

        Raises:
            InvalidRequestError: it can never be served.
            EngineBusyError: as many as `server.max_queued_requests` wait for a place.
            EngineDeadError: the engine has ended; carries the cause.
        """
        if self._failure is not None:
            raise EngineDeadError(self._failure)
        if not self._admission.has_place(self.num_running):
            raise self._busy(f"{self.num_running} requests are in the engine")
        number, completion = self._client.add(prompt_token_ids, sampling)
        meter = self._meter.begin(len(prompt_token_ids), sampling)
        stream = RequestStream(request_id, completion, meter, partial(self._abort, number))
        self._streams[number] = stream
        timeout_s = self._config.server.request_timeout_s
        if timeout_s is not None:
            self._deadlines[number] = self._loop.call_later(timeout_s, self._expire, number)
        self._look_soon()
        return stream

    def is_healthy(self) -> tuple[bool, str]:
        """Tell whether the engine makes progress, and why that is said."""
        waits = [stream.started_s for stream in self._streams.values()]
        waits += [] if self._asked_s is None else [self._asked_s]
        signs = EngineSigns(
            now_s=monotonic(),
            is_dead=self._failure is not None,
            is_ready=self.ready is not None,
            is_replacing=self._seen_stats is not None and not self._seen_stats.is_serving,
            waiting_since_s=min(waits, default=None),
            progress_s=max(self._output_s, self._last_step_s()),
            beat_s=self._last_beat_s() if waits else 0.0,
        )
        return judge(signs, self._config.supervision.stall_timeout_s)

    def abort_all(self) -> None:
        """End every request with what it has; its reader gets that, with finish reason `abort`."""
        for number in list(self._streams):
            self._abort(number)

    def close(self) -> None:
        """End every request and let go of the lane; idempotent. What still reads gets an EngineDeadError."""
        self._die("the server has ended")
        self._lane.close()

    def _on_news(self, number: int) -> None:
        self._num_news += 1
        stream = self._streams.get(number)
        if stream is not None:
            stream.on_news()
            if stream.completion.finished:
                self._forget(number, stream.completion.finish_reason or "error")

    def _forget(self, number: int, reason: str) -> None:
        stream = self._streams.pop(number)
        deadline = self._deadlines.pop(number, None)
        if deadline is not None:
            deadline.cancel()
        self._admission.on_end(monotonic())
        stream.meter.on_end(reason)

    def _abort(self, number: int) -> None:
        """End a request with what it has, unless it has ended."""
        if number in self._streams:
            self._client.abort(number)
            self._on_news(number)
            self._look_soon()

    def _expire(self, number: int) -> None:
        """End a request at its deadline: with what it has, or as one that could not be served."""
        stream = self._streams[number]
        if not stream.completion.token_ids:
            timeout_s = self._config.server.request_timeout_s
            stream.fail(self._busy(f"no token came in {timeout_s:g} s (server.request_timeout_s)"))
        self._abort(number)

    def _busy(self, found: str) -> EngineBusyError:
        retry_s = self._admission.retry_after_s(self.num_running, monotonic())
        return EngineBusyError(f"{found}; try again in {retry_s} s", retry_s)

    def _look_soon(self) -> None:
        """Take in what has come after something was sent: sending may take the lane's signal away."""
        if not self._will_look:
            self._will_look = True
            self._loop.call_soon(self._take_in)

    def _take_in(self) -> None:
        self._will_look = False
        if self._failure is not None:
            return
        num_news = self._num_news
        try:
            ready = self._client.poll(0.0)
        except (EngineDeadError, TransportError) as error:
            self._die(str(error))
            return
        if self._num_news != num_news:
            self._output_s = monotonic()
        if ready is not None:
            self.ready = ready
            self._was_greeted.set()
        if self._client.stats is not self._seen_stats:
            self._take_stats(self._client.stats)
        if self._lane.loss is not None:
            self._die("the coordinator has ended")

    def _take_stats(self, stats: EngineStats | None) -> None:
        assert stats is not None
        self._seen_stats = stats
        self._asked_s = None
        self._heard_s = monotonic()
        self._meter.set_engine(stats)
        # Ranks that took the place of others may have another number of KV blocks.
        if self.ready is not None and stats.is_serving and stats.epoch != self.ready.epoch:
            self._client.hello()

    def _tick(self) -> None:
        """Ask how the engine does, unless it has not answered yet."""
        if self.ready is not None and self._asked_s is None:
            self._asked_s = monotonic()
            self._client.ask_for_stats()
        # Also a net below the lane's signals, which are edges.
        self._look_soon()
        self._tick_timer = self._loop.call_later(_STATS_S, self._tick)

    def _last_step_s(self) -> float:
        """Return when a step has ended last, as far as is known; 0 when none has."""
        stats = self._seen_stats
        if stats is None or not (stats.num_steps or not stats.is_serving):
            return 0.0
        # While new ranks start there are no steps, and the coordinator, which answers, has a deadline for them.
        return self._heard_s - (stats.last_step_s if stats.is_serving else 0.0)

    def _last_beat_s(self) -> float:
        try:
            reader = self._heartbeats()
        except TransportError:
            return 0.0
        if reader is None:
            return 0.0
        last_ns = reader.last_change_ns()
        reader.close()
        return last_ns / 1e9

    def _die(self, cause: str) -> None:
        if self._failure is not None:
            return
        self._failure = cause
        for fd in self._filenos:
            self._loop.remove_reader(fd)
        if self._tick_timer is not None:
            self._tick_timer.cancel()
        error: TprtError = EngineDeadError(cause)
        for number, stream in list(self._streams.items()):
            stream.fail(error)
            self._forget(number, "error")
