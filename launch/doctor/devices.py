"""Whether there is a working CUDA device for each rank, and whether the deployment fits into their memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import torch

from launch.cuda_devices import CudaDevice, look_at_devices
from launch.devices import choose_device
from launch.doctor.finding import Finding, bad, ok, refused, skipped, warning
from launch.doctor.memory import check_memory
from launch.doctor.request import DoctorRequest
from launch.planning.memory import CONTEXT_BYTES
from tprt.errors import ConfigError
from tprt.worker.memory_budget import gib

_NAME = "devices"
_DRIVER = "see what nvidia-smi says; in a container, give it the GPUs (Docker: --gpus all)"
# So much may be in use beside this process's own context without a word.
_IN_USE_BYTES = 2**30
_NUM_ELEMENTS = 1024


def check_devices(request: DoctorRequest) -> Iterator[Finding]:
    """Open every device, let it compute, and predict the memory."""
    if not request.expects_cuda or torch.version.cuda is None:
        yield skipped(_NAME, "ranks compute on the CPU" if not request.expects_cuda else "torch has no CUDA")
        yield from check_memory(request, ())
        return
    devices: Sequence[CudaDevice] = ()
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        devices = look_at_devices()
        num_ranks, is_shared = request.num_processes, request.config.parallel.allow_shared_gpu
        choose_device(request.config.runtime.device, num_ranks - 1, num_ranks, is_shared)
        yield from _look(request, devices)
    except ConfigError as error:
        yield refused(_NAME, error, _DRIVER)
    except RuntimeError as error:
        yield bad(_NAME, f"CUDA does not work: {error}", _DRIVER)
    yield from check_memory(request, devices)


def _look(request: DoctorRequest, devices: Sequence[CudaDevice]) -> Iterator[Finding]:
    used = devices[: request.num_processes]
    kinds = Counter((device.name, device.total) for device in used)
    text = ", ".join(f"{count} x {name} with {gib(total)}" for (name, total), count in kinds.items())
    details = {"devices": [asdict(device) for device in used]}
    if len(kinds) > 1 and request.config.parallel.rank_weights is None:
        fix = "set parallel.rank_weights: auto, so that each gets a share in proportion to its memory"
        yield warning(_NAME, f"{text}: unlike devices with equal shares", fix, **details)
    else:
        yield ok(_NAME, f"{text} for {request.num_processes} ranks; {len(devices)} visible", **details)
    yield _in_use(used)
    yield _compute(len(used))


def _in_use(devices: Sequence[CudaDevice]) -> Finding:
    """Look for memory that somebody else has."""
    taken = [max(0, device.total - device.free - CONTEXT_BYTES) for device in devices]
    text = ", ".join(f"{index}: {gib(size)}" for index, size in enumerate(taken))
    if max(taken) > _IN_USE_BYTES:
        fix = "end what else uses the devices (nvidia-smi), choose others with CUDA_VISIBLE_DEVICES, or lower"
        return warning("device memory", f"in use by others on device {text}", f"{fix} cache.memory_fraction")
    return ok("device memory", "others use next to nothing of the devices")


def _compute(num_devices: int) -> Finding:
    """Run a kernel on each device: one that torch was not built for fails here."""
    wrong = []
    for index in range(num_devices):
        found = torch.arange(_NUM_ELEMENTS, device=f"cuda:{index}").sum().item()
        if found != _NUM_ELEMENTS * (_NUM_ELEMENTS - 1) // 2:
            wrong.append(str(index))
    if wrong:
        fix = "a device that computes wrongly is broken: see nvidia-smi -q for its errors, and leave it out"
        return bad("computing", f"wrong results on device {', '.join(wrong)}", fix)
    return ok("computing", f"kernels run on {num_devices} devices")
