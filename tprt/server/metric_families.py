"""The metrics of a server by the names that Prometheus knows them by.

What vLLM has too bears vLLM's name, so that dashboards made for it work; the rest begins `tprt_`.
docs/metrics.md says what each means. Knows nothing of where the values come from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from tprt.messages import QUEUE_BOUNDS_S, EngineStats
from tprt.server.histogram import Histogram
from tprt.server.rank_views import RankView
from tprt.server.request_metrics import RequestTotals
from tprt.transport.heartbeat import NO_STEP, Phase

_INF = float("inf")
_LABELS = ("model_name", "engine")


class FamilyMaker:
    """Makes families whose samples all bear the labels `model_name` and `engine`, the number of the replica."""

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name

    def gauge(self, name: str, help_text: str, values: Mapping[int, float]) -> Metric:
        """Return a gauge of each engine."""
        family = GaugeMetricFamily(name, help_text, labels=_LABELS)
        for engine, value in values.items():
            family.add_metric(self._labels(engine), value)
        return family

    def counter(self, name: str, help_text: str, values: Mapping[int, float]) -> Metric:
        """Return a counter of each engine; its sample's name ends `_total`."""
        family = CounterMetricFamily(name, help_text, labels=_LABELS)
        for engine, value in values.items():
            family.add_metric(self._labels(engine), value)
        return family

    def counter_by(
        self, label: str, name: str, help_text: str, values: Mapping[int, Mapping[str, float]]
    ) -> Metric:
        """Return a counter of each engine with a sample for each value of `label`."""
        family = CounterMetricFamily(name, help_text, labels=[*_LABELS, label])
        for engine, several in values.items():
            for key, value in several.items():
                family.add_metric([*self._labels(engine), key], value)
        return family

    def gauge_by_rank(self, name: str, help_text: str, values: Iterable[tuple[int, int, float]]) -> Metric:
        """Return a gauge with a sample for each (engine, rank, value)."""
        family = GaugeMetricFamily(name, help_text, labels=[*_LABELS, "rank"])
        for engine, rank, value in values:
            family.add_metric([*self._labels(engine), str(rank)], value)
        return family

    def phases(self, name: str, help_text: str, phases: Iterable[tuple[int, int, Phase]]) -> Metric:
        """Return a gauge that is 1 for the phase of each (engine, rank) and 0 for all others."""
        family = GaugeMetricFamily(name, help_text, labels=[*_LABELS, "rank", "phase"])
        for engine, rank, now in phases:
            for phase in Phase:
                labels = [*self._labels(engine), str(rank), phase.words]
                family.add_metric(labels, float(phase is now))
        return family

    def histogram(self, name: str, help_text: str, histograms: Mapping[int, Histogram]) -> Metric:
        """Return a histogram of each engine."""
        family = HistogramMetricFamily(name, help_text, labels=_LABELS)
        for engine, histogram in histograms.items():
            family.add_metric(self._labels(engine), _buckets(histogram), histogram.sum)
        return family

    def _labels(self, engine: int) -> list[str]:
        return [self._model_name, str(engine)]


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    total = 0
    buckets = []
    for bound, count in zip((*histogram.bounds, _INF), histogram.counts, strict=True):
        total += count
        buckets.append(("+Inf" if bound == _INF else repr(bound), float(total)))
    return buckets


def request_families(make: FamilyMaker, totals: Sequence[RequestTotals]) -> Iterator[Metric]:
    """Yield what the server knows of the requests of each engine."""
    known = dict(enumerate(totals))
    yield make.counter(
        "vllm:prompt_tokens",
        "Tokens of the prompts whose output began.",
        {engine: one.num_prompt_tokens for engine, one in known.items()},
    )
    yield make.counter(
        "vllm:generation_tokens",
        "Tokens generated.",
        {engine: one.num_generated_tokens for engine, one in known.items()},
    )
    yield make.counter_by(
        "finished_reason",
        "vllm:request_success",
        "Requests that have ended, by reason.",
        {engine: one.ended for engine, one in known.items()},
    )
    for name, help_text, attribute in (
        ("time_to_first_token_seconds", "From a request's beginning to its first token.", "first_token_s"),
        ("inter_token_latency_seconds", "From one token to the next.", "between_tokens_s"),
        ("time_per_output_token_seconds", "From one token to the next (older name).", "between_tokens_s"),
        ("request_time_per_output_token_seconds", "The same, mean of each request.", "per_token_s"),
        ("e2e_request_latency_seconds", "From a request's beginning to its end.", "request_s"),
        ("request_decode_time_seconds", "From a request's first token to its last.", "decode_s"),
        ("request_prompt_tokens", "Prompt tokens of each request.", "prompt_tokens"),
        ("request_generation_tokens", "Tokens generated for each request.", "generated_tokens"),
        ("request_max_num_generation_tokens", "Tokens of a request's longest output.", "generated_tokens"),
        ("request_params_max_tokens", "The max_tokens of each request.", "max_tokens"),
    ):
        histograms = {engine: getattr(one, attribute) for engine, one in known.items()}
        yield make.histogram(f"vllm:{name}", help_text, histograms)


def queue_families(
    make: FamilyMaker, num_running: Sequence[int], num_waiting: Sequence[int]
) -> Iterator[Metric]:
    """Yield how many requests each engine has."""
    running, waiting = dict(enumerate(num_running)), dict(enumerate(num_waiting))
    yield make.gauge("vllm:num_requests_running", "Requests that the ranks compute.", running)
    yield make.gauge("vllm:num_requests_waiting", "Requests that wait for a place.", waiting)


def engine_families(
    make: FamilyMaker, stats: Mapping[int, EngineStats], ages_s: Mapping[int, float]
) -> Iterator[Metric]:
    """Yield what the coordinator of each engine said, as many seconds ago as `ages_s` has."""
    usage = {engine: 1 - one.num_free_blocks / max(one.num_blocks, 1) for engine, one in stats.items()}
    usage |= {engine: 0.0 for engine, one in stats.items() if not one.num_blocks}
    yield make.gauge("vllm:kv_cache_usage_perc", "Share of the KV blocks in use; 1 is all.", usage)
    yield make.gauge("vllm:gpu_cache_usage_perc", "Share of the KV blocks in use (older name).", usage)
    queues = {engine: _queue_times(one) for engine, one in stats.items() if one.queue_counts}
    if queues:
        yield make.histogram("vllm:request_queue_time_seconds", "From arrival to the first step.", queues)
    for name, help_text, attribute in (
        ("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", "num_prompt_tokens"),
        ("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.", "num_cached_tokens"),
        ("vllm:num_preemptions", "Sequences sent back to the queue for blocks.", "num_preemptions"),
        ("tprt_steps", "Steps that the ranks have finished.", "num_steps"),
        ("tprt_sampled_tokens", "Tokens sampled, for all clients.", "num_generated_tokens"),
        ("tprt_restarts", "Groups of ranks that were replaced.", "epoch"),
    ):
        counts = {engine: getattr(one, attribute) for engine, one in stats.items()}
        yield make.counter(name, help_text, counts)
    yield from _engine_gauges(make, stats, ages_s)


def _queue_times(stats: EngineStats) -> Histogram:
    queue = Histogram(QUEUE_BOUNDS_S)
    queue.counts, queue.sum = list(stats.queue_counts), stats.queue_sum_s
    return queue


def _engine_gauges(
    make: FamilyMaker, stats: Mapping[int, EngineStats], ages_s: Mapping[int, float]
) -> Iterator[Metric]:
    for name, help_text, attribute in (
        ("tprt_epoch", "Number of the group of ranks; the first is 0.", "epoch"),
        ("tprt_engine_serving", "1 while all ranks are ready.", "is_serving"),
        ("tprt_kv_blocks", "KV blocks of every rank.", "num_blocks"),
        ("tprt_kv_blocks_free", "KV blocks that no sequence holds.", "num_free_blocks"),
        ("tprt_oldest_waiting_seconds", "How long the head of the queue has waited.", "oldest_waiting_s"),
    ):
        values = {engine: float(getattr(one, attribute)) for engine, one in stats.items()}
        yield make.gauge(name, help_text, values)
    step_ages_s = {engine: _last_step_age_s(one, ages_s[engine]) for engine, one in stats.items()}
    yield make.gauge("tprt_last_step_age_seconds", "Time since a step was finished.", step_ages_s)
    yield make.gauge("tprt_engine_stats_age_seconds", "Time since the coordinator last told of itself.", ages_s)


def _last_step_age_s(stats: EngineStats, age_s: float) -> float:
    return stats.last_step_s + age_s if stats.num_steps else 0.0


def rank_families(make: FamilyMaker, views: Sequence[Sequence[RankView]]) -> Iterator[Metric]:
    """Yield where every rank of each engine is."""
    ranks = [(engine, view) for engine, several in enumerate(views) for view in several]
    for name, help_text, value_of in _RANK_GAUGES:
        values = [(engine, view.beat.rank, value_of(view)) for engine, view in ranks]
        known = [(engine, rank, float(value)) for engine, rank, value in values if value is not None]
        yield make.gauge_by_rank(f"tprt_{name}", help_text, known)
    phases = [(engine, view.beat.rank, view.beat.phase) for engine, view in ranks]
    yield make.phases("tprt_rank_phase", "1 for the phase that the rank is in.", phases)


def _step(view: RankView) -> int | None:
    return None if view.beat.step == NO_STEP else view.beat.step


_RANK_GAUGES: tuple[tuple[str, str, Callable[[RankView], float | None]], ...] = (
    ("rank_step", "The last step that the rank has begun.", _step),
    ("rank_step_lag", "Steps behind the furthest rank.", lambda view: view.step_lag),
    ("rank_heartbeat_age_seconds", "Time since its last sign of life.", lambda view: view.age_s),
    ("rank_resident_memory_bytes", "Memory of its process.", lambda view: view.resident_bytes),
    ("rank_loaded_bytes", "Bytes of the weights in place.", lambda view: view.beat.done_bytes),
)
