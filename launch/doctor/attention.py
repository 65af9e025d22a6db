"""Whether torch's kernels, and kernels of attention, fit the devices of the ranks."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import torch

from launch.doctor.finding import Finding, bad, ok, refused, skipped, warning
from launch.doctor.request import DoctorRequest
from launch.planning.plan import planned_device
from tprt.attention.registry import make_attention_backend
from tprt.attention.requirements import AttentionSetup
from tprt.checkpoint_config import CheckpointConfig, read_checkpoint_config
from tprt.errors import CheckpointError, ConfigError, UnsupportedModelError
from tprt.worker.model_runner import resolve_dtype


def check_attention(request: DoctorRequest) -> Iterator[Finding]:
    """Compare what torch was built for with the devices, and choose the attention backend as a rank does."""
    if capabilities := request.gpus.get("capabilities"):
        # CUDA takes seconds where there are many devices, and one is enough here.
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        yield judge_kernels([(major, minor) for major, minor in capabilities], torch.cuda.get_arch_list())
    try:
        checkpoint = read_checkpoint_config(request.config.model.path)
    except (CheckpointError, UnsupportedModelError):
        yield skipped("attention", "the model cannot be planned: see model")
    else:
        yield _attention(request, checkpoint)


def judge_kernels(capabilities: Sequence[tuple[int, int]], built_for: Sequence[str]) -> Finding:
    """Tell whether torch has kernels for devices of these capabilities, built for `sm_90`, `compute_100`, ...

    A device takes kernels of its own major version up to its own minor one, and compiles those given as
    `compute_` of any version up to its own (CUDA C++ Programming Guide, binary and PTX compatibility).
    Kernels for one architecture alone, such as `sm_90a`, do not count: torch has others beside them.
    """
    name = "torch kernels"
    if not built_for:
        return skipped(name, "this torch has none for CUDA devices")
    lacking = [one for one in sorted(set(capabilities)) if not any(_runs(kernel, one) for kernel in built_for)]
    text = ", ".join(built_for)
    if lacking:
        found = ", ".join(f"{major}.{minor}" for major, minor in lacking)
        fix = "install a build of torch for these devices (https://pytorch.org/get-started)"
        return bad(name, f"torch is built for {text}; devices have compute capability {found}", fix)
    return ok(name, f"torch is built for {text}, which are for these devices")


def _runs(kernel: str, capability: tuple[int, int]) -> bool:
    kind, _, number = kernel.partition("_")
    if not number.isdecimal():
        return False
    built = divmod(int(number), 10)
    return built <= capability and (kind == "compute" or built[0] == capability[0])


def _attention(request: DoctorRequest, checkpoint: CheckpointConfig) -> Finding:
    name, device = request.config.runtime.attention_backend, planned_device(request.config)
    if device.type == "cuda" and not torch.cuda.is_available():
        return skipped("attention", "there is no CUDA device to choose it for")
    dtype = resolve_dtype(request.config, checkpoint, device)
    setup = AttentionSetup(device, dtype, checkpoint.head_dim, request.config.cache.block_size)
    try:
        found = make_attention_backend(name, 1.0, setup).name
    except ConfigError as error:
        return refused("attention", error, "set runtime.attention_backend: auto")
    if found == "sdpa" and device.type == "cuda" and name == "auto":
        fix = "pip install 'tprt[fa3]' on GPUs of compute capability 9, or triton"
        return warning("attention", "no attention kernels work here: plain torch (sdpa), which is slow", fix)
    return ok("attention", f"backend {found}")
