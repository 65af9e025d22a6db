"""The metrics of one server, in Prometheus' text format.

Requests are counted as they run; the engine and the ranks are looked at when somebody asks. All of it belongs
to one thread, that of the event loop. Knows nothing of HTTP.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from tprt.messages import EngineStats, SamplingParams
from tprt.server.engine_totals import add_up
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
        history: the last minutes.
        clock: seconds.
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(
        self,
        model_name: str,
        heartbeats: Sequence[Heartbeats] = (lambda: None,),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Assign only.

        Args:
            model_name: the label of every sample.
            heartbeats: for each replica, returns the heartbeats of its newest epoch, None while there are none.
            clock: seconds.
        """
        self.history = MetricsHistory()
        self.clock = clock
        self._make = FamilyMaker(model_name)
        self._heartbeats = heartbeats
        self._totals = [RequestTotals() for _ in heartbeats]
        self._stats: dict[int, EngineStats] = {}
        self._stats_s: dict[int, float] = {}
        self._registry = CollectorRegistry()
        self._registry.register(_Families(self._collect))
        ProcessCollector(registry=self._registry)

    @property
    def totals(self) -> RequestTotals:
        """The requests so far, of all replicas."""
        if len(self._totals) == 1:
            return self._totals[0]
        totals = RequestTotals()
        for one in self._totals:
            totals.merge(one)
        return totals

    def begin(self, replica: int, num_prompt_tokens: int, sampling: SamplingParams) -> RequestMetrics:
        """Count a request that begins now."""
        return RequestMetrics(self._totals[replica], num_prompt_tokens, sampling, self.clock)

    def set_engine(self, replica: int, stats: EngineStats) -> None:
        """Take what the coordinator of a replica says of itself now."""
        now_s = self.clock()
        self._stats[replica], self._stats_s[replica] = stats, now_s
        self.history.add(now_s, add_up(list(self._stats.values())), self.totals)

    def render(self) -> bytes:
        """Return all metrics as text."""
        return generate_latest(self._registry)

    def _collect(self) -> Iterator[Metric]:
        make, stats, now_s = self._make, self._stats, self.clock()
        yield from request_families(make, self._totals)
        # Before an engine is there, whatever was sent waits for it.
        yield from queue_families(
            make,
            [stats[replica].num_running if replica in stats else 0 for replica in range(len(self._totals))],
            [
                stats[replica].num_waiting if replica in stats else totals.num_open
                for replica, totals in enumerate(self._totals)
            ],
        )
        if stats:
            ages_s = {replica: now_s - then_s for replica, then_s in self._stats_s.items()}
            yield from engine_families(make, stats, ages_s)
        yield from rank_families(make, [look_at_ranks(one) for one in self._heartbeats])


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
