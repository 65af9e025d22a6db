"""What `/metrics` shows, read back by Prometheus' own parser."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import REGISTRY
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from tprt.messages import QUEUE_BOUNDS_S, EngineStats, SamplingParams
from tprt.server.metrics import ServerMetrics
from tprt.server.metrics_history import KEPT_S
from tprt.transport.heartbeat import HeartbeatReader, HeartbeatWriter, Phase
from tprt.transport.heartbeat_file import create_heartbeats

MODEL = 'a/model "of" \\ names'
QUEUE_COUNTS = (5, *(0 for _ in QUEUE_BOUNDS_S[1:]), 2)
STATS = EngineStats(3, True, 4, 5, 0.25, 30, 120, 6, 700, 100, 800, 90, 1.5, QUEUE_COUNTS, 20000.0)
# What dashboards for vLLM ask for.
KNOWN_TO_VLLM = (
    *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "gpu_cache_usage_perc"),
    *("prefix_cache_queries_total", "prefix_cache_hits_total", "num_preemptions_total"),
    *("prompt_tokens_total", "generation_tokens_total", "request_success_total"),
    *("time_to_first_token_seconds_bucket", "inter_token_latency_seconds_bucket"),
    *("time_per_output_token_seconds_bucket", "e2e_request_latency_seconds_bucket"),
    *("request_queue_time_seconds_sum", "request_prompt_tokens_bucket", "request_generation_tokens_bucket"),
    *("request_max_num_generation_tokens_bucket", "request_params_max_tokens_bucket"),
    *("request_decode_time_seconds_sum", "request_time_per_output_token_seconds_sum"),
)


@pytest.fixture
def heartbeats(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "heartbeats"
    create_heartbeats(path, 2)
    ranks = [HeartbeatWriter.open(path, rank, epoch=3) for rank in range(2)]
    ranks[0].begin_step(8, Phase.DECODE)
    ranks[1].begin_step(7, Phase.PREFILL)
    yield path
    for rank in ranks:
        rank.close()


@pytest.fixture
def metrics(heartbeats: Path) -> ServerMetrics:
    """Metrics of an engine, two ranks and a request that has ended."""
    made = ServerMetrics(MODEL, [lambda: HeartbeatReader.open(heartbeats)])
    made.set_engine(0, STATS)
    request = made.begin(0, 12, SamplingParams(max_tokens=20))
    for _ in range(5):
        request.on_tokens(2)
    request.on_end("stop")
    return made


def families(metrics: ServerMetrics) -> dict[str, Metric]:
    text = metrics.render().decode()
    found = list(text_string_to_metric_families(text))
    assert len({family.name for family in found}) == len(found), "a family is there twice"
    return {family.name: family for family in found}


def values(metrics: ServerMetrics) -> dict[str, dict[tuple[str, ...], float]]:
    """Return the samples of engine 0 by name and by the values of their other labels, in order of label."""
    result: dict[str, dict[tuple[str, ...], float]] = {}
    for family in families(metrics).values():
        for sample in family.samples:
            labels = tuple(v for k, v in sorted(sample.labels.items()) if k not in ("model_name", "engine"))
            assert sample.labels.get("engine", "0") == "0"
            result.setdefault(sample.name, {})[labels] = sample.value
    return result


def test_every_metric_that_dashboards_for_vllm_ask_for_is_there(metrics: ServerMetrics) -> None:
    found = values(metrics)
    assert [name for name in KNOWN_TO_VLLM if f"vllm:{name}" not in found] == []


def test_every_sample_bears_the_name_of_the_model_as_it_is(metrics: ServerMetrics) -> None:
    ours = [f for f in families(metrics).values() if f.name.startswith(("vllm:", "tprt_"))]
    assert len(ours) > 30
    samples = [sample for family in ours for sample in family.samples]
    assert {(sample.labels["model_name"], sample.labels["engine"]) for sample in samples} == {(MODEL, "0")}


def test_the_engine_is_shown_as_it_said(metrics: ServerMetrics) -> None:
    found = values(metrics)
    assert found["vllm:num_requests_running"] == {(): 4}
    assert found["vllm:num_requests_waiting"] == {(): 5}
    assert found["vllm:kv_cache_usage_perc"] == found["vllm:gpu_cache_usage_perc"] == {(): 0.75}
    assert found["vllm:prefix_cache_queries_total"] == {(): 700}
    assert found["vllm:prefix_cache_hits_total"] == {(): 100}
    assert found["vllm:num_preemptions_total"] == {(): 6}
    assert found["tprt_epoch"] == found["tprt_restarts_total"] == {(): 3}
    assert (found["tprt_steps_total"], found["tprt_sampled_tokens_total"]) == ({(): 90}, {(): 800})
    assert 1.5 <= found["tprt_last_step_age_seconds"][()] < 60
    assert found["vllm:request_queue_time_seconds_count"] == {(): 7}
    assert found["vllm:request_queue_time_seconds_bucket"][("0.001",)] == 5
    assert found["vllm:request_queue_time_seconds_bucket"][("7680.0",)] == 5


def test_the_requests_are_shown(metrics: ServerMetrics) -> None:
    found = values(metrics)
    assert found["vllm:prompt_tokens_total"] == {(): 12}
    assert found["vllm:generation_tokens_total"] == {(): 10}
    assert found["vllm:request_success_total"] == {("stop",): 1, ("length",): 0, ("abort",): 0, ("error",): 0}
    assert found["vllm:time_to_first_token_seconds_count"] == {(): 1}
    assert found["vllm:inter_token_latency_seconds_count"] == {(): 9}
    assert found["vllm:request_prompt_tokens_bucket"][("10.0",)] == 0
    assert found["vllm:request_prompt_tokens_bucket"][("20.0",)] == 1


def test_every_rank_is_shown(metrics: ServerMetrics) -> None:
    found = values(metrics)
    assert found["tprt_rank_step"] == {("0",): 8, ("1",): 7}
    assert found["tprt_rank_step_lag"] == {("0",): 0, ("1",): 1}
    assert all(0 <= age_s < 60 for age_s in found["tprt_rank_heartbeat_age_seconds"].values())
    phases = {labels for labels, value in found["tprt_rank_phase"].items() if value}
    assert phases == {("decode", "0"), ("prefill", "1")}
    memory = found["tprt_rank_resident_memory_bytes"][("0",)]
    statm = Path(f"/proc/{os.getpid()}/statm").read_text().split()
    assert memory == pytest.approx(int(statm[1]) * os.sysconf("SC_PAGE_SIZE"), rel=0.1)


def test_names_and_shapes_are_what_promtool_asks_for(metrics: ServerMetrics) -> None:
    for family in families(metrics).values():
        assert re.fullmatch(r"[a-z_][a-z0-9_]*|vllm:[a-z0-9_]+", family.name), family.name
        assert family.documentation
        assert family.type in ("counter", "gauge", "histogram"), family.name
        names = {sample.name for sample in family.samples}
        if family.type == "counter":
            assert names == {f"{family.name}_total"}
        if family.type == "gauge":
            assert not family.name.endswith(("_total", "_count", "_sum", "_bucket"))
        if family.type == "histogram":
            assert_is_histogram(family)


def assert_is_histogram(family: Metric) -> None:
    buckets = [(s.labels["le"], s.value) for s in family.samples if s.name.endswith("_bucket")]
    bounds = [float(bound) for bound, _ in buckets]
    assert bounds == sorted(set(bounds))
    assert buckets[-1][0] == "+Inf"
    counts = [count for _, count in buckets]
    assert counts == sorted(counts), "buckets count what is below as well"
    (count,) = (s.value for s in family.samples if s.name.endswith("_count"))
    assert count == counts[-1]


def test_before_the_engine_is_there_its_requests_wait_and_no_rank_is_known() -> None:
    metrics = ServerMetrics("m")
    metrics.begin(0, 3, SamplingParams())
    found = values(metrics)
    assert (found["vllm:num_requests_running"], found["vllm:num_requests_waiting"]) == ({(): 0}, {(): 1})
    assert "tprt_epoch" not in found
    assert "tprt_rank_step" not in found


def test_heartbeats_that_are_gone_with_their_epoch_are_no_error(
    metrics: ServerMetrics, heartbeats: Path
) -> None:
    heartbeats.unlink()
    assert "tprt_rank_step" not in values(metrics)
    assert values(metrics)["tprt_epoch"] == {(): 3}


def test_two_servers_of_one_process_share_nothing_with_each_other_and_the_global_registry() -> None:
    before = set(REGISTRY._names_to_collectors)
    one, other = ServerMetrics("one"), ServerMetrics("other")
    one.begin(0, 3, SamplingParams()).on_end("stop")
    assert values(one)["vllm:request_success_total"][("stop",)] == 1
    assert values(other)["vllm:request_success_total"][("stop",)] == 0
    assert set(REGISTRY._names_to_collectors) == before


def test_looking_leaves_no_descriptor(metrics: ServerMetrics) -> None:
    metrics.render()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        metrics.render()
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_history_holds_a_moment_a_second_for_five_minutes() -> None:
    now_s = 0.0
    metrics = ServerMetrics("m", clock=lambda: now_s)
    for second in range(1000):
        now_s = second * 0.5
        metrics.set_engine(0, STATS)
    times = [moment.time_s for moment in metrics.history.moments]
    assert times[-1] - times[0] <= KEPT_S
    assert len(times) == KEPT_S + 1
    assert {b - a for a, b in itertools.pairwise(times)} == {1.0}


def test_each_replica_is_an_engine_of_its_own(heartbeats: Path) -> None:
    seconds = itertools.count()
    readers = [lambda: HeartbeatReader.open(heartbeats), lambda: None]
    metrics = ServerMetrics(MODEL, readers, lambda: next(seconds))
    metrics.set_engine(0, STATS)
    metrics.set_engine(1, replace(STATS, num_running=1, num_waiting=0))
    metrics.begin(1, 3, SamplingParams()).on_end("stop")
    found = families(metrics)
    by_engine = {
        name: {sample.labels["engine"]: sample.value for sample in found[name].samples}
        for name in ("vllm:num_requests_running", "vllm:num_requests_waiting")
    }
    assert by_engine == {
        "vllm:num_requests_running": {"0": 4, "1": 1},
        "vllm:num_requests_waiting": {"0": 5, "1": 0},
    }
    stops = {
        sample.labels["engine"]: sample.value
        for sample in found["vllm:request_success"].samples
        if sample.labels["finished_reason"] == "stop"
    }
    assert stops == {"0": 0, "1": 1}
    assert {sample.labels["engine"] for sample in found["tprt_rank_step"].samples} == {"0"}
    assert metrics.totals.ended["stop"] == 1
    assert metrics.history.moments[-1].stats.num_running == 5, "all replicas together"
