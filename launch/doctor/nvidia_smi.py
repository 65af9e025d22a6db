"""What nvidia-smi says of the driver, of other processes on the devices, and of how they are connected."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from launch.doctor.finding import Finding, bad, ok, silent, skipped, warning
from launch.doctor.forked import output_of
from launch.doctor.request import DoctorRequest

_NAME = "GPU driver"
_PATIENCE_S = 6.0
_QUERY = ("uuid", "name", "driver_version", "compute_mode")
_APPS = ("gpu_uuid", "pid", "process_name", "used_memory")
_FORMAT = "--format=csv,noheader,nounits"
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
_MORE_TIME = "try again with --timeout-s 60"
_HANGS = "reset the device (nvidia-smi --gpu-reset) or restart the machine; dmesg may name the cause (Xid)"
# Paths between devices that leave their NUMA node.
_FAR = "SYS"


@dataclass(frozen=True, slots=True)
class Gpu:
    """One line of `nvidia-smi --query-gpu`."""

    uuid: str
    name: str
    driver: str
    compute_mode: str


def check_driver(request: DoctorRequest) -> Iterator[Finding]:
    """Ask for driver, processes and topology, each with a deadline."""
    if not request.expects_cuda:
        yield skipped(_NAME, "ranks compute on the CPU")
        return
    try:
        gpus = parse_gpus(_ask(request, f"--query-gpu={','.join(_QUERY)}", _FORMAT))
        yield _driver(gpus)
        used = used_gpus(len(gpus), [gpu.uuid for gpu in gpus], os.environ.get("CUDA_VISIBLE_DEVICES"))
        used = used[: request.num_processes]
        apps = parse_rows(_ask(request, f"--query-compute-apps={','.join(_APPS)}", _FORMAT))
        yield _processes(apps, {gpus[index].uuid: index for index in used})
        if len(used) > 1:
            yield _topology(parse_topology(_ask(request, "topo", "-m")), used)
    except FileNotFoundError:
        why = "there is no nvidia-smi (a container gets it by NVIDIA_DRIVER_CAPABILITIES=compute,utility)"
        yield skipped(_NAME, why)
    except subprocess.TimeoutExpired as error:
        text = f"{' '.join(error.cmd)} gave no answer in {error.timeout:.1f} s"
        has_hung = error.timeout >= _PATIENCE_S
        yield silent(_NAME, text, _HANGS) if has_hung else warning(_NAME, text, f"{_MORE_TIME}; else {_HANGS}")
    except subprocess.CalledProcessError as error:
        said = (error.stderr or error.stdout).strip() or f"exit code {error.returncode}"
        yield bad(_NAME, f"nvidia-smi failed: {said}", "install a driver for these GPUs, or load its module")


def _ask(request: DoctorRequest, *arguments: str) -> str:
    return output_of(["nvidia-smi", *arguments], request.left_s(_PATIENCE_S))


def parse_rows(text: str) -> list[list[str]]:
    """Return the fields of each line of comma-separated values."""
    return [[field.strip() for field in line.split(",")] for line in text.splitlines() if line.strip()]


def parse_gpus(text: str) -> list[Gpu]:
    """Return the GPUs of this host in the order of nvidia-smi, which is that of the PCI bus."""
    return [Gpu(*row) for row in parse_rows(text) if len(row) == len(_QUERY)]


def used_gpus(count: int, uuids: Sequence[str], visible: str | None) -> list[int]:
    """Return which GPUs CUDA sees, in its order, by CUDA_VISIBLE_DEVICES; all where that says nothing."""
    if visible is None:
        return list(range(count))
    found = []
    for name in visible.split(","):
        number = name.strip()
        matching = [index for index, uuid in enumerate(uuids) if number and uuid.startswith(number)]
        if number.isdecimal() and int(number) < count:
            found.append(int(number))
        elif len(matching) == 1:
            found += matching
        else:
            # As CUDA does: what follows a name that is none is not seen.
            break
    return found


def _driver(gpus: Sequence[Gpu]) -> Finding:
    if not gpus:
        return bad(_NAME, "nvidia-smi lists no GPU", "give the container the GPUs (Docker: --gpus all)")
    kinds = Counter(gpu.name for gpu in gpus)
    text = f"{gpus[0].driver}: {', '.join(f'{count} x {name}' for name, count in kinds.items())}"
    modes = {gpu.compute_mode for gpu in gpus} - {"Default", "[N/A]"}
    details = {"driver": gpus[0].driver, "gpus": [gpu.name for gpu in gpus]}
    if modes:
        fix = "nvidia-smi -c DEFAULT"
        return warning(_NAME, f"{text}; compute mode {', '.join(modes)}", fix, **details)
    return ok(_NAME, text, **details)


def _processes(apps: Sequence[Sequence[str]], used: dict[str, int]) -> Finding:
    """Name who else computes on the devices of the ranks."""
    found = [
        f"{os.path.basename(name)} (pid {pid}, {memory} MiB) on GPU {used[uuid]}"
        for uuid, pid, name, memory in (row for row in apps if len(row) == len(_APPS))
        if uuid in used and not _is_ours(pid)
    ]
    if not found:
        return ok("GPU processes", "nobody else computes on these GPUs, as far as nvidia-smi can see")
    fix = "end them, or choose other GPUs with CUDA_VISIBLE_DEVICES"
    return warning("GPU processes", ", ".join(found), fix, processes=found)


def _is_ours(pid: str) -> bool:
    """Tell whether it is a process of this examination, all of which are one group."""
    try:
        return os.getpgid(int(pid)) == os.getpgrp()
    except (ValueError, ProcessLookupError):
        return False


def parse_topology(text: str) -> dict[tuple[int, int], str]:
    """Return how each pair of GPUs is connected, by the matrix of `nvidia-smi topo -m`: NV18, PIX, SYS, ..."""
    lines = [_ESCAPES.sub("", line).split() for line in text.splitlines()]
    links: dict[tuple[int, int], str] = {}
    columns = next((line for line in lines if line[:1] == ["GPU0"] and line[1:2] != ["X"]), [])
    numbers = [int(name[3:]) for name in columns if re.fullmatch(r"GPU\d+", name)]
    for line in lines:
        if line and line is not columns and re.fullmatch(r"GPU\d+", line[0]):
            links |= {(int(line[0][3:]), number): link for number, link in zip(numbers, line[1:], strict=False)}
    return {pair: link for pair, link in links.items() if pair[0] != pair[1]}


def _topology(links: dict[tuple[int, int], str], used: Sequence[int]) -> Finding:
    pairs = {pair: links.get(pair, "?") for pair in itertools.combinations(sorted(used), 2)}
    kinds = Counter(pairs.values())
    text = ", ".join(f"{count} pairs by {link}" for link, count in kinds.most_common())
    details = {"links": {f"{first}-{second}": link for (first, second), link in pairs.items()}}
    if _FAR in kinds:
        fix = "choose GPUs of one NUMA node with CUDA_VISIBLE_DEVICES (nvidia-smi topo -m), or use fewer ranks"
        return warning("topology", f"{text}; {_FAR} leaves the NUMA node and is slow", fix, **details)
    return ok("topology", text, **details)
