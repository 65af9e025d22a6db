"""`tprt doctor` names what would keep a deployment from running here, with a fix, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
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
# A busy machine needs longer than ten seconds to import torch.
PATIENT = ("--timeout-s", "50")
NAMESPACES = ("unshare", "--net", "--mount")
TINY_SHM = 'mount -t tmpfs -o size=64k none /dev/shm && exec "$@"'
Rows = dict[str, dict[str, Any]]


def examine(
    command: Sequence[str], *settings: str, preexec_fn: Any = None, **environment: str
) -> tuple[int, Rows]:
    """Run `tprt doctor`, for a server on a free port; returns the exit code and what was found, by check."""
    overrides = [part for setting in ("server.port=0", *settings) for part in ("--set", setting)]
    ran = subprocess.run(
        [*command, "--json", *overrides],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
        env=os.environ | environment,
        preexec_fn=preexec_fn,
    )
    assert ran.stderr == ""
    result = json.loads(ran.stdout)
    rows = {finding["check"]: finding for finding in result["findings"]}
    assert len(rows) == len(result["findings"]), "each line has a name of its own"
    verdicts = {finding["verdict"] for finding in rows.values()}
    assert result["verdict"] == ("bad" if "bad" in verdicts else "warning" if "warning" in verdicts else "ok")
    assert all(bool(row["fix"]) == (row["verdict"] in ("bad", "warning")) for row in rows.values())
    return ran.returncode, rows


def is_permitted(*command: str) -> bool:
    """Whether this user may run `command`."""
    if shutil.which(command[0]) is None:
        return False
    return subprocess.run([*command, "true"], capture_output=True, check=False, timeout=WAIT_S).returncode == 0


def test_a_machine_that_can_run_the_deployment_is_told_so(tiny: TinyDeployment) -> None:
    code, rows = examine([TPRT, "doctor", tiny.config, *PATIENT])
    assert {name: row for name, row in rows.items() if row["verdict"] == "bad"} == {}
    assert code == 0
    works = ("torch", "memory", "attention", "all-reduce shm", "all-reduce gloo", "/dev/shm", "model")
    assert {rows[name]["verdict"] for name in (*works, "checkpoint", "disk", "server")} == {"ok"}
    assert {rows[name]["verdict"] for name in ("GPU driver", "devices", "peer copies")} == {"skipped"}


def test_people_get_a_table_with_a_line_for_each_check_and_fixes_below(
    tiny: TinyDeployment, tmp_path: Path
) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('there is none')")
    settings = ["--set", "parallel.tensor_parallel_size=10", "--set", "server.port=0"]
    ran = subprocess.run(
        [TPRT, "doctor", tiny.config, *settings, *PATIENT],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
        env=os.environ | {"COLUMNS": "200", "PYTHONPATH": str(tmp_path)},
    )
    assert (ran.returncode, ran.stderr) == (1, "")
    lines = [line.split() for line in ran.stdout.splitlines()]
    assert ["versions", "ok"] in [line[:2] for line in lines]
    refused = [line[:2] for line in lines].index(["model", "bad"])
    assert " ".join(lines[refused + 1]).startswith("fix: set parallel.tensor_parallel_size to 1 to 9")
    assert " ".join(lines[-1]).endswith(" s")


@pytest.mark.skipif(not is_permitted(*NAMESPACES), reason="this user may not make namespaces")
def test_a_tiny_shm_few_files_and_ranks_that_cannot_reach_one_another_are_named_together(
    tiny: TinyDeployment,
) -> None:
    limit = partial(resource.setrlimit, resource.RLIMIT_NOFILE, (72, 1000))
    command = [*NAMESPACES, "sh", "-c", TINY_SHM, "sh", TPRT, "doctor", tiny.config, *PATIENT]
    code, rows = examine(command, "parallel.all_reduce=gloo", preexec_fn=limit)
    assert code == 1
    assert (rows["/dev/shm"]["verdict"], rows["/dev/shm"]["details"]["total"]) == ("warning", 65536)
    assert "--shm-size" in rows["/dev/shm"]["fix"]
    assert rows["open files"]["verdict"] == "bad"
    assert rows["open files"]["found"].startswith("a process may open 72 files")
    assert rows["open files"]["fix"].startswith("ulimit -n 4096")
    assert rows["connections"]["verdict"] == "warning"
    assert rows["all-reduce gloo"]["verdict"] == "bad"
    assert rows["all-reduce gloo"]["found"].startswith("rank ")
    assert "ip link set lo up" in rows["all-reduce gloo"]["fix"]
    assert rows["all-reduce shm"]["verdict"] == "ok"


def test_a_check_that_hangs_is_named_and_the_others_are_not_held_up(
    tiny: TinyDeployment, tmp_path: Path
) -> None:
    shutil.copytree(Path(tiny.config).parent, tmp_path / "model")
    (tmp_path / "model" / "config.json").unlink()
    os.mkfifo(tmp_path / "model" / "config.json")
    began_s = time.monotonic()
    command = [TPRT, "doctor", tiny.config, "--timeout-s", "8"]
    code, rows = examine(command, f"model.path={tmp_path / 'model'}")
    assert time.monotonic() - began_s < WAIT_S / 4
    assert rows["model"]["found"].startswith("gave no answer")
    assert "model.path" in rows["model"]["fix"]
    assert rows["server"]["verdict"] == "ok"
    assert code == (1 if rows["model"]["verdict"] == "bad" else 0)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (
            "raise ImportError('no libcudart.so.12')",
            "torch cannot be imported: ImportError: no libcudart.so.12",
        ),
        ("import os; os.abort()", "the process that imports torch died of signal 6"),
    ],
    ids=["fails", "crashes"],
)
def test_a_torch_that_cannot_be_imported_is_named(
    tiny: TinyDeployment, tmp_path: Path, source: str, said: str
) -> None:
    (tmp_path / "torch.py").write_text(source)
    code, rows = examine([TPRT, "doctor", tiny.config, *PATIENT], PYTHONPATH=str(tmp_path))
    assert (code, rows["torch"]["verdict"], rows["torch"]["found"]) == (1, "bad", said)
    assert rows["checkpoint"]["verdict"] == "skipped"
    assert 'python -c "import torch"' in rows["torch"]["fix"]


def test_settings_that_make_no_sense_are_one_message_and_exit_code_2(tiny: TinyDeployment) -> None:
    command = [TPRT, "doctor", tiny.config, "--host", "nohost"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith("tprt: --host nohost: expected HOST:PORT")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_nothing_is_left_behind_when_it_is_ended_early(
    tiny: TinyDeployment, number: signal.Signals, code: int
) -> None:
    process = start([TPRT, "doctor", tiny.config, "--set", "server.port=0"])
    deadline_s = time.monotonic() + WAIT_S
    while len(descendants(process.pid)) < 2 and time.monotonic() < deadline_s:
        time.sleep(0.005)
    processes = descendants(process.pid)
    process.send_signal(number)
    process.communicate(timeout=WAIT_S)
    assert process.returncode == code
    assert len(processes) > 1
    assert still_there(processes) == []
    if number == signal.SIGKILL:
        # What it could not remove is removed by whoever comes next.
        remove_abandoned()
