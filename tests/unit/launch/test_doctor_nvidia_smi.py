"""What `tprt doctor` makes of nvidia-smi: of one that answers, one that fails, one that hangs, and none."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from launch.doctor.finding import Verdict
from launch.doctor.nvidia_smi import check_driver, parse_topology, used_gpus
from launch.doctor.request import DoctorRequest
from tests.support.doctoring import request_for, run_check

UUIDS = ("GPU-aaaa1111", "GPU-aaaa2222", "GPU-bbbb3333", "GPU-cccc4444")
GPUS = "\n".join(f"{uuid}, NVIDIA H100 80GB HBM3, 570.86.15, Default" for uuid in UUIDS)
APPS = f"{UUIDS[1]}, 4242, /usr/bin/python3, 1024\n{UUIDS[3]}, 4343, other, [N/A]\n"
# As a terminal gets it: the heading is underlined.
TOPOLOGY = (
    "\t\x1b[4mGPU0\tGPU1\tGPU2\tGPU3\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m\n"
    "GPU0\t X \tNV18\tSYS\tSYS\tPIX\t0-31\t0\t\tN/A\n"
    "GPU1\tNV18\t X \tSYS\tSYS\tNODE\t0-31\t0\t\tN/A\n"
    "GPU2\tSYS\tSYS\t X \tNV18\tSYS\t32-63\t1\t\tN/A\n"
    "GPU3\tSYS\tSYS\tNV18\t X \tSYS\t32-63\t1\t\tN/A\n"
    "NIC0\tPIX\tNODE\tSYS\tSYS\t X \n\nLegend:\n\n  X    = Self\n"
)
Install = Callable[[str], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put a program called nvidia-smi, and nothing but what it needs, into PATH."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def write(script: str) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)

    return write


def answering(gpus: str = GPUS, apps: str = APPS, topology: str = TOPOLOGY) -> str:
    """Return a script that answers each question."""
    return (
        'case "$1" in\n'
        f"--query-gpu=*) cat <<'END'\n{gpus}\nEND\n;;\n"
        f"--query-compute-apps=*) cat <<'END'\n{apps}\nEND\n;;\n"
        f"topo) cat <<'END'\n{topology}\nEND\n;;\n"
        "*) exit 9;;\nesac"
    )


def on_cuda(num_ranks: int) -> DoctorRequest:
    return request_for(runtime={"device": "cuda"}, parallel={"tensor_parallel_size": num_ranks})


def test_driver_other_processes_and_topology_are_named(install: Install) -> None:
    install(answering())
    rows = run_check(check_driver, on_cuda(2))
    assert rows["GPU driver"].verdict is Verdict.OK
    assert rows["GPU driver"].found == "570.86.15: 4 x NVIDIA H100 80GB HBM3"
    assert rows["GPU processes"].verdict is Verdict.WARNING
    assert rows["GPU processes"].found == "python3 (pid 4242, 1024 MiB) on GPU 1"
    assert (rows["topology"].verdict, rows["topology"].found) == (Verdict.OK, "1 pairs by NV18")


def test_processes_of_the_examination_itself_are_not_named(install: Install) -> None:
    install(answering(apps=f"{UUIDS[1]}, {os.getpid()}, /usr/bin/python3, 512"))
    assert run_check(check_driver, on_cuda(2))["GPU processes"].verdict is Verdict.OK


def test_only_the_gpus_that_the_ranks_will_see_count(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install(answering())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,0")
    rows = run_check(check_driver, on_cuda(2))
    assert rows["GPU processes"].verdict is Verdict.OK
    assert rows["topology"].verdict is Verdict.WARNING
    assert rows["topology"].details["links"] == {"0-2": "SYS"}


def test_every_pair_of_the_matrix_is_read() -> None:
    links = parse_topology(TOPOLOGY)
    assert len(links) == 12
    assert (links[0, 1], links[3, 2], links[1, 2]) == ("NV18", "NV18", "SYS")


@pytest.mark.parametrize(
    ("visible", "used"),
    [
        (None, [0, 1, 2, 3]),
        ("3,1", [3, 1]),
        ("GPU-bbbb, 0", [2, 0]),
        ("GPU-aaaa", []),
        ("1,-1,2", [1]),
        ("", []),
        ("9", []),
    ],
)
def test_visible_devices_are_those_that_cuda_takes(visible: str | None, used: list[int]) -> None:
    assert used_gpus(len(UUIDS), UUIDS, visible) == used


def test_an_exclusive_compute_mode_is_a_warning(install: Install) -> None:
    install(answering(gpus=GPUS.replace("Default", "Exclusive_Process")))
    row = run_check(check_driver, on_cuda(1))["GPU driver"]
    assert (row.verdict, row.fix) == (Verdict.WARNING, "nvidia-smi -c DEFAULT")


def test_a_driver_that_fails_is_named_with_what_it_says(install: Install) -> None:
    install("echo 'Failed to initialize NVML: Driver/library version mismatch' >&2; exit 18")
    row = run_check(check_driver, on_cuda(1))["GPU driver"]
    assert row.verdict is Verdict.BAD
    assert row.found == "nvidia-smi failed: Failed to initialize NVML: Driver/library version mismatch"


def test_a_driver_that_hangs_is_named_within_its_deadline(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("exec sleep 60")
    monkeypatch.setattr("launch.doctor.nvidia_smi._PATIENCE_S", 0.3)
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
    began_s = time.monotonic()
    row = run_check(check_driver, on_cuda(1))["GPU driver"]
    assert time.monotonic() - began_s < 10
    assert row.verdict is Verdict.BAD
    assert "gave no answer in 0.3 s" in row.found
    assert "dmesg" in row.fix
    hurried = replace(on_cuda(1), end_s=time.monotonic() + 0.7)
    monkeypatch.setattr("launch.doctor.nvidia_smi._PATIENCE_S", 6.0)
    row = run_check(check_driver, hurried)["GPU driver"]
    assert (row.verdict, "--timeout-s" in row.fix) == (Verdict.WARNING, True)


def test_no_nvidia_smi_is_no_fault_and_cpu_ranks_need_none(install: Install) -> None:
    rows = run_check(check_driver, on_cuda(1))
    assert rows["GPU driver"].verdict is Verdict.SKIPPED
    rows = run_check(check_driver, request_for(runtime={"device": "cpu"}))
    assert rows["GPU driver"].found == "ranks compute on the CPU"


def test_a_host_whose_gpus_are_not_given_to_this_container_is_named(install: Install) -> None:
    install(answering(gpus=""))
    row = run_check(check_driver, replace(on_cuda(1)))["GPU driver"]
    assert (row.verdict, "--gpus all" in row.fix) == (Verdict.BAD, True)
