"""Which versions are here: of this program, Python, torch, CUDA and what is optional."""

from __future__ import annotations

import contextlib
import platform
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version

from launch.doctor.finding import Finding, bad, ok, warning
from launch.doctor.request import DoctorRequest

_NEEDED = ("tprt", "torch", "numpy", "pyzmq", "tokenizers", "safetensors")
# Attention kernels, for CUDA devices only.
_OPTIONAL = ("triton", "flash-attn", "tokenspeed-fa3")


def check_versions(request: DoctorRequest) -> Iterator[Finding]:
    """Say which versions are here; nothing is imported for it."""
    needed, optional = _versions(_NEEDED), _versions(_OPTIONAL)
    found = {"Python": platform.python_version(), "Linux": platform.release(), **needed, **optional}
    text = ", ".join(f"{name} {number}" for name, number in found.items() if number)
    details = {"versions": found, "executable": sys.executable}
    missing = [name for name, number in needed.items() if not number]
    absent = [name for name, number in optional.items() if not number]
    if missing:
        fix = "pip install tprt into this environment"
        yield bad("versions", f"{', '.join(missing)} not installed; found {text}", fix, **details)
    else:
        also = f"; optional and not installed: {', '.join(absent)}" if absent else ""
        yield ok("versions", f"{text}{also}", **details)


def _versions(packages: Sequence[str]) -> dict[str, str]:
    """Return the version of each package, "" where it is not installed."""
    found = dict.fromkeys(packages, "")
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def check_torch(request: DoctorRequest) -> Iterator[Finding]:
    """Say what torch was built for, and whether that fits the settings."""
    import torch

    cuda = torch.version.cuda
    built_for = f"built for CUDA {cuda}" if cuda else "built without CUDA"
    text = f"torch {torch.__version__}, {built_for}"
    details = {"torch": torch.__version__, "cuda": cuda}
    if request.expects_cuda and not cuda:
        fix = "install a build of torch for CUDA, or set runtime.device: cpu"
        if request.config.runtime.device == "cuda":
            yield bad("torch", f"runtime.device is cuda, and {text}", fix, **details)
        else:
            yield warning("torch", f"there is an NVIDIA driver, and {text}: ranks use the CPU", fix, **details)
    else:
        yield ok("torch", text, **details)
