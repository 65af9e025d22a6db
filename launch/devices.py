"""Which device, how many threads and which all-reduce a rank gets where the settings leave it open."""

from __future__ import annotations

import os
from typing import Literal

import torch

from tprt.errors import ConfigError


def choose_device(setting: str, local_rank: int) -> torch.device:
    """Return this rank's device: `auto` is a CUDA device of its own where there are any.

    Raises:
        ConfigError: `cuda` was asked for and there is no device for this rank.
    """
    count = torch.cuda.device_count() if setting != "cpu" else 0
    if setting == "cpu" or (setting == "auto" and count == 0):
        return torch.device("cpu")
    if local_rank >= count:
        raise ConfigError(
            f"rank {local_rank} of this host needs CUDA device {local_rank}, but {count} are visible; lower"
            " parallel.tensor_parallel_size or set runtime.device: cpu"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def choose_all_reduce(setting: str, device: torch.device) -> Literal["shm", "gloo", "nccl"]:
    """Return the all-reduce for ranks on `device`.

    Raises:
        ConfigError: the one asked for cannot work there.
    """
    if setting == "auto":
        return "nccl" if device.type == "cuda" else "shm"
    if setting == "nccl" and device.type != "cuda":
        raise ConfigError("parallel.all_reduce is nccl, which needs CUDA devices; use shm or gloo on CPUs")
    if setting == "shm" and device.type != "cpu":
        raise ConfigError("parallel.all_reduce is shm, which joins CPU ranks only; use nccl on CUDA devices")
    return "gloo" if setting == "gloo" else "shm" if setting == "shm" else "nccl"


def threads_per_rank(local_world_size: int) -> int:
    """Share this host's cores out among its ranks, at least one each."""
    return max(1, len(os.sched_getaffinity(0)) // local_world_size)
