"""Where the time of a captured decode step goes, kernel by kernel, on one GPU, against the least it could take.

Usage: profile_decode.py CONFIG [--batch-size 1,8,64] [--context-len 256]

For each batch: microseconds of a step, those of reading weights, keys and values at the peak of the data sheet,
and the kernels of a step by name: how many, and what they add, from torch's profiler. A kernel adds the time
from the end of the one before to its own end: little where it began early, and with the gap in front of it.
Knows nothing of scheduling: steps are made here, and launched one behind the other.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

# Run as a file, this finds only scripts/ on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from launch.config_file import load_config
from launch.planning.bandwidth import peak_gbs
from launch.planning.decode_time import Batch, bytes_read
from tprt.checkpoint_config import read_checkpoint_config
from tprt.config import Config
from tprt.distributed import TPGroup
from tprt.errors import ConfigError
from tprt.messages import StepInput
from tprt.sharding import make_shard_plan, shape_of
from tprt.worker.model_runner import ModelRunner

_STEPS, _ROUNDS, _SHOWN = 32, 7, 20


def make_step(number: int, batch_size: int, context_len: int, block_size: int) -> StepInput:
    """Return a decode of `batch_size` sequences with `context_len` tokens each, in blocks of their own."""
    num_blocks = -(-context_len // block_size)
    zeros, ones = np.zeros(batch_size, np.float32), np.ones(batch_size, np.int32)
    return StepInput(
        epoch=0,
        step=number,
        num_decodes=batch_size,
        seq_slots=np.arange(batch_size, dtype=np.int32),
        query_lens=ones,
        context_lens=ones * context_len,
        token_ids=ones,
        block_ids=np.arange(batch_size * num_blocks, dtype=np.int32),
        samples=np.ones(batch_size, np.uint8),
        temperatures=zeros,
        top_ks=ones * 0,
        top_ps=zeros + 1,
        min_ps=zeros,
        seeds=np.zeros(batch_size, np.int64),
        num_logprobs=ones * -1,
    )


def run_ahead(runner: ModelRunner, steps: list[StepInput]) -> None:
    """Launch every step before the one ahead of it is waited for, as the engine does."""
    pending = runner.launch(steps[0])
    for step in steps[1:]:
        behind = runner.launch(step)
        pending.wait()
        pending = behind
    pending.wait()


def time_steps(runner: ModelRunner, steps: list[StepInput]) -> float:
    """Return microseconds of a step, the median of rounds; a step is waited for when the next has begun."""
    rounds = []
    for _ in range(_ROUNDS):
        began_s = time.perf_counter()
        run_ahead(runner, steps)
        rounds.append((time.perf_counter() - began_s) / len(steps) * 1e6)
    return statistics.median(rounds)


def profile_steps(runner: ModelRunner, steps: list[StepInput]) -> list[tuple[str, float, float]]:
    """Return name, number and added microseconds of each kind of kernel in a step, the longest first."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        run_ahead(runner, steps)
    events = [event for event in profiled.events() if event.device_type.name == "CUDA"]
    events.sort(key=lambda event: event.time_range.end)
    found: defaultdict[str, list[float]] = defaultdict(list)
    for before, event in pairwise(events):
        found[event.name].append(event.time_range.end - before.time_range.end)
    rows = [(name, len(times) / len(steps), sum(times) / len(steps)) for name, times in found.items()]
    return sorted(rows, key=lambda row: -row[2])


def show(config: Config, runner: ModelRunner, batch_size: int, context_len: int, bandwidth_gbs: float) -> None:
    """Print the lines of a batch."""
    steps = [make_step(n, batch_size, context_len, config.cache.block_size) for n in range(_STEPS)]
    step_us = time_steps(runner, steps)
    shape = shape_of(read_checkpoint_config(config.model.path))
    num_bytes = bytes_read(shape, make_shard_plan(shape, 1).shards[0], Batch(batch_size, context_len, 2))
    rows = profile_steps(runner, steps)
    print(f"batch {batch_size}, {context_len} tokens: {step_us:.0f} us a step,", end=" ")
    print(f"{num_bytes / bandwidth_gbs / 1e3:.0f} us of reading,", end=" ")
    print(f"{sum(row[1] for row in rows):.0f} kernels that add {sum(row[2] for row in rows):.0f} us")
    for name, count, us in rows[:_SHOWN]:
        print(f"  {us:8.1f} us {count:6.1f} x {us / count:7.2f}  {name[:80]}")
    sys.stdout.flush()


def main() -> None:
    """Print all batches."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--batch-size", default="1,8,64")
    parser.add_argument("--context-len", type=int, default=256)
    options = parser.parse_args()
    config = load_config(options.config, ())
    runner = ModelRunner(config, read_checkpoint_config(config.model.path), TPGroup(0, 1), torch.device("cuda"))
    name = torch.cuda.get_device_name()
    bandwidth_gbs = peak_gbs(name)
    if bandwidth_gbs is None:
        raise ConfigError(
            f"the memory bandwidth of {name} is not known; add it to launch/planning/bandwidth.py"
        )
    print(f"{name}, torch {torch.__version__}, {bandwidth_gbs:,.0f} GB/s")
    runner.load()
    runner.allocate_kv_blocks()
    for size in options.batch_size.split(","):
        show(config, runner, int(size), options.context_len, bandwidth_gbs)


if __name__ == "__main__":
    main()
