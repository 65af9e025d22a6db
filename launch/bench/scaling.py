"""`tprt bench scaling`: tokens per second of one model on several numbers of ranks, side by side.

All deployments are up at the same time and take turns, so that a noisy minute hits all of them; those that
wait cost no CPU. Every rank gets its share of the same cores.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import ExitStack

from launch.bench.compare_hf import Workload, time_run
from launch.llm import LLM
from tprt.checkpoint_config import read_checkpoint_config
from tprt.config import Config


def bench_scaling(
    config: Config, ranks: Sequence[int], workloads: Sequence[Workload], repeats: int
) -> list[dict[str, float]]:
    """Run every workload on every number of ranks; return medians, and their ratio to the first number.

    Raises:
        EngineDeadError: a deployment failed.
        ShardPlanError: the model cannot be split over one of the numbers.
    """
    rows = []
    vocab_size = read_checkpoint_config(config.model.path).vocab_size
    with ExitStack() as stack:
        engines = [stack.enter_context(LLM(_with_ranks(config, count))) for count in ranks]
        for workload in workloads:
            prompts = workload.prompts(vocab_size)
            times_s: list[list[float]] = [[] for _ in engines]
            for repeat in range(repeats + 1):
                for engine, taken_s in zip(engines, times_s, strict=True):
                    run_s = time_run(engine, prompts, workload.new_tokens)
                    if repeat > 0:  # the first round warms up
                        taken_s.append(run_s)
            speeds = [workload.batch * workload.new_tokens / statistics.median(taken_s) for taken_s in times_s]
            rows += [_row(workload, *pair, speeds[0]) for pair in zip(ranks, speeds, strict=True)]
    return rows


def _with_ranks(config: Config, count: int) -> Config:
    parallel = config.parallel.model_copy(update={"tensor_parallel_size": count, "rank_weights": None})
    return config.model_copy(update={"parallel": parallel})


def _row(workload: Workload, ranks: int, speed: float, first: float) -> dict[str, float]:
    return {
        "batch": workload.batch,
        "ranks": ranks,
        "tokens_per_s": round(speed, 1),
        "ratio": round(speed / first, 2),
    }
