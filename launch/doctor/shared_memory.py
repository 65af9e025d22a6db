"""How much memory the processes of the deployment will share, and whether /dev/shm has room for NCCL's."""

from __future__ import annotations

import os
from collections.abc import Iterator

from launch.doctor.finding import Finding, bad, ok, warning
from launch.doctor.request import DoctorRequest
from tprt.distributed.shm_memory import group_bytes
from tprt.transport.hub import DEFAULT_OUTPUTS, DEFAULT_STEPS
from tprt.weights.exchange import exchange_bytes

_SHM = "/dev/shm"
_MIB = 2**20
# A connection through host memory takes one such segment in either direction on each of two channels (NCCL
# issues 342 and 525). Over NVLink or PCIe peer to peer it takes nearly nothing.
_NCCL_SEGMENT_BYTES = 9_637_888
_NCCL_SEGMENTS_OF_A_RANK = 4
# What libraries put there besides: locks.
_LEAST_BYTES = _MIB
_FIX = "give the container more (Docker: --shm-size=1g or --ipc=host; Kubernetes: an emptyDir of medium Memory)"


def check_shared_memory(request: DoctorRequest) -> Iterator[Finding]:
    """Compare what will be allocated with what is there."""
    own = own_bytes(request)
    try:
        found = os.statvfs(_SHM)
    except OSError as error:
        yield bad("/dev/shm", f"it cannot be looked at: {error.strerror}", "mount a tmpfs there")
        return
    free, total = found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize
    uses_nccl = request.expects_cuda and request.num_ranks > 1 and request.config.parallel.all_reduce != "gloo"
    least = _NCCL_SEGMENT_BYTES if uses_nccl else 0
    enough = least * _NCCL_SEGMENTS_OF_A_RANK * request.num_ranks if uses_nccl else _LEAST_BYTES
    text = f"{_mib(free)} of {_mib(total)} are free; the deployment's own {_mib(own)} are memfds and not there"
    details = {"free": free, "total": total, "own": own, "enough": enough}
    if uses_nccl:
        text += f"; NCCL may need {_mib(enough)} where GPUs cannot reach one another directly"
    if free < least:
        yield bad("/dev/shm", text, _FIX, **details)
    elif free < enough:
        also = "" if uses_nccl else "; libraries may need a little, for locks"
        yield warning("/dev/shm", f"{text}{also}", _FIX, **details)
    else:
        yield ok("/dev/shm", text, **details)


def own_bytes(request: DoctorRequest) -> int:
    """Return the bytes that coordinator and ranks share: rings, collectives, the exchange of a start."""
    num_ranks = request.num_ranks
    rings = DEFAULT_STEPS.total_bytes(num_ranks) + DEFAULT_OUTPUTS.total_bytes(1)
    is_alone = num_ranks > 1 and not request.is_spread
    sums_there = is_alone and not request.expects_cuda and request.config.parallel.all_reduce != "gloo"
    return rings + exchange_bytes(num_ranks) + (group_bytes(num_ranks) if sums_there else 0)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / _MIB:,.1f} MiB"
