"""Whether there is a working CUDA device for each rank, and whether the deployment fits into their memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from launch.cuda_devices import CudaDevice, look_at_device
from launch.devices import choose_device
from launch.doctor.finding import Finding, bad, ok, refused, skipped, warning
from launch.doctor.forked import REAP_S, NoAnswerError, ask_children
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
_LONGEST_S = 30.0
# CUDA that takes so long to come up never will.
_HANGS_S = 20.0
# To say what came of it, and for the memory.
_REST_S = 0.5
# No device is judged that had less: some take seconds to open.
_LEAST_S = 3.0
_HURRY = "try again, since the second import of torch is from memory, or with --timeout-s 60"


@dataclass(frozen=True, slots=True)
class _Visible:
    """How many devices this host shows, and why they do not do for the ranks, if they do not."""

    count: int
    refusal: ConfigError | None = None


def check_devices(request: DoctorRequest) -> Iterator[Finding]:
    """Open every device, each in a process of its own, let it compute, and predict the memory."""
    devices: Sequence[CudaDevice] = ()
    if not request.expects_cuda or torch.version.cuda is None:
        yield skipped(_NAME, "ranks compute on the CPU" if not request.expects_cuda else "torch has no CUDA")
    elif (left_s := request.left_s(_LONGEST_S)) < _LEAST_S:
        yield warning(_NAME, f"{left_s:.1f} s were left for them, too few to open any", _HURRY)
    else:
        devices = yield from _look(request, left_s - REAP_S - _REST_S)
    yield from check_memory(request, devices)


def _look(request: DoctorRequest, timeout_s: float) -> Generator[Finding, None, Sequence[CudaDevice]]:
    """Open and judge the devices, and return those that could be opened."""
    devices: Sequence[CudaDevice] = ()
    try:
        visible, looks = _open_all(request, timeout_s)
        devices = [device for device, _ in looks]
        if visible.refusal is not None:
            raise visible.refusal
        yield from _judge(request, devices, visible.count)
        yield _compute([is_right for _, is_right in looks[: request.num_processes]])
    except ConfigError as error:
        yield refused(_NAME, error, _DRIVER)
    except NoAnswerError as error:
        if timeout_s < _HANGS_S:
            yield warning(_NAME, f"not judged, since CUDA was not ready: {error}", _HURRY)
        else:
            yield bad(_NAME, f"CUDA hangs: {error}", _DRIVER)
    except RuntimeError as error:
        yield bad(_NAME, f"CUDA does not work: {error}", _DRIVER)
    return devices


def _open_all(request: DoctorRequest, timeout_s: float) -> tuple[_Visible, list[tuple[CudaDevice, bool]]]:
    """Return what is visible, and of each device of the ranks what it is and whether it computes.

    To open a device takes its time, so all are opened side by side, before it is known how many there are.

    Raises:
        NoAnswerError: CUDA itself did not come up in time, which takes seconds with many devices.
        RuntimeError: CUDA does not work, or one of the devices does not.
    """
    most = max(request.num_processes, request.config.parallel.tensor_parallel_size)
    asked: list[Callable[[], Any]] = [partial(_see, request), *(partial(_open, index) for index in range(most))]
    visible, *looks = ask_children(asked, timeout_s)
    if isinstance(visible, Exception):
        raise visible
    opened: list[tuple[CudaDevice, bool]] = []
    for index, look in enumerate(looks[: visible.count]):
        if isinstance(look, Exception):
            raise RuntimeError(f"device {index}: {look}") from look
        opened.append(look)
    return visible, opened


def _see(request: DoctorRequest) -> _Visible:
    torch.cuda.init()  # type: ignore[no-untyped-call]
    count = torch.cuda.device_count()
    num_ranks, is_shared = request.num_processes, request.config.parallel.allow_shared_gpu
    try:
        choose_device(request.config.runtime.device, num_ranks - 1, num_ranks, is_shared)
    except ConfigError as error:
        return _Visible(count, error)
    return _Visible(count)


def _open(index: int) -> tuple[CudaDevice, bool]:
    """Open a device and run a kernel on it: one that torch was not built for fails here."""
    device = look_at_device(index)
    found = torch.arange(_NUM_ELEMENTS, device=f"cuda:{index}").sum().item()
    return device, found == _NUM_ELEMENTS * (_NUM_ELEMENTS - 1) // 2


def _judge(request: DoctorRequest, devices: Sequence[CudaDevice], num_visible: int) -> Iterator[Finding]:
    used = devices[: request.num_processes]
    kinds = Counter((device.name, device.total) for device in used)
    text = ", ".join(f"{count} x {name} with {gib(total)}" for (name, total), count in kinds.items())
    details = {"devices": [asdict(device) for device in used]}
    if len(kinds) > 1 and request.config.parallel.rank_weights is None:
        fix = "set parallel.rank_weights: auto, so that each gets a share in proportion to its memory"
        yield warning(_NAME, f"{text}: unlike devices with equal shares", fix, **details)
    else:
        yield ok(_NAME, f"{text} for {request.num_processes} ranks; {num_visible} visible", **details)
    yield _in_use(used)


def _in_use(devices: Sequence[CudaDevice]) -> Finding:
    """Look for memory that somebody else has."""
    taken = [max(0, device.total - device.free - CONTEXT_BYTES) for device in devices]
    text = ", ".join(f"{index}: {gib(size)}" for index, size in enumerate(taken))
    if max(taken) > _IN_USE_BYTES:
        fix = "end what else uses the devices (nvidia-smi), choose others with CUDA_VISIBLE_DEVICES, or lower"
        return warning("device memory", f"in use by others on device {text}", f"{fix} cache.memory_fraction")
    return ok("device memory", "others use next to nothing of the devices")


def _compute(are_right: Sequence[bool]) -> Finding:
    """Name the devices whose kernel had a wrong result."""
    wrong = [str(index) for index, is_right in enumerate(are_right) if not is_right]
    if wrong:
        fix = "a device that computes wrongly is broken: see nvidia-smi -q for its errors, and leave it out"
        return bad("computing", f"wrong results on device {', '.join(wrong)}", fix)
    return ok("computing", f"kernels run on {len(are_right)} devices")
