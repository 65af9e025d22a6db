"""What the control groups of this process allow it: CPU time and memory. Knows both versions of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_OWN = Path("/proc/self/cgroup")
_MOUNT = Path("/sys/fs/cgroup")
# What version 1 says where there is no limit is this or more.
_NO_LIMIT_BYTES = 2**60


def cpu_quota(own: Path = _OWN, mount: Path = _MOUNT) -> float | None:
    """Return how many CPUs' time this process and its children may use; None: no limit."""
    quotas = []
    for folder in _folders("cpu", own, mount):
        quota, period = [*_words(folder / "cpu.max"), "max", "max"][:2]
        if quota == "max":
            quota, period = (
                next(iter(_words(folder / f"cpu.cfs_{name}_us")), "-1") for name in ("quota", "period")
            )
        if int(quota) > 0 and int(period) > 0:
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def memory_limit(own: Path = _OWN, mount: Path = _MOUNT) -> int | None:
    """Return how many bytes this process and its children may have; None: no limit."""
    limits = []
    for folder in _folders("memory", own, mount):
        for name in ("memory.max", "memory.limit_in_bytes"):
            limits += [int(word) for word in _words(folder / name) if word.isdecimal()]
    return min((limit for limit in limits if limit < _NO_LIMIT_BYTES), default=None)


def _folders(controller: str, own: Path, mount: Path) -> Iterator[Path]:
    """Yield the folders of this process's group and of those around it, as far as they can be seen."""
    for line in own.read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = mount / controllers if controllers else mount
        folder = root / path.lstrip("/")
        while folder != root:
            yield folder
            folder = folder.parent
        yield root


def _words(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="ascii").split()
    except OSError:
        return []
