"""Whether there is a working CUDA device for each rank, and whether they reach one another.

All is tried in one process beside this one, which says how far it has come: what gives no answer is named. Does
not import torch, which takes seconds.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from launch.cuda_devices import CudaDevice, any_shares_gpu
from launch.doctor.finding import NO_TIME, Finding, bad, ok, refused, skipped, warning
from launch.doctor.gpu_work import GpuWork, Opened, Seen, Step
from launch.doctor.heard import Heard, listening_to
from launch.doctor.request import DoctorRequest
from launch.planning.memory import CONTEXT_BYTES
from tprt.errors import ConfigError

_DRIVER = "see what nvidia-smi says; in a container, give it the GPUs (Docker: --gpus all)"
_GIB = 2**30
# So much may be in use beside this process's own context without a word.
_IN_USE_BYTES = _GIB
_PEER_FIX = (
    "set NCCL_P2P_DISABLE=1 to go by way of the host's memory; to repair it, disable PCIe ACS and the IOMMU"
    " in the BIOS and kernel, or update the driver"
)
_NCCL_FIX = (
    "see what NCCL says with NCCL_DEBUG=WARN; try NCCL_P2P_DISABLE=1; give the container more /dev/shm; disable"
    " PCIe ACS and the IOMMU"
)
_WITH_NCCL = ("auto", "nccl", "symm_mem")


def check_gpus(request: DoctorRequest) -> Iterator[Finding]:
    """Open every device and let it compute, copy between all pairs, and sum by NCCL."""
    if not request.expects_cuda:
        for name in ("devices", "peer copies"):
            yield skipped(name, "ranks compute on the CPU")
        return
    uses_nccl = request.config.parallel.all_reduce in _WITH_NCCL
    with listening_to(
        lambda connection: GpuWork(
            request.num_processes, request.num_ranks, uses_nccl, request.work_end_s, connection
        ).play(),
        request.work_end_s,
    ) as heard:
        seen = heard.result(Step("driver"))
        if not isinstance(seen, Seen):
            yield _judge_driver(heard)
            return
        used = range(min(request.num_processes, seen.num_devices))
        yield from _judge_devices(request, heard, seen, used)
        if all(isinstance(heard.results.get(Step("open", (index,))), Opened) for index in used):
            yield from _judge_pairs(heard, used[: request.num_ranks])
            if uses_nccl and 1 < request.num_ranks <= len(used):
                yield from _judge_sums(heard, request.num_ranks)


def _judge_driver(heard: Heard) -> Finding:
    found = heard.problem("devices", [Step("driver")], _DRIVER)
    assert found is not None
    return found


def _judge_devices(request: DoctorRequest, heard: Heard, seen: Seen, used: Sequence[int]) -> Iterator[Finding]:
    """Judge what the devices are, who uses their memory, and whether they compute."""
    details: dict[str, object] = {"visible": seen.num_devices, "linked": seen.are_linked}
    if not used and request.config.runtime.device == "auto":
        yield warning("devices", "no CUDA device is visible: ranks compute on the CPU", _DRIVER, **details)
        return
    steps = [Step("open", (index,)) for index in used]
    if problem := heard.problem("devices", steps, _DRIVER):
        yield problem
        return
    opened = [heard.results[step] for step in steps]
    devices = [one.device for one in opened]
    details |= {
        "devices": [asdict(device) for device in devices],
        "capabilities": [one.capability for one in opened],
        "seconds": heard.seconds([Step("driver"), *steps]),
    }
    try:
        any_shares_gpu(request.num_processes, seen.num_devices, request.config.parallel.allow_shared_gpu)
    except ConfigError as error:
        yield refused("devices", error, _DRIVER, **details)
    else:
        yield _judge_kinds(request, devices, details)
    if devices:
        yield _judge_use(devices)
        yield _judge_computing(heard, used)


def _judge_kinds(request: DoctorRequest, devices: Sequence[CudaDevice], details: dict[str, object]) -> Finding:
    kinds = Counter((device.name, device.total) for device in devices)
    text = ", ".join(f"{count} x {name} with {_gib(total)}" for (name, total), count in kinds.items())
    if len(kinds) > 1 and request.config.parallel.rank_weights is None:
        fix = "set parallel.rank_weights: auto, so that each gets a share in proportion to its memory"
        return warning("devices", f"{text}: unlike devices with equal shares", fix, **details)
    text += f" for {request.num_processes} ranks; {details['visible']} visible"
    return ok("devices", text, **details)


def _judge_use(devices: Sequence[CudaDevice]) -> Finding:
    """Look for memory that somebody else has."""
    taken = [max(0, device.total - device.free - CONTEXT_BYTES) for device in devices]
    text = ", ".join(f"{index}: {_gib(size)}" for index, size in enumerate(taken))
    if max(taken) > _IN_USE_BYTES:
        fix = "end what else uses the devices (nvidia-smi), choose others with CUDA_VISIBLE_DEVICES, or lower"
        return warning("device memory", f"in use by others on device {text}", f"{fix} cache.memory_fraction")
    return ok("device memory", "others use next to nothing of the devices")


def _judge_computing(heard: Heard, used: Sequence[int]) -> Finding:
    """Name the devices whose kernel failed or had a wrong result."""
    steps = [Step("compute", (index,)) for index in used]
    if problem := heard.problem("computing", steps, _DRIVER):
        return problem
    wrong = [str(index) for index, step in zip(used, steps, strict=True) if not heard.results[step]]
    if wrong:
        fix = "a device that computes wrongly is broken: see nvidia-smi -q for its errors, and leave it out"
        return bad("computing", f"wrong results on device {', '.join(wrong)}", fix)
    return ok("computing", f"kernels run on {len(used)} devices", seconds=heard.seconds(steps))


def _judge_pairs(heard: Heard, used: Sequence[int]) -> Iterator[Finding]:
    name = "peer copies"
    steps = [Step("copy", pair) for pair in itertools.permutations(used, 2)]
    if not steps:
        yield skipped(name, "the ranks have no two CUDA devices to copy between")
        return
    if problem := heard.problem(name, steps, _PEER_FIX):
        yield problem
        return
    wrong = ["device {} to {}".format(*step.numbers) for step in steps if not heard.results[step][1]]
    if wrong:
        yield bad(name, f"what arrived is not what was written: {', '.join(wrong)}", _PEER_FIX)
        return
    num_direct = sum(heard.results[step][0] for step in steps)
    text = f"{len(steps)} pairs of devices: what was written was read, {num_direct} directly"
    yield ok(name, text, pairs=len(steps), direct=num_direct, seconds=heard.seconds(steps))


def _judge_sums(heard: Heard, num_ranks: int) -> Iterator[Finding]:
    """Judge the sum over all devices, and then those over fewer."""
    name, whole = "all-reduce nccl", Step("sum", (num_ranks,))
    if problem := heard.problem(name, [Step("nccl")], _NCCL_FIX):
        yield problem
        return
    version = f"NCCL {heard.results[Step('nccl')]}"
    if problem := heard.problem(name, [whole], _NCCL_FIX):
        yield problem
    elif not heard.results[whole]:
        yield bad(name, f"{version}: the sum over {num_ranks} devices is wrong", _NCCL_FIX)
    else:
        seconds = heard.seconds([whole])
        text = f"{version}: {num_ranks} devices met and summed in {seconds:.1f} s"
        yield ok(name, text, world_size=num_ranks, seconds=seconds)
    if num_ranks > 2 and whole in heard.results:
        yield _judge_fewer(heard, f"{name}, fewer", num_ranks)


def _judge_fewer(heard: Heard, name: str, num_ranks: int) -> Finding:
    """Say of how many devices fewer than all the sums are right."""
    steps = [Step("sum", (size,)) for size in range(2, num_ranks)]
    heard.wait_for(steps)
    fine = [step.numbers[0] for step in steps if heard.results.get(step) is True]
    failed = [step for step in steps if step in heard.results and heard.results[step] is not True]
    if failed:
        problem = heard.problem(name, failed[:1], _NCCL_FIX)
        text = problem.found if problem else f"the sum over {failed[0].numbers[0]} devices is wrong"
        works = f"; {fine[-1]} devices work" if fine else ""
        return warning(name, f"{text}{works}", _NCCL_FIX)
    if not fine:
        return skipped(name, NO_TIME)
    untried = f"; no time for {len(steps) - len(fine)} more sizes" if len(fine) < len(steps) else ""
    text = f"groups of {', '.join(map(str, fine))} devices sum as well{untried}"
    return ok(name, text, world_sizes=fine)


def _gib(size: int) -> str:
    # Its like in tprt.worker comes with torch.
    return f"{size / _GIB:.2f} GiB"
