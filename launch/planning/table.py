"""How a plan is shown: tables for people, plain values for `--json`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from rich import box
from rich.console import Console
from rich.table import Table

from launch.planning.decode import DecodeForecast
from launch.planning.decode_time import DecodeTime
from launch.planning.plan import DeploymentPlan, RankPlan
from launch.planning.replica_plans import ReplicaPlan
from tprt.worker.memory_budget import gib

_MIB = 2**20
_RANK_HEADINGS = (
    *("rank", "q heads", "kv heads", "channels", "vocab", "weights MiB", "KV B/token"),
    *("blocks", "tokens"),
)
_REPLICA_HEADINGS = ("replica", "devices", "memory", "weights", "KV blocks", "tokens", "full sequences")
_TIME_HEADINGS = ("ranks", "batch", "reading ms", "kernels ms", "all-reduce ms", "step ms", "tokens/s", "fits")
_FITS = {True: "yes", False: "no", None: "?"}


def to_json(
    planned: DeploymentPlan, replicas: Sequence[ReplicaPlan], forecast: DecodeForecast, warnings: list[str]
) -> dict[str, object]:
    """Return everything that is known, in bytes and milliseconds.

    Args:
        planned: the first replica.
        replicas: each, and all together as the last one.
        forecast: of the first replica.
        warnings: of all.
    """
    *each, total = replicas
    return {
        "ranks": [_rank_fields(rank, planned) | _budget_fields(rank) for rank in planned.ranks],
        "device": planned.device,
        "dtype": str(planned.dtype).removeprefix("torch."),
        "imbalance": round(planned.imbalance, 4),
        "num_blocks": planned.num_blocks,
        "num_tokens": planned.num_tokens,
        "max_model_len": planned.max_model_len,
        "max_full_sequences": planned.max_full_sequences,
        "legal_world_sizes": list(planned.legal_world_sizes),
        "decode": {
            "context_len": forecast.context_len,
            "assumptions": list(forecast.assumptions),
            "times": [_time_fields(time) | {"fits": forecast.fits[time.num_ranks]} for time in forecast.times],
        },
        "num_replicas": len(each),
        "replicas": [{"replica": int(one.name)} | _replica_fields(one) for one in each],
        "total": _replica_fields(total),
        "warnings": warnings,
    }


def _replica_fields(replica: ReplicaPlan) -> dict[str, object]:
    fields = asdict(replica)
    del fields["name"]
    return fields | {"devices": list(replica.devices)}


def _rank_fields(rank: RankPlan, planned: DeploymentPlan) -> dict[str, object]:
    shard, num_blocks = rank.shard, rank.num_blocks
    return {
        "rank": shard.rank,
        "q_heads": shard.q_heads.size,
        "kv_heads": shard.kv_heads.size,
        "mlp_channels": shard.mlp_channels.size,
        "vocab_rows": shard.vocab_rows.size,
        "weight_bytes": rank.weight_bytes,
        "kv_bytes_per_token": rank.kv_bytes_per_token,
        "num_blocks": num_blocks,
        "num_tokens": None if num_blocks is None else num_blocks * planned.block_size,
    }


def _budget_fields(rank: RankPlan) -> dict[str, object]:
    return {"memory": None if rank.budget is None else asdict(rank.budget)}


def _time_fields(time: DecodeTime) -> dict[str, object]:
    return {
        "num_ranks": time.num_ranks,
        "batch_size": time.batch_size,
        "read_ms": round(time.read_ms, 4),
        "kernels_ms": round(time.kernels_ms, 4),
        "all_reduce_ms": round(time.all_reduce_ms, 4),
        "step_ms": round(time.total_ms, 4),
        "tokens_per_s": round(time.tokens_per_s, 1),
    }


def print_plan(
    planned: DeploymentPlan, replicas: Sequence[ReplicaPlan], forecast: DecodeForecast, warnings: list[str]
) -> None:
    """Print the tables, with what they rest on; the arguments are those of `to_json`."""
    console = Console(highlight=False)
    *each, _ = replicas
    if len(each) > 1:
        console.print(_replica_table(replicas))
        line = (
            f"{len(each)} replicas, which serve different requests at the same time; what follows is replica 0"
        )
        console.print(line, markup=False, soft_wrap=True)
    console.print(_rank_table(planned))
    low, high = planned.legal_world_sizes
    dtype = str(planned.dtype).removeprefix("torch.")
    lines = [
        f"{dtype} on {planned.device}; the heaviest rank has {planned.imbalance:.3f} times the mean of the"
        " weights",
        f"this model can be split over {low} to {high} ranks",
        _capacity(planned),
    ]
    console.print("\n".join(lines), markup=False, soft_wrap=True)
    if planned.device != "cpu" and planned.ranks[0].budget is not None:
        console.print(_budget_table(planned))
    console.print(_time_table(planned, forecast))
    lines = [f"a decode step with {forecast.context_len:,} tokens of context:", *forecast.assumptions]
    console.print("\n  ".join(lines), markup=False, soft_wrap=True)
    for warning in warnings:
        console.print(f"warning: {warning}", markup=False, soft_wrap=True, style="yellow")


def _capacity(planned: DeploymentPlan) -> str:
    if planned.num_blocks is None:
        return "KV blocks depend on the memory of the GPUs: give it with --memory-gib"
    return (
        f"{planned.num_blocks:,} KV blocks hold {planned.num_tokens:,} tokens:"
        f" {planned.max_full_sequences:,} sequences of {planned.max_model_len:,}"
    )


def _new_table(headings: tuple[str, ...]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    for name in headings:
        table.add_column(name, justify="right")
    return table


def _replica_table(replicas: Sequence[ReplicaPlan]) -> Table:
    table = _new_table(_REPLICA_HEADINGS)
    for replica in replicas:
        sizes = (replica.device_bytes, replica.weight_bytes, replica.kv_bytes)
        counts = (replica.num_tokens, replica.max_full_sequences)
        unknown = "?" if replica.devices else "-"
        table.add_row(
            replica.name,
            ",".join(replica.devices) or "-",
            *(unknown if size is None else gib(size) for size in sizes),
            *("?" if count is None else f"{count:,}" for count in counts),
        )
    return table


def _rank_table(planned: DeploymentPlan) -> Table:
    table = _new_table(_RANK_HEADINGS)
    for rank in planned.ranks:
        fields = _rank_fields(rank, planned) | {"weight_bytes": round(rank.weight_bytes / _MIB)}
        table.add_row(*("?" if value is None else f"{value:,}" for value in fields.values()))
    return table


def _budget_table(planned: DeploymentPlan) -> Table:
    """Where the memory of each rank goes, with the KV blocks that all ranks can hold."""
    table = _new_table(("rank", "total", "others", "weights", "workspace", "KV blocks", "left over"))
    for rank in planned.ranks:
        budget = rank.budget
        assert budget is not None
        kv_bytes = (planned.num_tokens or 0) * rank.kv_bytes_per_token
        left = budget.total - budget.others - budget.weights - budget.workspace - kv_bytes
        sizes = (budget.total, budget.others, budget.weights, budget.workspace, kv_bytes, left)
        table.add_row(str(rank.shard.rank), *map(gib, sizes))
    return table


def _time_table(planned: DeploymentPlan, forecast: DecodeForecast) -> Table:
    table = _new_table(_TIME_HEADINGS)
    for time in forecast.times:
        marked = "bold" if time.num_ranks == len(planned.ranks) else None
        times = (time.read_ms, time.kernels_ms, time.all_reduce_ms, time.total_ms)
        table.add_row(
            str(time.num_ranks),
            str(time.batch_size),
            *(f"{value:.2f}" for value in times),
            f"{time.tokens_per_s:,.0f}",
            _FITS[forecast.fits[time.num_ranks]],
            style=marked,
        )
    return table
