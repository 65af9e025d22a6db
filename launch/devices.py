"""Which device, how many threads and which all-reduce a rank gets where the settings leave it open."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch

from launch.cuda_devices import any_shares_gpu, gpu_in_turn
from tprt.config import ParallelConfig
from tprt.distributed.factory import CollectiveBackend
from tprt.errors import ConfigError


@dataclass(frozen=True, slots=True)
class RankDevice:
    """The device of a rank.

    Attributes:
        device: the CPU, or a CUDA device of this host.
        num_sharers: ranks that are on it, this one included.
        any_shared: whether any ranks of this host share a GPU.
    """

    device: torch.device
    num_sharers: int = 1
    any_shared: bool = False


def choose_device(setting: str, local_rank: int, local_world_size: int, allow_shared_gpu: bool) -> RankDevice:
    """Return this rank's device: `auto` is a CUDA device where there are any.

    Raises:
        ConfigError: there is no device for this rank.
    """
    count = torch.cuda.device_count() if setting != "cpu" else 0
    if setting == "cpu" or (setting == "auto" and count == 0):
        return RankDevice(torch.device("cpu"), local_world_size)
    chosen = place_on_gpu(local_rank, local_world_size, count, allow_shared_gpu)
    torch.cuda.set_device(chosen.device)
    return chosen


def place_on_gpu(local_rank: int, local_world_size: int, num_gpus: int, allow_shared_gpu: bool) -> RankDevice:
    """Return one of `num_gpus` for the rank: one of its own, or the next in turn where they may be shared.

    Raises:
        ConfigError: there is none.
    """
    any_shared = any_shares_gpu(local_world_size, num_gpus, allow_shared_gpu)
    index, num_sharers = gpu_in_turn(local_rank, local_world_size, num_gpus)
    return RankDevice(torch.device("cuda", index), num_sharers, any_shared)


def choose_all_reduce(
    setting: str,
    device_type: str,
    any_shared: bool = False,
    are_linked: bool | None = None,
    is_spread: bool = False,
) -> CollectiveBackend:
    """Return the all-reduce for ranks on devices of `device_type`, some of which may be shared.

    `are_linked` is what `are_gpus_linked` says, None where that is not known; `is_spread` tells that the ranks
    are on several hosts.

    Raises:
        ConfigError: the one asked for cannot work there, or is not known.
    """
    if setting == "auto" and is_spread:
        return "gloo" if device_type == "cpu" else "nccl"
    if setting == "auto":
        return "shm" if device_type == "cpu" else "symm_mem" if any_shared or are_linked else "nccl"
    if setting in ("nccl", "symm_mem") and device_type != "cuda":
        raise ConfigError(
            f"parallel.all_reduce is {setting}, which needs CUDA devices; use shm or gloo on CPUs"
        )
    if setting == "shm" and device_type != "cpu":
        raise ConfigError(
            "parallel.all_reduce is shm, which joins CPU ranks only; use nccl or symm_mem on CUDA devices"
        )
    if setting == "symm_mem" and is_spread:
        raise ConfigError(
            "parallel.all_reduce is symm_mem, which joins ranks of one host; use nccl between hosts"
        )
    if setting == "symm_mem" and are_linked is False:
        raise ConfigError(
            "parallel.all_reduce is symm_mem, and the GPUs of this host do not all reach each other's memory"
            " with atomics (NVLink); use nccl"
        )
    if setting == "nccl" and any_shared:
        raise ConfigError(
            "parallel.all_reduce is nccl, which refuses ranks that share a GPU; use symm_mem, or a GPU for each"
        )
    known: tuple[CollectiveBackend, ...] = get_args(CollectiveBackend)
    for backend in known:
        if setting == backend:
            return backend
    raise ConfigError(f"parallel.all_reduce is {setting}; expected auto or one of {', '.join(known)}")


def prepare_shared_memory(parallel: ParallelConfig) -> None:
    """Tell PyTorch's symmetric memory, by the environment of this process, what it may do.

    NVLink multicast stays off: nothing here uses it, and it takes more rights than plain peer access.
    """
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    if parallel.allow_shared_gpu:
        os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"


def is_mps_running(env: Mapping[str, str] = os.environ) -> bool:
    """Tell whether the control daemon of CUDA's Multi-Process Service is there, by its pipe."""
    return (Path(env.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps")) / "control").exists()


def cache_folder(env: Mapping[str, str] = os.environ) -> Path:
    """Return the folder for what is measured once and kept: `$XDG_CACHE_HOME/tprt`, or one in `~/.cache`.

    A user without a home, as containers have, gets one for temporary files.
    """
    if env.get("XDG_CACHE_HOME"):
        return Path(env["XDG_CACHE_HOME"]) / "tprt"
    if env.get("HOME"):
        return Path(env["HOME"]) / ".cache" / "tprt"
    return Path(tempfile.gettempdir()) / f"tprt-cache-{os.getuid()}"


def threads_per_rank(local_world_size: int) -> int:
    """Share this host's cores out among its ranks, at least one each."""
    return max(1, len(os.sched_getaffinity(0)) // local_world_size)
