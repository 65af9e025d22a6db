"""`tprt plan`: what each rank of a deployment will hold and how fast it will be, without loading anything."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from launch.config_file import load_config
from launch.options import ConfigArgument, JsonOption, SetOption
from tprt.config import Config
from tprt.errors import ConfigError

if TYPE_CHECKING:
    from launch.cuda_devices import CudaDevice
    from launch.planning.memory import RankMemory


def plan(
    config: ConfigArgument,
    memory_gib: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GIB[,GIB...]",
            help="Memory of the GPUs, one for all or for each rank; without it, that of this host's GPUs.",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences of the larger batch to predict.")] = 32,
    context_len: Annotated[int, typer.Option(min=1, help="Tokens of each sequence to predict for.")] = 1024,
    bandwidth_gbs: Annotated[
        float | None, typer.Option(help="GB/s at which a device reads its memory; found out if not given.")
    ] = None,
    allreduce_us: Annotated[
        float | None, typer.Option(help="Microseconds of one all-reduce; from a table if not given.")
    ] = None,
    as_json: JsonOption = False,
    set_: SetOption = None,
) -> None:
    """Show what each rank will hold and how long a decode step will take, without loading anything.

    KV blocks are those that fit into cache.memory_fraction of a GPU beside weights and workspace, or into
    cache.cpu_memory_gib of a CPU rank, unless cache.num_blocks is set.
    """
    # torch is imported for this command only
    from launch.planning.decode import DecodeOptions, forecast_decode
    from launch.planning.replica_plans import plan_replicas, replica_plans, replica_warnings
    from launch.planning.table import print_plan, to_json

    devices, shares = _resolve(load_config(config, set_ or ()), memory_gib)
    plans = plan_replicas(shares)
    options = DecodeOptions(batch_size, context_len, bandwidth_gbs, allreduce_us)
    # Tables of ranks and times are of the first replica.
    planned, (settings, memory) = plans[0], shares[0]
    forecast = forecast_decode(settings, planned, options, devices, memory)
    warnings = [*replica_warnings(plans), *forecast.warnings]
    replicas = replica_plans(plans)
    if as_json:
        print(json.dumps(to_json(planned, replicas, forecast, warnings)))
    else:
        print_plan(planned, replicas, forecast, warnings)


def _resolve(
    config: Config, memory_gib: Sequence[str] | None
) -> tuple[Sequence[CudaDevice], list[tuple[Config, Sequence[RankMemory] | None]]]:
    """Return this host's GPUs if they matter, and each replica's memory and settings with nothing left open."""
    from launch.cuda_devices import look_at_devices
    from launch.planning.memory import given_memory, memory_of_ranks, parse_memory_gib
    from launch.planning.plan import planned_device
    from launch.planning.rank_weights import fit_to_memory, resolve_rank_weights
    from launch.planning.replica_plans import pad_devices
    from launch.replicas import share_of

    parallel = config.parallel
    num_ranks, num_replicas = parallel.tensor_parallel_size, parallel.data_parallel_size
    if memory_gib:
        config = _on_cuda(config)
        sizes = parse_memory_gib(memory_gib, num_ranks, num_replicas)
        totals = [share_of(sizes, number, num_ranks) for number in range(num_replicas)]
        return look_at_devices(), [(fit_to_memory(config, own), given_memory(own)) for own in totals]
    if planned_device(config).type == "cpu":
        return (), [(resolve_rank_weights(config, look=list), None)] * num_replicas
    devices = look_at_devices()
    if num_replicas == 1:
        parts: list[Sequence[CudaDevice]] = [devices]
    else:
        padded = pad_devices(devices, num_ranks * num_replicas)
        parts = [share_of(padded, number, num_ranks) for number in range(num_replicas)]
    return devices, [
        (
            resolve_rank_weights(config, look=partial(list, own)),
            memory_of_ranks(own, num_ranks, parallel.allow_shared_gpu),
        )
        for own in parts
    ]


def _on_cuda(config: Config) -> Config:
    """Return settings for GPUs, since their memory was given."""
    if config.runtime.device == "cpu":
        raise ConfigError(
            "--memory-gib is the memory of GPUs and runtime.device is cpu; set cache.cpu_memory_gib instead"
        )
    runtime = config.runtime.model_copy(update={"device": "cuda"})
    return config.model_copy(update={"runtime": runtime})
