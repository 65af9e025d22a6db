"""The rank processes that this host has of a deployment, as torchrun would start them, or has.

Knows nothing of how they are started.
"""

from __future__ import annotations

from pathlib import Path

from launch.child import EPOCH
from launch.child_process import ChildSpec
from launch.log_dir import sink_of
from launch.parent_death import RUN_DIR
from launch.run_dir import adopts_ranks
from tprt.config import Config

LOOPBACK = "lo"


def make_rank_specs(config: Config, run_dir: Path, epoch: int, interface: str) -> list[ChildSpec]:
    """Return the ranks of `epoch` on the host of `config.hosts.node_rank`.

    Args:
        config: the deployment.
        run_dir: that of this host.
        epoch: number of the worker group.
        interface: the network interface that joins the ranks.
    """
    ranks = config.ranks_of(config.hosts.node_rank)
    common = {
        RUN_DIR: str(run_dir),
        EPOCH: str(epoch),
        "GLOO_SOCKET_IFNAME": interface,
        "WORLD_SIZE": str(config.parallel.tensor_parallel_size),
        "LOCAL_WORLD_SIZE": str(len(ranks)),
    }
    if config.hosts.nnodes > 1:
        common["NCCL_SOCKET_IFNAME"] = interface
    specs = []
    is_launched = adopts_ranks(run_dir)
    for local_rank, rank in enumerate(ranks):
        env = common | {"RANK": str(rank), "LOCAL_RANK": str(local_rank)}
        sink = sink_of(f"rank {rank}", config.logging, local_rank)
        # The process that torchrun calls the first of this host is the one that starts this one.
        is_adopted = is_launched and local_rank > 0
        specs.append(
            ChildSpec(f"rank {rank}", "launch.worker_entry", env, sink=sink, rank=rank, is_adopted=is_adopted)
        )
    return specs
