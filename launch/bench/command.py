"""`tprt bench`: measurements, each with a peer beside it in the same run."""

from __future__ import annotations

from typing import Annotated

import typer

from launch.bench import engine_command as bench_engine_command
from launch.bench import serve_command as bench_serve_command
from launch.bench.rows import print_rows, split_numbers
from launch.config_file import load_config
from launch.options import ConfigArgument, JsonOption, SetOption
from tprt.errors import ConfigError

app = typer.Typer(help="Measure, with a peer beside in the same run.", no_args_is_help=True)
app.command()(bench_engine_command.throughput)
app.command()(bench_engine_command.latency)
app.command()(bench_engine_command.startup)
app.command()(bench_serve_command.serve)


@app.command("compare-hf")
def compare_hf(
    config: ConfigArgument,
    batches: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1,8",
    prompt_len: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 32,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate for each prompt.")] = 48,
    repeats: Annotated[int, typer.Option(min=1, help="Measured rounds, after one to warm up.")] = 3,
    as_json: JsonOption = False,
    set_: SetOption = None,
) -> None:
    """Tokens per second beside transformers' generate, same model, dtype and threads."""
    from launch.bench.compare_hf import Workload, compare_with_hf

    workloads = [Workload(batch, prompt_len, new_tokens) for batch in split_numbers("--batches", batches)]
    print_rows(compare_with_hf(load_config(config, set_ or ()), workloads, repeats), as_json)


@app.command("scaling")
def scaling(
    config: ConfigArgument,
    ranks: Annotated[str, typer.Option(help="Numbers of ranks, separated by commas.")] = "1,2",
    batches: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1,8",
    prompt_len: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 32,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate for each prompt.")] = 48,
    repeats: Annotated[int, typer.Option(min=1, help="Measured rounds, after one to warm up.")] = 5,
    as_json: JsonOption = False,
    set_: SetOption = None,
) -> None:
    """Tokens per second on several numbers of ranks, and the ratio to the first, on the same cores."""
    from launch.bench.compare_hf import Workload
    from launch.bench.scaling import bench_scaling

    workloads = [Workload(batch, prompt_len, new_tokens) for batch in split_numbers("--batches", batches)]
    counts = split_numbers("--ranks", ranks)
    print_rows(bench_scaling(load_config(config, set_ or ()), counts, workloads, repeats), as_json)


@app.command("broadcast")
def broadcast(
    readers: Annotated[str, typer.Option(help="Numbers of readers, separated by commas.")] = "1,2,4",
    num_bytes: Annotated[
        str, typer.Option("--bytes", help="Sizes of a message, separated by commas.")
    ] = "256,4096,65536,1048576",
    gap_us: Annotated[
        int,
        typer.Option(
            min=0, help="Mean pause between messages whose latency is taken; the readers sleep in it."
        ),
    ] = 1000,
    seconds: Annotated[float, typer.Option(min=0, help="How long to send for each row, about.")] = 0.7,
    idle: Annotated[
        bool, typer.Option("--idle", help="The cost and wake-up of idle readers; smallest size alone.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Latency and rate of the ring that carries steps, beside what others do.

    p50 and p99 are one way, over all readers, with a random pause of 0.5 to 1.5 times --gap-us once the slowest
    reader has the message before; messages per second are without a pause.
    """
    from launch.bench.broadcast import Pace, bench_broadcast, bench_idle

    counts, sizes = split_numbers("--readers", readers), split_numbers("--bytes", num_bytes)
    pace = Pace(gap_us / 1e6, seconds)
    rows = bench_idle(counts, min(sizes), pace) if idle else bench_broadcast(counts, sizes, pace)
    print_rows(rows, as_json)


@app.command("step")
def step(
    config: ConfigArgument,
    num_seqs: Annotated[int, typer.Option(help="Sequences that run.")] = 256,
    context_len: Annotated[int, typer.Option(help="Tokens of each, about.")] = 2048,
    steps: Annotated[int, typer.Option(help="Measured decode steps, after some to warm up.")] = 300,
    temperature: Annotated[float, typer.Option(help="Of all sequences; 0 is greedy.")] = 1.0,
    as_json: JsonOption = False,
    set_: SetOption = None,
) -> None:
    """What a decode step costs besides the model: scheduling, the way to the ranks, preparing inputs.

    Runs coordinator and ranks against a model that does nothing, on CPUs. No weights are needed: the vocabulary
    and its end tokens are those of the checkpoint's config.json where there is one, else 32,000 tokens. Limits
    of the scheduler and the number of KV blocks are raised to what the sequences need.

    `total` is the sum of the six stages before it; broadcast, decode and prepare are those of the rank that was
    ready last. Not in it: `answer`, rank 0's way back, and `news`, the message to the client, encoded and not
    sent. `step` is the whole turn of the coordinator's loop.
    """
    from launch.bench.step import StepWorkload, bench_step

    workload = StepWorkload(num_seqs, context_len, steps, temperature)
    print_rows(bench_step(load_config(config, set_ or ()), workload), as_json)


@app.command("allreduce")
def allreduce(
    device: Annotated[str, typer.Option(help="Where the ranks compute: cpu or cuda.")] = "cpu",
    readers: Annotated[
        str | None, typer.Option(help="Numbers of ranks, separated by commas; 2,3,4 on a CPU, 2 on GPUs.")
    ] = None,
    num_bytes: Annotated[
        str | None, typer.Option("--bytes", help="Sizes of the tensor, separated by commas.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """The sum over CPU ranks through shared memory, beside gloo; over GPUs by symm_mem, beside nccl.

    On a CPU, of float32 and call by call. On GPUs, of bfloat16, per call: in a CUDA graph, and launched back to
    back; ranks beyond the number of GPUs share them, which nccl refuses.
    """
    from launch.bench.allreduce import run_allreduce_bench
    from launch.bench.allreduce_cuda import CUDA_BYTES, run_cuda_allreduce_bench

    if device not in ("cpu", "cuda"):
        raise ConfigError(f"--device {device}: expected cpu or cuda")
    is_cpu = device == "cpu"
    counts = split_numbers("--readers", readers or ("2,3,4" if is_cpu else "2"))
    sizes = split_numbers("--bytes", num_bytes or ("2304,18432,65536,1048576" if is_cpu else CUDA_BYTES))
    run = run_allreduce_bench if is_cpu else run_cuda_allreduce_bench
    print_rows(run(counts, sizes), as_json)


@app.command("load")
def load(
    config: ConfigArgument,
    ranks: Annotated[str, typer.Option(help="Numbers of ranks, separated by commas.")] = "1,2,4",
    repeats: Annotated[int, typer.Option(help="Rounds, each with every method once.")] = 3,
    as_json: JsonOption = False,
    set_: SetOption = None,
) -> None:
    """Time until all ranks have loaded the checkpoint, and the bytes it takes, cold and warm, beside peers.

    Peers: whole tensors by safetensors' get_tensor, then narrow(); get_slice of exactly the shard; and
    fastsafetensors and runai-model-streamer where they are installed. Ranks compute nothing and are on CPUs.

    `vs ...` is the wall time over that of reading all files once in one stream, or of a peer: less is better.
    `own read` is what a rank read over what it kept of tensors of which no other rank needs the same bytes;
    `all read` and `disk read`, over the size of all tensors, are what all ranks asked for and what the kernel
    fetched for them. `MiB over` is the most resident memory of a rank less its parameters.
    """
    from launch.bench.load import bench_load, for_people

    rows = bench_load(load_config(config, set_ or ()), split_numbers("--ranks", ranks), repeats)
    print_rows(rows if as_json else [for_people(row) for row in rows], as_json)
