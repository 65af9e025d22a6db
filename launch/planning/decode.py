"""The decode times that `tprt plan` predicts: on which numbers of ranks, and with which assumptions.

Knows nothing of how the result is shown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from launch.cuda_devices import CudaDevice
from launch.cuda_driver import are_gpus_linked
from launch.devices import choose_all_reduce
from launch.planning.all_reduce_time import SOURCES, all_reduce_us
from launch.planning.bandwidth import SHARE_OF_PEAK, gpu_layer_us, measure_cpu_gbs, peak_gbs
from launch.planning.decode_time import Batch, DecodeTime, Machine, predict_decode, slower_than_fewer
from launch.planning.memory import RankMemory
from launch.planning.plan import DeploymentPlan, cuda_budget, planned_device
from tprt.checkpoint_config import read_checkpoint_config
from tprt.config import Config
from tprt.errors import ConfigError
from tprt.sharding import ShardPlan, make_shard_plan
from tprt.worker.kv_cache import kv_block_bytes

_NUM_RANKS = (1, 2, 4, 8)
_ASSUMED_GPU = "H100"


@dataclass(frozen=True, slots=True)
class DecodeOptions:
    """What is predicted, and what the person who asks knows of the devices (None: find out)."""

    batch_size: int
    context_len: int
    bandwidth_gbs: float | None = None
    all_reduce_us: float | None = None


@dataclass(frozen=True, slots=True)
class DecodeForecast:
    """Predicted steps, whether each number of ranks fits (None: not known), what was assumed, what to heed."""

    times: tuple[DecodeTime, ...]
    fits: dict[int, bool | None]
    context_len: int
    assumptions: tuple[str, ...]
    warnings: tuple[str, ...]


def forecast_decode(
    config: Config,
    planned: DeploymentPlan,
    options: DecodeOptions,
    devices: Sequence[CudaDevice],
    memory: Sequence[RankMemory] | None,
) -> DecodeForecast:
    """Predict decode steps of one sequence and of `batch_size`, on the planned and other numbers of ranks."""
    machine, assumptions = _machine(config, options, devices)
    context_len = min(options.context_len, planned.max_model_len)
    plans = _plans(planned)
    fits = {plan.world_size: _fits(config, planned, plan, memory) for plan in plans}
    times = [
        predict_decode(plan, Batch(size, context_len, planned.dtype.itemsize), machine)
        for size in dict.fromkeys((1, options.batch_size))
        for plan in plans
    ]
    return DecodeForecast(
        times=tuple(times),
        fits=fits,
        context_len=context_len,
        assumptions=assumptions,
        warnings=tuple(_warnings(times, fits)),
    )


def _plans(planned: DeploymentPlan) -> list[ShardPlan]:
    """Return the planned split, and even ones over other numbers of ranks."""
    own = planned.shards
    low, high = planned.legal_world_sizes
    others = [n for n in _NUM_RANKS if low <= n <= high and n != own.world_size]
    plans = [own, *(make_shard_plan(own.shape, number) for number in others)]
    return sorted(plans, key=lambda plan: plan.world_size)


def _fits(
    config: Config, planned: DeploymentPlan, plan: ShardPlan, memory: Sequence[RankMemory] | None
) -> bool | None:
    """Say whether weights, workspace and one KV block fit on every rank; None where memory is not known."""
    if plan is planned.shards:
        return None if planned.num_blocks is None else planned.num_blocks > 0
    if memory is None:
        return None
    checkpoint = read_checkpoint_config(config.model.path)
    least = min(memory, key=lambda rank: rank.total - rank.others)
    for shard in plan.shards:
        weight_bytes = shard.weight_elements(plan.shape) * planned.dtype.itemsize
        budget = cuda_budget(config, shard, planned.dtype, least, weight_bytes)
        if not budget.num_blocks(kv_block_bytes(checkpoint, shard, planned.block_size, planned.dtype)):
            return False
    return True


def _machine(
    config: Config, options: DecodeOptions, devices: Sequence[CudaDevice]
) -> tuple[Machine, tuple[str, ...]]:
    device = planned_device(config)
    bandwidth_gbs, bandwidth_from = _bandwidth(device.type, options.bandwidth_gbs, devices)
    shared = " shared by all ranks" if device.type == "cpu" else ""
    is_spread = config.hosts.nnodes > 1
    num_ranks = config.parallel.tensor_parallel_size
    # Devices that this host has not cannot be asked.
    are_linked = are_gpus_linked(num_ranks) if num_ranks <= len(devices) else None
    backend = choose_all_reduce(
        config.parallel.all_reduce, device.type, are_linked=are_linked, is_spread=is_spread
    )
    machine = Machine(
        bandwidth_gbs=bandwidth_gbs,
        shares_memory=device.type == "cpu",
        layer_us=gpu_layer_us if device.type == "cuda" else lambda batch_size: 0.0,
        all_reduce_us=_all_reduce(backend, options.all_reduce_us),
    )
    given = "--allreduce-us" if options.all_reduce_us is not None else SOURCES[backend]
    return machine, (
        f"memory is read at {bandwidth_gbs:,.0f} GB/s{shared}: {bandwidth_from}",
        *_kernels_line(machine, device.type),
        f"an all-reduce takes the time of: {given}",
    )


def _kernels_line(machine: Machine, kind: str) -> tuple[str, ...]:
    if kind == "cpu":
        return ()
    one_row, several = machine.layer_us(1), machine.layer_us(2)
    return (f"kernels of a layer take {one_row:.0f} us besides, with more rows {several:.0f}: as seen on H200",)


def _all_reduce(backend: str, fixed_us: float | None) -> Callable[[int, int], float]:
    if fixed_us is None:
        return lambda num_ranks, num_bytes: all_reduce_us(backend, num_ranks, num_bytes)
    if not 0 <= fixed_us < math.inf:
        raise ConfigError(f"--allreduce-us is {fixed_us}; expected a number of 0 or more")
    return lambda num_ranks, num_bytes: 0.0 if num_ranks == 1 else fixed_us


def _bandwidth(kind: str, given_gbs: float | None, devices: Sequence[CudaDevice]) -> tuple[float, str]:
    """Return GB/s of one device, and where the figure comes from."""
    if given_gbs is not None:
        if not 0 < given_gbs < math.inf:
            raise ConfigError(f"--bandwidth-gbs is {given_gbs}; expected a number above 0")
        return given_gbs, "--bandwidth-gbs"
    if kind == "cpu":
        return measure_cpu_gbs(), "measured here by copying"
    known = [(peak, device.name) for device in devices if (peak := peak_gbs(device.name)) is not None]
    if known:
        peak, name = min(known)
        return SHARE_OF_PEAK * peak, f"{SHARE_OF_PEAK:.0%} of the peak of {name}"
    peak = peak_gbs(_ASSUMED_GPU) or 0.0
    return SHARE_OF_PEAK * peak, f"{SHARE_OF_PEAK:.0%} of an {_ASSUMED_GPU}'s peak, for want of --bandwidth-gbs"


def _warnings(times: Sequence[DecodeTime], fits: dict[int, bool | None]) -> list[str]:
    """Name the numbers of ranks that a smaller one beats, of those that fit."""
    possible = [time for time in times if fits[time.num_ranks] is not False]
    beaten: dict[DecodeTime, list[str]] = {}
    for time, best in slower_than_fewer(possible):
        beaten.setdefault(best, []).append(f"{time.num_ranks} ({time.total_ms:.2f} ms)")
    return [
        f"more ranks will be slower: at batch {best.batch_size}, {', '.join(slower)} take longer than"
        f" {best.num_ranks} ({best.total_ms:.2f} ms)"
        for best, slower in beaten.items()
    ]
