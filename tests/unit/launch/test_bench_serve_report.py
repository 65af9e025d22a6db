"""The figures are those of `vllm bench serve`: its definitions, its names, its format."""

from __future__ import annotations

import pytest

from launch.bench.serve_report import details_of, figures_of, parse_goodput, table, tpot_s
from launch.bench.serve_stream import RequestResult
from tprt.errors import ConfigError


def good(start_s: float, ttft_s: float, itls_s: list[float], output_len: int = 0) -> RequestResult:
    return RequestResult(
        prompt_len=10,
        start_s=start_s,
        ttft_s=ttft_s,
        itls_s=itls_s,
        latency_s=ttft_s + sum(itls_s),
        output_len=output_len or 1 + len(itls_s),
        is_done=True,
    )


def bad(kind: str, error: str = "why") -> RequestResult:
    return RequestResult(10, error_kind=kind, error=error, is_done=True)


TWO = [good(100.0, 0.5, [0.1, 0.3]), good(100.2, 0.1, [0.2])]


def test_time_per_output_token_is_of_those_after_the_first() -> None:
    assert tpot_s(good(0.0, 0.5, [0.1, 0.3])) == pytest.approx(0.2)
    # Several tokens may come in one event: tokens count, not events.
    assert tpot_s(good(0.0, 0.5, [0.1, 0.3], output_len=5)) == pytest.approx(0.1)
    assert tpot_s(good(0.0, 0.5, [])) is None


def test_throughput_counts_what_has_succeeded() -> None:
    figures = figures_of([*TWO, bad("HTTP 500")], 2.0, {})
    assert (figures["completed"], figures["failed"]) == (2, 1)
    assert (figures["total_input_tokens"], figures["total_output_tokens"]) == (20, 5)
    assert figures["request_throughput"] == 1.0
    assert figures["output_throughput"] == 2.5
    assert figures["total_token_throughput"] == 12.5
    assert figures["request_goodput"] is None


def test_percentiles_lie_between_the_values_they_fall_between() -> None:
    results = [good(0.0, number / 1000, []) for number in range(1, 101)]
    figures = figures_of(results, 1.0, {})
    expected = {"mean": 50.5, "median": 50.5, "p50": 50.5, "p90": 90.1, "p95": 95.05, "p99": 99.01}
    assert {name: figures[f"{name}_ttft_ms"] for name in expected} == pytest.approx(expected)
    assert figures["std_ttft_ms"] == pytest.approx(28.866, abs=1e-3)


def test_each_latency_is_over_what_it_is_defined_for() -> None:
    figures = figures_of(TWO, 1.0, {})
    assert figures["mean_ttft_ms"] == pytest.approx(300)
    assert figures["mean_tpot_ms"] == pytest.approx(200)
    assert figures["mean_itl_ms"] == pytest.approx(200)
    assert figures["mean_e2el_ms"] == pytest.approx(600)


def test_requests_are_good_that_keep_all_limits() -> None:
    assert figures_of(TWO, 2.0, {"ttft": 500.0})["request_goodput"] == 1.0
    assert figures_of(TWO, 2.0, {"ttft": 500.0, "e2el": 400.0})["request_goodput"] == 0.5
    # One token has no time per output token, which keeps every limit.
    assert figures_of([good(0.0, 0.5, [])], 2.0, {"tpot": 0.0})["request_goodput"] == 0.5


def test_peaks_are_of_one_second_and_one_moment() -> None:
    figures = figures_of([*TWO, good(100.9, 1.0, [0.05, 0.05])], 2.0, {})
    # Tokens come 0.3, 0.5, 0.5, 0.6 and 0.9, then 1.9, 1.95 and 2.0 seconds after the first request.
    assert figures["max_output_tokens_per_s"] == 5.0
    assert figures["max_concurrent_requests"] == 2


def test_nothing_at_all_is_zeros_and_not_an_error() -> None:
    figures = figures_of([], 1.0, {"ttft": 1.0})
    assert figures["completed"] == 0
    assert figures["p99_itl_ms"] == 0.0
    assert "Successful requests:" in table(figures, None, float("inf"))


def test_errors_are_counted_by_kind_and_the_first_is_shown() -> None:
    shown = table(
        figures_of([bad("HTTP 429", "queue full"), bad("deadline"), bad("HTTP 429")], 1.0, {}), 8, 2.5
    )
    assert f"{'HTTP 429:':<40} 2" in shown
    assert f"{'deadline:':<40} 1" in shown
    assert "First: HTTP 429: queue full" in shown


def test_the_table_has_the_lines_of_vllm() -> None:
    lines = table(figures_of(TWO, 2.0, {"ttft": 1.0}), 8, 2.5).splitlines()
    assert lines[0] == "============ Serving Benchmark Result ============"
    assert lines[1] == "Successful requests:                     2         "
    assert lines[4] == "Request rate configured (RPS):           2.50      "
    assert "---------------Time to First Token----------------" in lines
    assert "Mean TTFT (ms):                          300.00    " in lines
    assert "P99 ITL (ms):                            298.00    " in lines
    assert lines[-1] == "=" * 50


def test_details_have_an_entry_for_each_request() -> None:
    details = details_of([*TWO, bad("deadline")])
    assert details["output_lens"] == [3, 2, 0]
    assert details["itls"] == [[0.1, 0.3], [0.2], []]
    assert details["errors"] == ["", "", "why"]


def test_limits_are_pairs_of_name_and_milliseconds() -> None:
    assert parse_goodput(["ttft:200 tpot:50", "e2el:5000"]) == {"ttft": 200.0, "tpot": 50.0, "e2el": 5000.0}
    for wrong in ("itl:5", "ttft", "ttft:x", "ttft:-1", "ttft:nan"):
        with pytest.raises(ConfigError, match=wrong.partition(":")[0]):
            parse_goodput([wrong])
