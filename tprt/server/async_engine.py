"""The engine for tasks of an event loop: requests in, a stream of news for each.

One callback takes in what has come for all streams, as `RoutedClient` does for a program that waits; no task is
made for a token. All of it belongs to the thread of the loop. Ranks that are replaced are a pause. Knows
nothing of HTTP and of how the coordinators were started.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from time import monotonic
from typing import Protocol

from tprt.config import Config
from tprt.errors import EngineBusyError, EngineDeadError, TprtError, TransportError
from tprt.messages import EngineReady, EngineStats, SamplingParams
from tprt.server.admission import Admission
from tprt.server.completion import Completion
from tprt.server.engine_totals import add_up
from tprt.server.replica_router import ReplicaRouter, ReplicaState
from tprt.server.replica_watch import Heartbeats, ReplicaWatch
from tprt.server.request_stream import Delta, RequestMeter, RequestStream
from tprt.server.routed_client import ReplicaLane, RoutedClient
from tprt.server.tokenizer import Tokenizer

__all__ = ["AsyncEngine", "Delta", "EngineMeter", "ReplicaView", "RequestStream"]

_STATS_S = 1.0


class EngineMeter(Protocol):
    """Who counts requests and their tokens."""

    def begin(self, replica: int, num_prompt_tokens: int, sampling: SamplingParams) -> RequestMeter:
        """Take note of a request."""

    def set_engine(self, replica: int, stats: EngineStats) -> None:
        """Take note of how a replica does."""


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """One replica at one moment: whether it can take requests, whether it is well and why, and its stats."""

    state: ReplicaState
    is_well: bool
    reason: str
    stats: EngineStats | None


class AsyncEngine:
    """The requests of one server."""

    def __init__(
        self,
        lanes: Sequence[ReplicaLane],
        tokenizer: Tokenizer | None,
        config: Config,
        meter: EngineMeter,
        heartbeats: Sequence[Heartbeats] = (),
    ) -> None:
        """Assign only; `start` begins.

        Args:
            lanes: the connection to the coordinator of each replica; the engine closes them.
            tokenizer: None where the checkpoint has none.
            config: the deployment.
            meter: counts requests and tokens.
            heartbeats: opens what the ranks of each replica say of themselves; none: nothing does.
        """
        num_replicas = len(lanes)
        router = ReplicaRouter.for_cache(config.cache, num_replicas)
        self._lanes = lanes
        self._client = RoutedClient(lanes, tokenizer, router, self._on_news)
        self._config = config
        self._meter = meter
        self._admission = Admission(
            num_replicas * config.scheduler.max_num_seqs, config.server.max_queued_requests
        )
        self._streams: dict[int, RequestStream] = {}
        self._deadlines: dict[int, asyncio.TimerHandle] = {}
        self._failure: str | None = None
        opens = heartbeats or [lambda: None] * num_replicas
        self._watches = [ReplicaWatch(one, monotonic()) for one in opens]
        self._filenos: list[tuple[int, ...]] = []
        self._tick_timer: asyncio.TimerHandle | None = None
        self._will_look = False
        self._was_greeted = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop

    def start(self) -> None:
        """Begin to take in what comes, in the running loop."""
        self._loop = asyncio.get_running_loop()
        self._filenos = [lane.filenos() for lane in self._lanes]
        for fds in self._filenos:
            for fd in fds:
                self._loop.add_reader(fd, self._take_in)
        self._client.hello()
        self._look_soon()
        self._tick()

    async def wait_until_ready(self) -> None:
        """Return once all ranks of a replica were ready."""
        await self._was_greeted.wait()

    @property
    def ready(self) -> EngineReady | None:
        """What a replica has said of itself, that with the fewest KV blocks; None until one was ready."""
        greetings = [watch.ready for watch in self._watches if watch.ready is not None]
        return min(greetings, key=lambda ready: ready.num_blocks, default=None)

    @property
    def stats(self) -> EngineStats | None:
        """What the replicas have said last of how they do, together; asked once a second."""
        known = [watch.stats for watch in self._watches if watch.stats is not None]
        return add_up(known) if known else None

    @property
    def num_running(self) -> int:
        """Requests that have not ended, those that wait for a place among them."""
        return len(self._streams)

    def running(self) -> list[tuple[str, Completion, float]]:
        """Return the requests that have not ended: name, what there is of each, and its start (monotonic s)."""
        return [(stream.name, stream.completion, stream.started_s) for stream in self._streams.values()]

    def require_places(self, count: int) -> None:
        """Raise `EngineBusyError` if so many requests have no places now, `InvalidRequestError` if never."""
        if not self._admission.has_places(count, self.num_running):
            raise self._busy(f"{self.num_running} requests are in the engine")

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
        self.require_places(1)
        number, completion = self._client.add(prompt_token_ids, sampling)
        meter = self._meter.begin(self._client.replica_of(number), len(prompt_token_ids), sampling)
        stream = RequestStream(request_id, completion, meter, partial(self._abort, number))
        self._streams[number] = stream
        timeout_s = self._config.server.request_timeout_s
        if timeout_s is not None:
            self._deadlines[number] = self._loop.call_later(timeout_s, self._expire, number)
        self._look_soon()
        return stream

    def is_healthy(self) -> tuple[bool, str]:
        """Tell whether the engine makes progress, and why that is said; one replica that does will do."""
        views = self.replicas()
        if len(views) == 1:
            return views[0].is_well, views[0].reason
        unwell = [f"replica {number}: {one.reason}" for number, one in enumerate(views) if not one.is_well]
        if not unwell:
            number = next((n for n, one in enumerate(views) if one.state is not ReplicaState.SERVING), 0)
            return True, views[number].reason
        return len(unwell) < len(views), "; ".join(unwell)

    def replicas(self) -> list[ReplicaView]:
        """Return how each replica does."""
        started_s: list[list[float]] = [[] for _ in self._watches]
        for number, stream in self._streams.items():
            started_s[self._client.replica_of(number)].append(stream.started_s)
        timeout_s = self._config.supervision.stall_timeout_s
        views = []
        for number, (watch, starts) in enumerate(zip(self._watches, started_s, strict=True)):
            is_well, reason = watch.judge(starts, monotonic(), timeout_s)
            views.append(ReplicaView(self._client.state(number), is_well, reason, watch.stats))
        return views

    def abort_all(self) -> None:
        """End every request with what it has; its reader gets that, with finish reason `abort`."""
        for number in list(self._streams):
            self._abort(number)

    def close(self) -> None:
        """End every request and let go of the lane; idempotent. What still reads gets an EngineDeadError."""
        self._die("the server has ended")
        self._client.close()

    def _on_news(self, number: int) -> None:
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
        try:
            greetings = self._client.poll(0.0)
        except (EngineDeadError, TransportError) as error:
            self._die(str(error))
            return
        for number, ready in greetings.items():
            self._watches[number].ready = ready
            self._was_greeted.set()
        now_s = monotonic()
        for number, (watch, engine) in enumerate(zip(self._watches, self._client.engines, strict=True)):
            watch.take_news(engine.num_news, now_s)
            if engine.stats is not None and engine.stats is not watch.stats and not watch.is_dead:
                watch.take_stats(engine.stats, now_s)
                self._take_stats(number, engine.stats)
        for number in self._newly_lost():
            self._forget_replica(number)

    def _newly_lost(self) -> list[int]:
        return [number for number in self._client.losses if not self._watches[number].is_dead]

    def _forget_replica(self, number: int) -> None:
        self._watches[number].end()
        self._stop_listening(number)
        if (stats := self._watches[number].stats) is not None:
            self._meter.set_engine(number, stats)

    def _stop_listening(self, number: int) -> None:
        """Let go of a lane's descriptors: nobody reads what they signal, and they would signal for ever."""
        for fd in self._filenos[number]:
            self._loop.remove_reader(fd)

    def _take_stats(self, number: int, stats: EngineStats) -> None:
        self._meter.set_engine(number, stats)
        # Ranks that took the place of others may have another number of KV blocks.
        ready = self._watches[number].ready
        if ready is not None and stats.is_serving and stats.epoch != ready.epoch:
            self._client.engines[number].hello()

    def _tick(self) -> None:
        """Ask how each replica does, unless it has not answered yet."""
        for number, (watch, engine) in enumerate(zip(self._watches, self._client.engines, strict=True)):
            if watch.ready is not None and watch.asked_s is None and number not in self._client.losses:
                watch.asked_s = monotonic()
                engine.ask_for_stats()
        # Also a net below the lanes' signals, which are edges.
        self._look_soon()
        self._tick_timer = self._loop.call_later(_STATS_S, self._tick)

    def _die(self, cause: str) -> None:
        if self._failure is not None:
            return
        self._failure = cause
        for watch in self._watches:
            watch.end()
        for number in range(len(self._filenos)):
            self._stop_listening(number)
        if self._tick_timer is not None:
            self._tick_timer.cancel()
        error: TprtError = EngineDeadError(cause)
        for number, stream in list(self._streams.items()):
            stream.fail(error)
            self._forget(number, "error")
