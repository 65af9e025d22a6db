"""What this host and the control groups of this process, of either version, allow it: CPU time and memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_OWN = Path("/proc/self/cgroup")
_MOUNT = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")
_KIB = 1024
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


def memory_left(own: Path = _OWN, mount: Path = _MOUNT) -> int | None:
    """Return how many more bytes this process and its children may have; None: no limit."""
    left = []
    for folder in _folders("memory", own, mount):
        limit = _number(folder, "memory.max", "memory.limit_in_bytes")
        used = _number(folder, "memory.current", "memory.usage_in_bytes")
        if limit is not None and used is not None and limit < _NO_LIMIT_BYTES:
            words = _words(folder / "memory.stat")
            stat = dict(zip(words[::2], words[1::2], strict=True))
            # Pages of files that nobody has used lately make room.
            cached = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
            left.append(max(0, limit - used + cached))
    return min(left, default=None)


def available_bytes() -> int:
    """Return the memory that this process and its children can get: of the machine, and of their group."""
    lines = (line.split() for line in _MEMINFO.read_text(encoding="ascii").splitlines())
    free = next(int(fields[1]) * _KIB for fields in lines if fields[0] == "MemAvailable:")
    left = memory_left()
    return free if left is None else min(free, left)


def _number(folder: Path, *names: str) -> int | None:
    """Return the number in the first of these files that has one."""
    words = (word for name in names for word in _words(folder / name))
    return next((int(word) for word in words if word.isdecimal()), None)


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
