"""The metrics of one server, in Prometheus' text format.

Requests are counted as they run; the engine and the ranks are looked at when somebody asks. All of it belongs
to one thread, that of the event loop. Knows nothing of HTTP.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from tprt.messages import EngineStats, SamplingParams
from tprt.server.metric_families import (
    FamilyMaker,
    engine_families,
    queue_families,
    rank_families,
    request_families,
)
from tprt.server.metrics_history import MetricsHistory
from tprt.server.rank_views import Heartbeats, look_at_ranks
from tprt.server.request_metrics import RequestMetrics, RequestTotals


class ServerMetrics:
    """What `/metrics` shows, in a registry of its own.

    Attributes:
        content_type: of what `render` returns.
        totals: the requests so far.
        history: the last minutes.
        clock: seconds.
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(
        self,
        model_name: str,
        heartbeats: Heartbeats = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Assign only.

        Args:
            model_name: the label of every sample.
            heartbeats: returns the heartbeats of the newest epoch, or None while there are none.
            clock: seconds.
        """
        self.totals = RequestTotals()
        self.history = MetricsHistory()
        self.clock = clock
        self._make = FamilyMaker(model_name)
        self._heartbeats = heartbeats
        self._stats: EngineStats | None = None
        self._stats_s = 0.0
        self._registry = CollectorRegistry()
        self._registry.register(_Families(self._collect))
        ProcessCollector(registry=self._registry)

    def begin(self, num_prompt_tokens: int, sampling: SamplingParams) -> RequestMetrics:
        """Count a request that begins now."""
        return RequestMetrics(self.totals, num_prompt_tokens, sampling, self.clock)

    def set_engine(self, stats: EngineStats) -> None:
        """Take what the coordinator says of itself now."""
        self._stats, self._stats_s = stats, self.clock()
        self.history.add(self._stats_s, stats, self.totals)

    def render(self) -> bytes:
        """Return all metrics as text."""
        return generate_latest(self._registry)

    def _collect(self) -> Iterator[Metric]:
        make, stats = self._make, self._stats
        yield from request_families(make, self.totals)
        if stats is None:
            # Whatever was sent waits until the engine is there.
            yield from queue_families(make, 0, self.totals.num_open)
        else:
            yield from queue_families(make, stats.num_running, stats.num_waiting)
            yield from engine_families(make, stats, self.clock() - self._stats_s)
        yield from rank_families(make, look_at_ranks(self._heartbeats))


class _Families(Collector):
    """What the registry asks; it is not asked before somebody wants to see it."""

    def __init__(self, collect: Callable[[], Iterator[Metric]]) -> None:
        self._collect_families = collect

    def collect(self) -> Iterator[Metric]:
        """Yield every family."""
        return self._collect_families()

    def describe(self) -> list[Metric]:
        """Return nothing, so that no values are gathered at registration."""
        return []
