"""`tprt doctor` names what would keep a deployment from running here, with a fix, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from launch.run_dir import remove_abandoned
from tests.support.deployments import TPRT, TinyDeployment, descendants, start, still_there

pytestmark = pytest.mark.usefixtures("tmpdir_of_children")
WAIT_S = 60.0
UNSHARE_NET = ("unshare", "-n")
Rows = dict[str, dict[str, Any]]


def examine(config: str, *settings: str, prefix: Sequence[str] = (), **popen: Any) -> tuple[int, Rows]:
    """Run `tprt doctor`, for a server on a free port; returns the exit code and what was found, by check."""
    overrides = [part for setting in ("server.port=0", *settings) for part in ("--set", setting)]
    command = [*prefix, TPRT, "doctor", config, "--json", *overrides]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False, **popen)
    assert ran.stderr == ""
    findings = json.loads(ran.stdout)["findings"]
    rows = {finding["check"]: finding for finding in findings}
    assert len(rows) == len(findings), "each line has a name of its own"
    return ran.returncode, rows


def is_permitted(*command: str) -> bool:
    """Whether this user may run `command` (the machine decides, and not the system)."""
    try:
        return (
            subprocess.run([*command, "true"], capture_output=True, check=False, timeout=WAIT_S).returncode == 0
        )
    except FileNotFoundError:
        return False


needs_network_namespace = pytest.mark.skipif(
    not is_permitted(*UNSHARE_NET), reason="this user may not make a network namespace"
)


def test_a_machine_that_can_run_the_deployment_is_told_so_within_ten_seconds(tiny: TinyDeployment) -> None:
    began_s = time.monotonic()
    code, rows = examine(tiny.config)
    assert time.monotonic() - began_s < 11
    assert {name: row for name, row in rows.items() if row["verdict"] == "bad"} == {}
    assert code == 0
    assert rows["model"]["verdict"] == "ok"
    assert all(row["fix"] for row in rows.values() if row["verdict"] == "warning")


def test_an_occupied_port_is_named(tiny: TinyDeployment) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, rows = examine(tiny.config, f"server.port={port}")
    assert code == 1
    assert rows["server"]["verdict"] == "bad"
    assert f"server.port {port}: cannot listen there: Address already in use" in rows["server"]["found"]
    assert "--port" in rows["server"]["fix"]


def test_a_number_of_ranks_that_is_not_legal_is_named_with_those_that_are(tiny: TinyDeployment) -> None:
    code, rows = examine(tiny.config, "parallel.tensor_parallel_size=10")
    assert (code, rows["model"]["verdict"]) == (1, "bad")
    assert "tensor_parallel_size 10 cannot split 9 query heads" in rows["model"]["found"]
    assert rows["model"]["fix"] == "legal sizes for this model: 1 to 9"


def test_too_few_files_are_named(tiny: TinyDeployment) -> None:
    limit = partial(resource.setrlimit, resource.RLIMIT_NOFILE, (72, 1000))
    code, rows = examine(tiny.config, preexec_fn=limit)
    assert (code, rows["open files"]["verdict"]) == (1, "bad")
    assert rows["open files"]["found"].startswith("a process may open 72 files")
    assert rows["open files"]["fix"].startswith("ulimit -n 4096")
    assert rows["connections"]["verdict"] == "warning"
    assert "may open 1000 files" in rows["connections"]["found"]


@needs_network_namespace
def test_ranks_that_cannot_reach_one_another_are_named(tiny: TinyDeployment) -> None:
    code, rows = examine(tiny.config, "parallel.all_reduce=gloo", prefix=UNSHARE_NET)
    assert (code, rows["all-reduce gloo"]["verdict"]) == (1, "bad")
    assert rows["all-reduce gloo"]["found"].startswith("rank ")
    assert "ip link set lo up" in rows["all-reduce gloo"]["fix"]
    assert rows["all-reduce shm"]["verdict"] == "ok"


def test_settings_that_make_no_sense_are_one_message_and_exit_code_2(tiny: TinyDeployment) -> None:
    command = [TPRT, "doctor", tiny.config, "--host", "nohost"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith("tprt: --host nohost: expected HOST:PORT")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_nothing_is_left_behind_when_it_is_ended_early(
    tiny: TinyDeployment, tmpdir_of_children: Path, number: signal.Signals, code: int
) -> None:
    process = start([TPRT, "doctor", tiny.config, "--set", "server.port=0"])
    # The runner and at least one check are there, or all is over already.
    deadline_s = time.monotonic() + WAIT_S
    while len(descendants(process.pid)) < 2 and process.poll() is None and time.monotonic() < deadline_s:
        time.sleep(0.01)
    process.send_signal(number)
    process.communicate(timeout=WAIT_S)
    assert process.returncode == code
    if number == signal.SIGKILL:
        # What could be removed by nobody is by whoever comes next.
        assert still_there(descendants(os.getpid())) == []
        remove_abandoned()
