"""How one replica does, as the event loop of its clients sees it.

Asked once a second, and judged by its answers, its news and the heartbeats of its ranks. Knows nothing of lanes
and of requests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from tprt.errors import TransportError
from tprt.messages import EngineReady, EngineStats
from tprt.server.engine_health import EngineSigns, judge
from tprt.transport.heartbeat import HeartbeatReader

Heartbeats = Callable[[], HeartbeatReader | None]


class ReplicaWatch:
    """What is known of one replica; times are seconds of the monotonic clock.

    Attributes:
        ready: what it has said of itself last; None until all its ranks were ready.
        stats: what it has said last of how it does.
        asked_s: when it was asked for `stats`, until it answers.
        is_dead: it has ended.
    """

    def __init__(self, heartbeats: Heartbeats, now_s: float) -> None:
        self.ready: EngineReady | None = None
        self.stats: EngineStats | None = None
        self.asked_s: float | None = None
        self.is_dead = False
        self._heartbeats = heartbeats
        self._heard_s = self._news_s = now_s
        self._num_news = 0

    def take_news(self, num_news: int, now_s: float) -> None:
        """Note how much news of requests has come of it so far."""
        if num_news != self._num_news:
            self._num_news, self._news_s = num_news, now_s

    def take_stats(self, stats: EngineStats, now_s: float) -> None:
        """Take what it says of how it does."""
        self.stats, self.asked_s, self._heard_s = stats, None, now_s

    def end(self) -> None:
        """Note that it has ended."""
        self.is_dead = True
        if self.stats is not None:
            self.stats = replace(
                self.stats, is_serving=False, num_running=0, num_waiting=0, oldest_waiting_s=0.0
            )

    def judge(self, started_s: Sequence[float], now_s: float, stall_timeout_s: float) -> tuple[bool, str]:
        """Tell whether it makes progress, and why that is said.

        Args:
            started_s: when its requests began.
            now_s: now.
            stall_timeout_s: work without progress for longer than this is a stall.
        """
        waits = [*started_s, *(() if self.asked_s is None else (self.asked_s,))]
        signs = EngineSigns(
            now_s=now_s,
            is_dead=self.is_dead,
            is_ready=self.ready is not None,
            is_replacing=self.stats is not None and not self.stats.is_serving,
            waiting_since_s=min(waits, default=None),
            progress_s=max(self._news_s, self._last_step_s()),
            beat_s=self._last_beat_s() if waits else 0.0,
        )
        return judge(signs, stall_timeout_s)

    def _last_step_s(self) -> float:
        """Return when a step has ended last, as far as is known; 0 when none has."""
        stats = self.stats
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
