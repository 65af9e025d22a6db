"""`tprt plan`: what each rank of a deployment will hold, as a table or as JSON, without loading anything."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from launch.config_file import load_config
from launch.options import ConfigArgument, JsonOption, SetOption

if TYPE_CHECKING:
    from launch.plan import DeploymentPlan, RankPlan

_MIB, _GIB = 2**20, 2**30
_HEADINGS = ("rank", "q heads", "kv heads", "channels", "vocabulary", "weights MiB", "KV B/token", "blocks")


def plan(
    config: ConfigArgument,
    memory_gib: Annotated[
        float | None, typer.Option(help="Memory of each GPU; without it, KV blocks of GPUs are not planned.")
    ] = None,
    as_json: JsonOption = False,
    set_: SetOption = None,
) -> None:
    """Show what each rank will hold, without loading anything.

    KV blocks are those that fit into cache.memory_fraction of a GPU beside the weights, or into
    cache.cpu_memory_gib of a CPU rank, unless cache.num_blocks is set. Workspace is not counted.
    """
    # torch is imported for this command only
    from launch.plan import plan_deployment

    memory_bytes = None if memory_gib is None else int(memory_gib * _GIB)
    planned = plan_deployment(load_config(config, set_ or ()), memory_bytes)
    if as_json:
        print(json.dumps(_to_json(planned)))
    else:
        _print(planned)


def _rank_fields(rank: RankPlan) -> dict[str, int | None]:
    shard = rank.shard
    return {
        "rank": shard.rank,
        "q_heads": shard.q_heads.size,
        "kv_heads": shard.kv_heads.size,
        "mlp_channels": shard.mlp_channels.size,
        "vocab_rows": shard.vocab_rows.size,
        "weight_bytes": rank.weight_bytes,
        "kv_bytes_per_token": rank.kv_bytes_per_token,
        "num_blocks": rank.num_blocks,
    }


def _to_json(planned: DeploymentPlan) -> dict[str, object]:
    tokens = None if planned.num_blocks is None else planned.num_blocks * planned.block_size
    return {
        "ranks": [_rank_fields(rank) for rank in planned.ranks],
        "dtype": planned.dtype,
        "imbalance": round(planned.imbalance, 4),
        "num_blocks": planned.num_blocks,
        "num_tokens": tokens,
        "max_model_len": planned.max_model_len,
        "max_full_sequences": planned.max_full_sequences,
        "legal_world_sizes": list(planned.legal_world_sizes),
    }


def _print(planned: DeploymentPlan) -> None:
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    for name in _HEADINGS:
        table.add_column(name, justify="right")
    for rank in planned.ranks:
        fields = _rank_fields(rank) | {"weight_bytes": round(rank.weight_bytes / _MIB)}
        table.add_row(*("?" if value is None else f"{value:,}" for value in fields.values()))
    Console().print(table)
    low, high = planned.legal_world_sizes
    print(f"{planned.dtype}; the heaviest rank has {planned.imbalance:.3f} times the mean of the weights")
    print(f"this model can be split over {low} to {high} ranks")
    if planned.num_blocks is None:
        print("KV blocks depend on the memory of the GPUs: give it with --memory-gib")
        return
    print(
        f"{planned.num_blocks:,} KV blocks hold {planned.num_blocks * planned.block_size:,} tokens:"
        f" {planned.max_full_sequences:,} sequences of {planned.max_model_len:,}"
    )
