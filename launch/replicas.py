"""What each replica of a deployment has of this host: a folder, devices, and a share of the CPUs.

Replica `i` of `n` ranks has the devices `i * n ... i * n + n - 1` of those that are visible; its ranks see no
others, and number them from 0. Knows nothing of processes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TypeVar

from launch.child import REPLICA
from launch.child_process import ChildSpec
from launch.cuda_count import count_cuda_devices
from launch.cuda_devices import CudaDevice, look_from_outside
from launch.log_dir import sink_of
from launch.parent_death import DEPLOYMENT_DIR, RUN_DIR
from launch.planning.rank_weights import resolve_rank_weights
from launch.run_dir import adopts_ranks, replica_dirs
from tprt.config import Config
from tprt.errors import ConfigError

VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Replica:
    """One replica.

    Attributes:
        number: from 0.
        name: "replica 1"; "" for the only one.
        run_dir: where its processes find each other.
        config: its settings, with what was left open settled for it.
        env: what its processes have in their environment.
        rank_env: what its ranks have there besides.
    """

    number: int
    name: str
    run_dir: Path
    config: Config
    env: Mapping[str, str]
    rank_env: Mapping[str, str]

    def equip(self, spec: ChildSpec) -> ChildSpec:
        """Return a process of it with its environment and a log file of its own."""
        if not self.name:
            return replace(spec, env={**spec.env, **self.env})
        env = {**spec.env, **self.env, **({} if spec.rank is None else self.rank_env)}
        size = self.config.parallel.tensor_parallel_size
        local_rank = None if spec.rank is None else self.number * size + spec.rank
        return replace(spec, env=env, sink=sink_of(f"{self.name} {spec.name}", self.config.logging, local_rank))


def share_out(
    config: Config,
    run_dir: Path,
    count: Callable[[], int] = count_cuda_devices,
    look: Callable[[], Sequence[CudaDevice]] = look_from_outside,
) -> list[Replica]:
    """Return the replicas of a deployment whose folder is `run_dir`.

    Raises:
        ConfigError: there are too few devices, they cannot be looked at, or torchrun has started the ranks.
    """
    num_replicas, size = config.parallel.data_parallel_size, config.parallel.tensor_parallel_size
    if num_replicas == 1:
        only = resolve_rank_weights(config, look)
        return [Replica(0, "", run_dir, only, {RUN_DIR: str(run_dir)}, {})]
    if adopts_ranks(run_dir):
        raise ConfigError(
            f"parallel.data_parallel_size is {num_replicas}, and torchrun has started the ranks of one replica;"
            " leave the setting out, or start the deployment with tprt serve"
        )
    devices, look_once = visible_devices(config, count), cache(look)
    replicas = []
    for number, folder in enumerate(replica_dirs(run_dir, num_replicas)):
        mine = share_of(devices, number, size)
        env = {RUN_DIR: str(folder), DEPLOYMENT_DIR: str(run_dir), REPLICA: str(number)}
        own = resolve_rank_weights(_with_threads(config), partial(_look_at_own, look_once, number, size))
        rank_env = {VISIBLE_DEVICES: ",".join(mine)} if mine else {}
        replicas.append(Replica(number, f"replica {number}", folder, own, env, rank_env))
    return replicas


def visible_devices(
    config: Config, count: Callable[[], int] = count_cuda_devices, env: Mapping[str, str] = os.environ
) -> list[str]:
    """Return the names of the CUDA devices that ranks may see, as CUDA_VISIBLE_DEVICES has them; none on CPUs.

    Raises:
        ConfigError: there are fewer than there are ranks in all replicas.
    """
    device, parallel = config.runtime.device, config.parallel
    num_gpus = 0 if device == "cpu" else count()
    if device == "cpu" or (device == "auto" and num_gpus == 0):
        return []
    num_replicas, size = parallel.data_parallel_size, parallel.tensor_parallel_size
    if num_gpus < num_replicas * size:
        raise ConfigError(
            f"parallel.data_parallel_size {num_replicas} x tensor_parallel_size {size} needs"
            f" {num_replicas * size} CUDA devices, and {num_gpus} are visible; lower one of them, or set"
            " runtime.device: cpu"
        )
    given = env.get(VISIBLE_DEVICES)
    return [str(index) for index in range(num_gpus)] if given is None else given.split(",")[:num_gpus]


def share_of(items: Sequence[Item], number: int, size: int) -> Sequence[Item]:
    """Return what replica `number` of `size` ranks has of what all ranks have."""
    return items[number * size : (number + 1) * size]


def _look_at_own(look: Callable[[], Sequence[CudaDevice]], number: int, size: int) -> Sequence[CudaDevice]:
    return share_of(look(), number, size)


def _with_threads(config: Config) -> Config:
    """Return `config` with the host's CPUs shared out among the ranks of all replicas."""
    if config.runtime.num_threads is not None:
        return config
    num_ranks = config.parallel.data_parallel_size * config.parallel.tensor_parallel_size
    num_threads = max(1, len(os.sched_getaffinity(0)) // num_ranks)
    runtime = config.runtime.model_copy(update={"num_threads": num_threads})
    return config.model_copy(update={"runtime": runtime})
