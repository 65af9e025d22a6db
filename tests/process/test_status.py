"""`tprt status` finds a running deployment from outside and tells how it is doing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch import LLM, SamplingParams
from tests.support.deployments import TPRT, TinyDeployment

WAIT_S = 60.0


def show_status(*options: str) -> tuple[int, str]:
    """Run `tprt status`; other deployments of this user may be running on this machine."""
    ran = subprocess.run(
        [TPRT, "status", *options], capture_output=True, text=True, timeout=WAIT_S, check=False
    )
    assert ran.stderr == ""
    return ran.returncode, ran.stdout


def own_status(folder: Path) -> tuple[int, list[dict[str, Any]]]:
    """Return the exit code and what is said of deployments whose run directory is in `folder`."""
    code, output = show_status("--json")
    found = [json.loads(line) for line in output.splitlines()]
    return code, [entry for entry in found if Path(entry["run_dir"]).parent == folder.resolve()]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """The folder where run directories are made; at the end they are gone."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", folder)
        yield Path(folder)
        assert list(Path(folder).iterdir()) == []


@pytest.fixture(scope="module")
def llm(tiny: TinyDeployment, folder: Path) -> Iterator[LLM]:
    with LLM(tiny.config) as llm:
        yield llm


def test_a_deployment_that_has_served_is_healthy_with_its_processes_and_its_last_step(
    llm: LLM, tiny: TinyDeployment, folder: Path
) -> None:
    llm.generate([5, 6, 7], SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True))
    code, (entry,) = own_status(folder)
    assert code in (0, 1)
    assert (entry["model"], entry["verdict"]) == (str(Path(tiny.config).parent), "healthy")
    assert [rank["pid"] for rank in entry["ranks"]] == [llm.pids["rank 0"], llm.pids["rank 1"]]
    assert {(rank["phase"], rank["step"]) for rank in entry["ranks"]} == {("idle", 3)}
    numbers = {(rank["collective"]["number"], rank["collective"]["inside"]) for rank in entry["ranks"]}
    assert len(numbers) == 1, "both have called the same collectives"
    if (record := entry["coordinator"]) is not None:
        assert (record["pid"], record["step"]) == (llm.pids["coordinator"], 3)
        assert (record["num_running"], record["num_waiting"]) == (0, 0)


def test_a_deployment_with_a_stopped_rank_is_stalled_and_the_rank_is_named(llm: LLM, folder: Path) -> None:
    pid = llm.pids["rank 1"]
    os.kill(pid, signal.SIGSTOP)
    try:
        code, (entry,) = own_status(folder)
        _, table = show_status()
    finally:
        os.kill(pid, signal.SIGCONT)
    assert code == 1
    assert entry["verdict"] == "stalled"
    assert entry["reason"] == f"rank 1 (pid {pid}) is stopped (state T)"
    assert f": stalled (rank 1 (pid {pid}) is stopped (state T))" in table
    assert any(line.split()[:3] == ["1", str(pid), "T"] for line in table.splitlines())


def test_a_deployment_that_has_ended_is_not_found(llm: LLM, folder: Path) -> None:
    assert len(own_status(folder)[1]) == 1
    llm.close()
    code, found = own_status(folder)
    assert found == []
    assert code in (0, 1, 3)
