"""Whether what the deployment will hold fits into what is there, as `tprt plan` predicts it."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from launch.doctor.finding import Finding, bad, ok, refused, skipped, warning
from launch.doctor.request import DoctorRequest
from launch.doctor.shared_memory import own_bytes
from launch.planning.memory import memory_of_ranks
from launch.planning.plan import DeploymentPlan, capacity_warnings, plan_deployment
from launch.planning.rank_weights import resolve_rank_weights
from tprt.errors import CheckpointError, ConfigError, ShardPlanError, UnsupportedModelError
from tprt.host_limits import available_bytes
from tprt.worker.memory_budget import gib

# A process of torch, coordinator, server and launcher among them, without any weights.
_PROCESS_BYTES = 300 * 2**20
_FEWER_BLOCKS = "lower cache.num_blocks or cache.cpu_memory_gib, use fewer ranks or a smaller model"
_MORE_BLOCKS = "lower model.max_model_len, use more ranks, or raise cache.num_blocks or what limits it"


def check_memory(request: DoctorRequest) -> Iterator[Finding]:
    """Predict the memory of each rank, on the devices that were found or on the CPU."""
    config = request.config
    devices = request.devices if torch.version.cuda else []
    try:
        config = resolve_rank_weights(config, look=lambda: devices)
        memory = memory_of_ranks(
            devices, config.parallel.tensor_parallel_size, config.parallel.allow_shared_gpu
        )
        planned = plan_deployment(config, memory)
    except (CheckpointError, UnsupportedModelError, ShardPlanError):
        yield skipped("memory", "the model cannot be planned: see model")
        return
    except ConfigError as error:
        yield refused("memory", error, "change the setting that is named")
        return
    yield _judge_cpu(request, planned) if planned.device == "cpu" else _judge_cuda(request, planned)


def _judge_cuda(request: DoctorRequest, planned: DeploymentPlan) -> Finding:
    if planned.num_blocks is None:
        why = "no CUDA device to plan for: tprt plan with --memory-gib tells what fits"
        return skipped("memory", why)
    ranks = [
        f"rank {rank.shard.rank} {gib(rank.weight_bytes)} of weights"
        f" on {gib(0 if rank.budget is None else rank.budget.total)}"
        for rank in (planned.ranks[number] for number in request.ranks)
    ]
    return _judge_blocks(planned, ", ".join(ranks))


def _judge_cpu(request: DoctorRequest, planned: DeploymentPlan) -> Finding:
    ranks = [planned.ranks[rank] for rank in request.ranks]
    num_replicas = request.config.parallel.data_parallel_size
    weights = num_replicas * sum(rank.weight_bytes for rank in ranks)
    blocks = num_replicas * sum(rank.kv_bytes_per_token * (planned.num_tokens or 0) for rank in ranks)
    others = num_replicas * own_bytes(request) + _PROCESS_BYTES * (request.num_processes + 1)
    needed, there = weights + blocks + others, available_bytes()
    text = (
        f"weights {gib(weights)}, KV blocks {gib(blocks)}, processes and what they share {gib(others)}:"
        f" {gib(needed)} of the {gib(there)} that are there"
    )
    details = {"weights": weights, "kv_blocks": blocks, "others": others, "available": there}
    if needed > there:
        return bad("memory", text, _FEWER_BLOCKS, **details)
    return _judge_blocks(planned, text)


def _judge_blocks(planned: DeploymentPlan, text: str) -> Finding:
    details = {"num_blocks": planned.num_blocks, "num_tokens": planned.num_tokens}
    for line in capacity_warnings(planned):
        if not planned.num_blocks:
            found, _, fix = line.partition(": ")
            return bad("memory", f"{text}; {found}", fix, **details)
        return warning("memory", f"{text}; {line}", _MORE_BLOCKS, **details)
    return ok("memory", f"{text}; {planned.num_tokens:,} tokens fit into the KV blocks", **details)
