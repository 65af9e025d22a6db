"""The metrics of a server by the names that Prometheus knows them by.

What vLLM has too bears vLLM's name, so that dashboards made for it work; the rest begins `tprt_`.
docs/metrics.md says what each means. Knows nothing of where the values come from.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from tprt.messages import QUEUE_BOUNDS_S, EngineStats
from tprt.server.histogram import Histogram
from tprt.server.rank_views import RankView
from tprt.server.request_metrics import RequestTotals
from tprt.transport.heartbeat import NO_STEP, Phase

_INF = float("inf")


class FamilyMaker:
    """Makes families whose samples all bear the label `model_name`."""

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name

    def gauge(self, name: str, help_text: str, value: float) -> Metric:
        """Return a gauge."""
        family = GaugeMetricFamily(name, help_text, labels=["model_name"])
        family.add_metric([self._model_name], value)
        return family

    def counter(self, name: str, help_text: str, value: float) -> Metric:
        """Return a counter; its sample's name ends `_total`."""
        family = CounterMetricFamily(name, help_text, labels=["model_name"])
        family.add_metric([self._model_name], value)
        return family

    def counter_by(self, label: str, name: str, help_text: str, values: Mapping[str, float]) -> Metric:
        """Return a counter with a sample for each value of `label`."""
        family = CounterMetricFamily(name, help_text, labels=["model_name", label])
        for key, value in values.items():
            family.add_metric([self._model_name, key], value)
        return family

    def gauge_by_rank(self, name: str, help_text: str, values: Iterable[tuple[int, float]]) -> Metric:
        """Return a gauge with a sample for each (rank, value)."""
        family = GaugeMetricFamily(name, help_text, labels=["model_name", "rank"])
        for rank, value in values:
            family.add_metric([self._model_name, str(rank)], value)
        return family

    def phases(self, name: str, help_text: str, phases: Iterable[tuple[int, Phase]]) -> Metric:
        """Return a gauge that is 1 for the phase of each rank and 0 for all others."""
        family = GaugeMetricFamily(name, help_text, labels=["model_name", "rank", "phase"])
        for rank, now in phases:
            for phase in Phase:
                family.add_metric([self._model_name, str(rank), phase.words], float(phase is now))
        return family

    def histogram(self, name: str, help_text: str, histogram: Histogram) -> Metric:
        """Return a histogram."""
        family = HistogramMetricFamily(name, help_text, labels=["model_name"])
        family.add_metric([self._model_name], _buckets(histogram), histogram.sum)
        return family


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    total = 0
    buckets = []
    for bound, count in zip((*histogram.bounds, _INF), histogram.counts, strict=True):
        total += count
        buckets.append(("+Inf" if bound == _INF else repr(bound), float(total)))
    return buckets


def request_families(make: FamilyMaker, totals: RequestTotals) -> Iterator[Metric]:
    """Yield what the server knows of its requests."""
    yield make.counter(
        "vllm:prompt_tokens", "Tokens of the prompts whose output began.", totals.num_prompt_tokens
    )
    yield make.counter("vllm:generation_tokens", "Tokens generated.", totals.num_generated_tokens)
    yield make.counter_by(
        "finished_reason", "vllm:request_success", "Requests that have ended, by reason.", totals.ended
    )
    for name, help_text, histogram in (
        ("time_to_first_token_seconds", "From a request's beginning to its first token.", totals.first_token_s),
        ("inter_token_latency_seconds", "From one token to the next.", totals.between_tokens_s),
        ("time_per_output_token_seconds", "From one token to the next (older name).", totals.between_tokens_s),
        ("request_time_per_output_token_seconds", "The same, mean of each request.", totals.per_token_s),
        ("e2e_request_latency_seconds", "From a request's beginning to its end.", totals.request_s),
        ("request_decode_time_seconds", "From a request's first token to its last.", totals.decode_s),
        ("request_prompt_tokens", "Prompt tokens of each request.", totals.prompt_tokens),
        ("request_generation_tokens", "Tokens generated for each request.", totals.generated_tokens),
        ("request_max_num_generation_tokens", "Tokens of a request's longest output.", totals.generated_tokens),
        ("request_params_max_tokens", "The max_tokens of each request.", totals.max_tokens),
    ):
        yield make.histogram(f"vllm:{name}", help_text, histogram)


def queue_families(make: FamilyMaker, num_running: int, num_waiting: int) -> Iterator[Metric]:
    """Yield how many requests the engine has."""
    yield make.gauge("vllm:num_requests_running", "Requests that the ranks compute.", num_running)
    yield make.gauge("vllm:num_requests_waiting", "Requests that wait for a place.", num_waiting)


def engine_families(make: FamilyMaker, stats: EngineStats, age_s: float) -> Iterator[Metric]:
    """Yield what the coordinator said `age_s` ago."""
    usage = 1 - stats.num_free_blocks / stats.num_blocks if stats.num_blocks else 0.0
    yield make.gauge("vllm:kv_cache_usage_perc", "Share of the KV blocks in use; 1 is all.", usage)
    yield make.gauge("vllm:gpu_cache_usage_perc", "Share of the KV blocks in use (older name).", usage)
    if stats.queue_counts:
        queue = Histogram(QUEUE_BOUNDS_S)
        queue.counts, queue.sum = list(stats.queue_counts), stats.queue_sum_s
        yield make.histogram("vllm:request_queue_time_seconds", "From arrival to the first step.", queue)
    for name, help_text, value in (
        ("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.num_prompt_tokens),
        ("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.", stats.num_cached_tokens),
        ("vllm:num_preemptions", "Sequences sent back to the queue for blocks.", stats.num_preemptions),
        ("tprt_steps", "Steps that the ranks have finished.", stats.num_steps),
        ("tprt_sampled_tokens", "Tokens sampled, for all clients.", stats.num_generated_tokens),
        ("tprt_restarts", "Groups of ranks that were replaced.", stats.epoch),
    ):
        yield make.counter(name, help_text, value)
    yield from _engine_gauges(make, stats, age_s)


def _engine_gauges(make: FamilyMaker, stats: EngineStats, age_s: float) -> Iterator[Metric]:
    for name, help_text, value in (
        ("tprt_epoch", "Number of the group of ranks; the first is 0.", stats.epoch),
        ("tprt_engine_serving", "1 while all ranks are ready.", float(stats.is_serving)),
        ("tprt_kv_blocks", "KV blocks of every rank.", stats.num_blocks),
        ("tprt_kv_blocks_free", "KV blocks that no sequence holds.", stats.num_free_blocks),
        ("tprt_oldest_waiting_seconds", "How long the head of the queue has waited.", stats.oldest_waiting_s),
        ("tprt_last_step_age_seconds", "Time since a step was finished.", _last_step_age_s(stats, age_s)),
        ("tprt_engine_stats_age_seconds", "Time since the coordinator last told of itself.", age_s),
    ):
        yield make.gauge(name, help_text, value)


def _last_step_age_s(stats: EngineStats, age_s: float) -> float:
    return stats.last_step_s + age_s if stats.num_steps else 0.0


def rank_families(make: FamilyMaker, views: Sequence[RankView]) -> Iterator[Metric]:
    """Yield where every rank is."""
    for name, help_text, values in (
        ("rank_step", "The last step that the rank has begun.", [(v, v.beat.step) for v in views if _ran(v)]),
        ("rank_step_lag", "Steps behind the furthest rank.", [(v, v.step_lag) for v in views]),
        ("rank_heartbeat_age_seconds", "Time since its last sign of life.", [(v, v.age_s) for v in views]),
        ("rank_resident_memory_bytes", "Memory of its process.", [(v, v.resident_bytes) for v in views]),
        ("rank_loaded_bytes", "Bytes of the weights in place.", [(v, v.beat.done_bytes) for v in views]),
    ):
        known = [(view.beat.rank, float(value)) for view, value in values if value is not None]
        yield make.gauge_by_rank(f"tprt_{name}", help_text, known)
    phases = [(view.beat.rank, view.beat.phase) for view in views]
    yield make.phases("tprt_rank_phase", "1 for the phase that the rank is in.", phases)


def _ran(view: RankView) -> bool:
    return view.beat.step != NO_STEP
