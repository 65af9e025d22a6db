"""Which versions are here: of this program, Python, torch, CUDA and what is optional."""

from __future__ import annotations

import importlib.util
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from launch.doctor.finding import Finding, bad, ok, skipped, warning
from launch.doctor.request import DoctorRequest

_PACKAGES = ("tprt", "torch", "numpy", "pyzmq", "tokenizers", "safetensors")
# Modules, and the packages that bring them.
_ATTENTION = {
    "flash_attn_interface": "tokenspeed-fa3",
    "flash_attn": "flash-attn",
    "triton": "triton",
}


def check_versions(request: DoctorRequest) -> Iterator[Finding]:
    """Say which versions are here; nothing is imported for it."""
    packages = {name: _version(name) for name in _PACKAGES}
    versions = {"Python": platform.python_version(), "Linux": platform.release(), **packages}
    text = ", ".join(f"{name} {number}" for name, number in versions.items() if number)
    missing = [name for name, number in packages.items() if not number]
    if missing:
        yield bad(
            "versions", f"{', '.join(missing)} not installed; found {text}", "pip install tprt", **versions
        )
    else:
        yield ok("versions", text, executable=sys.executable, **versions)
    yield _optional_packages(request)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _optional_packages(request: DoctorRequest) -> Finding:
    there = [module for module in _ATTENTION if importlib.util.find_spec(module) is not None]
    if not request.expects_cuda:
        return skipped("attention kernels", "ranks compute on the CPU, with plain torch")
    found = ", ".join(f"{module} {_version(_ATTENTION[module])}".strip() for module in there)
    if there:
        return ok("attention kernels", f"installed: {found}", modules=there)
    fix = "pip install 'tprt[fa3]' for GPUs of compute capability 9, or install triton"
    return warning("attention kernels", "none installed: attention runs in plain torch, which is slow", fix)


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
