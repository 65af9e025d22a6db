"""From the times of requests to the figures of `vllm bench serve`, under its names.

TTFT is the time to the first token; E2EL the latency from end to end, from sending to the last token; TPOT the
time per output token after the first, (E2EL - TTFT) / (tokens - 1), one for each request with two tokens or
more; ITL the pause between two events of a stream, all streams together.

Knows nothing of how requests are made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate

import numpy as np

from launch.bench.serve_stream import RequestResult
from tprt.errors import ConfigError

PERCENTILES = (50, 90, 95, 99)
GOODPUT_NAMES = ("ttft", "tpot", "e2el")
_TITLES = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
}
_WIDTH = 50
Figures = dict[str, object]


def parse_goodput(pairs: Iterable[str]) -> dict[str, float]:
    """Return the limits, in ms, of `ttft:200 tpot:50 e2el:5000` or some of them.

    Raises:
        ConfigError: another name, or no number.
    """
    limits = {}
    for pair in " ".join(pairs).split():
        name, _, limit = pair.partition(":")
        try:
            limits[name] = float(limit)
        except ValueError as error:
            raise ConfigError(f"--goodput {pair}: expected NAME:MILLISECONDS") from error
        if name not in GOODPUT_NAMES or not limits[name] >= 0:
            raise ConfigError(f"--goodput {pair}: expected one of {', '.join(GOODPUT_NAMES)}, and 0 ms or more")
    return limits


def tpot_s(result: RequestResult) -> float | None:
    """Return the time per output token after the first; None where there is no other."""
    if result.output_len < 2:
        return None
    return (result.latency_s - result.ttft_s) / (result.output_len - 1)


def figures_of(results: Sequence[RequestResult], duration_s: float, goodput: Mapping[str, float]) -> Figures:
    """Return throughput and latencies, in the order in which vLLM has them.

    Args:
        results: of the requests that have ended, well or not.
        duration_s: from the first request's arrival to the end of the last.
        goodput: limits in ms; a request that keeps all of them counts.
    """
    good = [result for result in results if result.is_good]
    num_input = sum(result.prompt_len for result in good)
    num_output = sum(result.output_len for result in good)
    num_within = sum(_is_within(result, goodput) for result in good)
    figures: Figures = {
        "duration": duration_s,
        "completed": len(good),
        "failed": len(results) - len(good),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(good) / duration_s,
        "request_goodput": num_within / duration_s if goodput else None,
        "output_throughput": num_output / duration_s,
        "total_token_throughput": (num_input + num_output) / duration_s,
        "max_output_tokens_per_s": _peak_tokens(good),
        "max_concurrent_requests": _peak_concurrency(good),
    }
    tpots = [tpot for result in good if (tpot := tpot_s(result)) is not None]
    figures |= _statistics("ttft", [result.ttft_s for result in good])
    figures |= _statistics("tpot", tpots)
    figures |= _statistics("itl", [pause_s for result in good for pause_s in result.itls_s])
    figures |= _statistics("e2el", [result.latency_s for result in good])
    errors = [result for result in results if result.error_kind]
    figures["error_kinds"] = dict(Counter(result.error_kind for result in errors))
    figures["first_error"] = f"{errors[0].error_kind}: {errors[0].error}" if errors else None
    return figures


def details_of(results: Sequence[RequestResult]) -> Figures:
    """Return the lists of `vllm bench serve --save-detailed`: an entry for each request, in seconds."""
    return {
        "input_lens": [result.prompt_len for result in results],
        "output_lens": [result.output_len for result in results],
        "ttfts": [result.ttft_s for result in results],
        "itls": [result.itls_s for result in results],
        "latencies": [result.latency_s for result in results],
        "start_times": [result.start_s for result in results],
        "generated_texts": [result.text for result in results],
        "errors": [result.error for result in results],
    }


def table(figures: Mapping[str, object], max_concurrency: int | None, rate: float) -> str:
    """Return the figures for people, in the format of `vllm bench serve`."""
    rows: list[tuple[str, object]] = [
        ("Successful requests:", figures["completed"]),
        ("Failed requests:", figures["failed"]),
        ("Maximum request concurrency:", max_concurrency),
        ("Request rate configured (RPS):", None if rate == float("inf") else rate),
        ("Benchmark duration (s):", figures["duration"]),
        ("Total input tokens:", figures["total_input_tokens"]),
        ("Total generated tokens:", figures["total_output_tokens"]),
        ("Request throughput (req/s):", figures["request_throughput"]),
        ("Request goodput (req/s):", figures["request_goodput"]),
        ("Output token throughput (tok/s):", figures["output_throughput"]),
        ("Peak output token throughput (tok/s):", figures["max_output_tokens_per_s"]),
        ("Peak concurrent requests:", figures["max_concurrent_requests"]),
        ("Total token throughput (tok/s):", figures["total_token_throughput"]),
    ]
    lines = [" Serving Benchmark Result ".center(_WIDTH, "=")]
    lines += [_row(name, value) for name, value in rows if value is not None]
    for key, title in _TITLES.items():
        lines.append(title.center(_WIDTH, "-"))
        for statistic in ("mean", "median", "std", *(f"p{percent}" for percent in PERCENTILES)):
            name = f"{statistic.capitalize()} {key.upper()} (ms):"
            lines.append(_row(name, figures[f"{statistic}_{key}_ms"]))
    return "\n".join([*lines, *_error_lines(figures), "=" * _WIDTH])


def _error_lines(figures: Mapping[str, object]) -> list[str]:
    kinds = figures["error_kinds"]
    if not kinds:
        return []
    assert isinstance(kinds, dict)
    counts = [_row(f"{kind}:", count) for kind, count in kinds.items()]
    return ["Errors".center(_WIDTH, "-"), *counts, f"First: {figures['first_error']}"]


def _row(name: str, value: object) -> str:
    return f"{name:<40} {value:<10.2f}" if isinstance(value, float) else f"{name:<40} {value!s:<10}"


def _statistics(name: str, values_s: Sequence[float]) -> Figures:
    """Return mean, median, standard deviation and percentiles in ms; 0 where there is no value, as vLLM."""
    values = np.array(values_s or [0.0]) * 1e3
    figures: Figures = {
        f"mean_{name}_ms": float(values.mean()),
        f"median_{name}_ms": float(np.median(values)),
        f"std_{name}_ms": float(values.std()),
    }
    for percent, value in zip(PERCENTILES, np.percentile(values, PERCENTILES).tolist(), strict=True):
        figures[f"p{percent}_{name}_ms"] = value
    return figures


def _is_within(result: RequestResult, goodput_ms: Mapping[str, float]) -> bool:
    times_s = {"ttft": result.ttft_s, "tpot": tpot_s(result) or 0.0, "e2el": result.latency_s}
    return all(times_s[name] * 1e3 <= limit for name, limit in goodput_ms.items())


def _peak_tokens(results: Sequence[RequestResult]) -> float:
    """Return the most events with text in one of the seconds from the first request on."""
    if not results:
        return 0.0
    begin_s = min(result.start_s for result in results)
    seconds: Counter[int] = Counter()
    for result in results:
        first_s = result.start_s + result.ttft_s - begin_s
        seconds.update(int(at_s) for at_s in accumulate(result.itls_s, initial=first_s))
    return float(max(seconds.values()))


def _peak_concurrency(results: Sequence[RequestResult]) -> int:
    """Return the most requests between sending and last token at one moment; an end comes before a start."""
    ends = [(result.start_s + result.latency_s, -1) for result in results]
    changes = sorted([*ends, *((result.start_s, 1) for result in results)])
    return max(accumulate((change for _, change in changes), initial=0))
