"""The options of `tprt bench throughput`, `latency` and `startup`."""

from __future__ import annotations

from typing import Annotated

import typer

from launch.bench.rows import print_rows, split_numbers
from launch.config_file import load_config
from launch.options import ConfigArgument, JsonOption, SetOption
from launch.torchrun_options import with_torchrun_options

RepeatsOption = Annotated[int, typer.Option(min=1, help="Measured rounds.")]


@with_torchrun_options
def throughput(
    config: ConfigArgument,
    num_seqs: Annotated[int, typer.Option(min=1, help="Requests, all at once.")] = 256,
    min_len: Annotated[int, typer.Option(min=1, help="Fewest tokens of a prompt, and of an output.")] = 100,
    max_len: Annotated[int, typer.Option(help="Most tokens of a prompt, and of an output.")] = 1024,
    temperature: Annotated[float, typer.Option(help="Of all requests; 0 is greedy.")] = 0.6,
    repeats: RepeatsOption = 3,
    as_json: JsonOption = False,
    set_: SetOption = None,
) -> None:
    """Output tokens per second of many requests at once; by default the benchmark of nano-vllm."""
    from launch.bench.engine import ThroughputWorkload, bench_throughput

    workload = ThroughputWorkload(num_seqs, min_len, max_len, temperature)
    print_rows(bench_throughput(load_config(config, set_ or ()), workload, repeats), as_json)


@with_torchrun_options
def latency(
    config: ConfigArgument,
    batch_size: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1,8,64",
    input_len: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 128,
    output_len: Annotated[int, typer.Option(min=2, help="Tokens of each output.")] = 256,
    repeats: RepeatsOption = 3,
    as_json: JsonOption = False,
    set_: SetOption = None,
) -> None:
    """Time to first token and milliseconds per decode step of batches that start together."""
    from launch.bench.engine import bench_latency

    sizes = split_numbers("--batch-size", batch_size)
    rows = bench_latency(load_config(config, set_ or ()), sizes, input_len, output_len, repeats)
    print_rows(rows, as_json)


@with_torchrun_options
def startup(
    config: ConfigArgument, repeats: RepeatsOption = 1, as_json: JsonOption = False, set_: SetOption = None
) -> None:
    """Seconds from the start of the processes to the first token, by phase and rank."""
    from launch.bench.engine import bench_startup

    print_rows(bench_startup(load_config(config, set_ or ()), repeats), as_json)
