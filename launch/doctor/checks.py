"""The checks of `tprt doctor`, in the order in which their lines are shown.

A check is a function that yields findings as it has them. It runs in a process of its own, where its module is
imported, so one that hangs is named and holds up nothing. Knows nothing of how checks are run.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from launch.doctor.finding import Finding
from launch.doctor.request import DoctorRequest


@dataclass(frozen=True, slots=True)
class Check:
    """A check: the function at `module:name`, and what has to be there before.

    Attributes:
        needs_torch: it begins once torch is imported.
        after: the check or the line of a check that it waits for where ranks compute on CUDA devices. No time
            left for it there is no fault.
        frees: the line with which it frees those that wait for it; they are told its details.
        advice: what to do when it gives no answer or fails.
    """

    name: str
    place: str
    needs_torch: bool = False
    after: str = ""
    advice: str = "run the same command again on an idle machine; dmesg may name what holds it up"
    frees: str = ""

    def load(self) -> Callable[[DoctorRequest], Iterator[Finding]]:
        """Import the check."""
        module, _, name = self.place.partition(":")
        check: Callable[[DoctorRequest], Iterator[Finding]] = getattr(importlib.import_module(module), name)
        return check


_GPUS = "see what nvidia-smi and dmesg (Xid) say; reset the devices or restart the machine"
_SMI = "a driver that hangs needs a reset of the device or a restart of the machine; dmesg may name the cause"
_DISK = "see whether the file system of model.path answers (ls, dmesg); a network file system may be gone"
_TORCH = 'see what `python -c "import torch"` says; install torch anew, or another build of it'

_NCCL = "try NCCL_P2P_DISABLE=1 and NCCL_DEBUG=INFO; disable PCIe ACS and the IOMMU, or update the driver"

CHECKS = (
    Check("versions", "launch.doctor.versions:check_versions"),
    Check("torch", "launch.doctor.versions:check_torch", needs_torch=True, advice=_TORCH),
    Check("GPU driver", "launch.doctor.nvidia_smi:check_driver", advice=_SMI),
    Check("GPUs", "launch.doctor.gpus:check_gpus", advice=_GPUS, frees="devices"),
    Check("memory", "launch.doctor.memory:check_memory", True, "devices"),
    Check("attention", "launch.doctor.attention:check_attention", True, "devices"),
    Check("all-reduce", "launch.doctor.ranks:check_all_reduce", True, "GPUs", _NCCL),
    Check("host", "launch.doctor.host:check_host"),
    Check("/dev/shm", "launch.doctor.shared_memory:check_shared_memory", needs_torch=True),
    Check("model", "launch.doctor.model:check_model", advice=_DISK),
    Check("checkpoint", "launch.doctor.checkpoint:check_headers", needs_torch=True, advice=_DISK),
    Check("disk", "launch.doctor.disk:check_disk", needs_torch=True, advice=_DISK),
    Check("server", "launch.doctor.network:check_server"),
    Check("hosts", "launch.doctor.hosts:check_hosts"),
)
