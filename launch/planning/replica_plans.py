"""What each replica of a deployment will hold, on which devices, and what they hold together.

Replicas have equally many ranks, and devices of their own that may differ. Knows nothing of how it is shown.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launch.cuda_devices import CudaDevice
from launch.planning.memory import RankMemory
from launch.planning.plan import DeploymentPlan, capacity_warnings, plan_deployment
from launch.replicas import VISIBLE_DEVICES, share_of
from tprt.config import Config


@dataclass(frozen=True, slots=True)
class ReplicaPlan:
    """One replica, or all of them together.

    Attributes:
        name: "0", "1", ... or "all".
        devices: names of its CUDA devices, as CUDA_VISIBLE_DEVICES has them; empty on CPUs.
        device_bytes: memory of its devices; None where that is not known, and on CPUs.
        weight_bytes: weights of all its ranks.
        kv_bytes, num_tokens, max_full_sequences: its KV blocks, the tokens they hold, and the sequences of
            max_model_len that fit at a time; None where that is not known.
    """

    name: str
    devices: tuple[str, ...]
    device_bytes: int | None
    weight_bytes: int
    kv_bytes: int | None
    num_tokens: int | None
    max_full_sequences: int | None


def plan_replicas(shares: Sequence[tuple[Config, Sequence[RankMemory] | None]]) -> list[DeploymentPlan]:
    """Return the plan of each replica, of which each share has the settings and the memory of its ranks.

    Raises:
        CheckpointError, ConfigError, ShardPlanError, UnsupportedModelError: it cannot be deployed.
    """
    plans: list[DeploymentPlan] = []
    for number, share in enumerate(shares):
        # To plan takes its time, and most replicas are alike.
        like = next((earlier for earlier in range(number) if shares[earlier] == share), None)
        plans.append(plan_deployment(*share) if like is None else plans[like])
    return plans


def replica_plans(plans: Sequence[DeploymentPlan], env: Mapping[str, str] = os.environ) -> list[ReplicaPlan]:
    """Return what each replica has, and what all have together as the last one."""
    size = len(plans[0].ranks)
    names = _device_names(len(plans) * size, env) if plans[0].device != "cpu" else []
    each = [_sum_up(str(number), [plan], share_of(names, number, size)) for number, plan in enumerate(plans)]
    return [*each, _sum_up("all", plans, names)]


def pad_devices(devices: Sequence[CudaDevice], num_ranks: int) -> list[CudaDevice]:
    """Return a device for each of `num_ranks`: beyond those that are there, the one with least free memory."""
    if not devices:
        return []
    least = min(devices, key=lambda device: device.free)
    return [*devices, *[least] * (num_ranks - len(devices))]


def replica_warnings(plans: Sequence[DeploymentPlan]) -> list[str]:
    """Say what does not fit into the KV blocks, and of which replica where they are not alike."""
    found = [capacity_warnings(plan) for plan in plans]
    if all(lines == found[0] for lines in found):
        return found[0]
    return [f"replica {number}: {line}" for number, lines in enumerate(found) for line in lines]


def _device_names(count: int, env: Mapping[str, str]) -> list[str]:
    """Return the names of the first devices, also of those that this host does not have."""
    given = [name for name in env.get(VISIBLE_DEVICES, "").split(",") if name]
    return given[:count] if len(given) >= count else [str(index) for index in range(count)]


def _sum_up(name: str, plans: Sequence[DeploymentPlan], devices: Sequence[str]) -> ReplicaPlan:
    ranks = [rank for plan in plans for rank in plan.ranks]
    budgets = [rank.budget.total for rank in ranks if rank.budget is not None]
    is_known = len(budgets) == len(ranks) and plans[0].device != "cpu"
    kv_bytes = [
        None
        if plan.num_tokens is None
        else plan.num_tokens * sum(rank.kv_bytes_per_token for rank in plan.ranks)
        for plan in plans
    ]
    return ReplicaPlan(
        name=name,
        devices=tuple(devices),
        device_bytes=sum(budgets) if is_known else None,
        weight_bytes=sum(rank.weight_bytes for rank in ranks),
        kv_bytes=_total(kv_bytes),
        num_tokens=_total([plan.num_tokens for plan in plans]),
        max_full_sequences=_total([plan.max_full_sequences for plan in plans]),
    )


def _total(values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None
