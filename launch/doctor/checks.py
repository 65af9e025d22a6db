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
        after: the check whose end it waits for where ranks compute on CUDA devices.
        advice: what to do when it gives no answer or fails.
    """

    name: str
    place: str
    needs_torch: bool = False
    after: str = ""
    advice: str = "run the same command again on an idle machine; dmesg may name what holds it up"

    def load(self) -> Callable[[DoctorRequest], Iterator[Finding]]:
        """Import the check."""
        module, _, name = self.place.partition(":")
        check: Callable[[DoctorRequest], Iterator[Finding]] = getattr(importlib.import_module(module), name)
        return check


_SMI = "a driver that hangs needs a reset of the device or a restart of the machine; dmesg may name the cause"
_DISK = "see whether the file system of model.path answers (ls, dmesg); a network file system may be gone"
_TORCH = 'see what `python -c "import torch"` says; install torch anew, or another build of it'

CHECKS = (
    Check("versions", "launch.doctor.versions:check_versions"),
    Check("torch", "launch.doctor.versions:check_torch", needs_torch=True, advice=_TORCH),
    Check("host", "launch.doctor.host:check_host"),
    Check("all-reduce", "launch.doctor.ranks:check_all_reduce", needs_torch=True),
    Check("model", "launch.doctor.model:check_model", advice=_DISK),
    Check("server", "launch.doctor.network:check_server"),
)
