"""In a job of Slurm SIGTERM is left to whoever ends the others, and elsewhere it ends a process as ever."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.parent_death import PARENT_PID, RUN_DIR
from launch.run_dir import RunDir

WAIT_S = 30.0
JOB = {"SLURM_JOB_ID": "7"}


def run(code: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    outside = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    return subprocess.run(
        [sys.executable, "-c", f"import os, signal, time\nfrom pathlib import Path\n{code}"],
        env=outside | env,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )


KILL_SELF = "os.kill(os.getpid(), signal.SIGTERM)\n"


@pytest.mark.parametrize(("env", "code"), [(JOB, 0), ({}, -signal.SIGTERM)])
def test_a_child_leaves_it_to_its_parent_in_a_job(env: dict[str, str], code: int) -> None:
    leave = "from launch.job_signals import leave_sigterm_to_parent\nleave_sigterm_to_parent()\n"
    assert run(leave + KILL_SELF, env).returncode == code


@pytest.mark.parametrize(("env", "said"), [(JOB, "in\n"), ({}, "")])
def test_a_host_leaves_it_to_the_first_one_in_a_job_while_that_one_is_there(
    env: dict[str, str], said: str
) -> None:
    within = "from launch.job_signals import sigterm_left_to_first_host as left\n"
    within += f"with left():\n    {KILL_SELF}    print('in', flush=True)\n"
    ended = run(f"{within}{KILL_SELF}print('after')", env)
    assert (ended.stdout, ended.returncode) == (said, -signal.SIGTERM)


@pytest.mark.parametrize(("env", "code"), [(JOB, 0), ({}, -signal.SIGTERM)])
def test_a_coordinator_in_a_job_ends_by_the_signal_of_its_parents_death_alone(
    env: dict[str, str], code: int, tmp_path: Path
) -> None:
    begin = "from launch.parent_death import clean_up_after_parent\nclean_up_after_parent()\n"
    place = {PARENT_PID: str(os.getpid()), RUN_DIR: str(tmp_path / "gone")}
    assert run(f"{begin}{KILL_SELF}time.sleep(0.2)\nos._exit(0)", env | place).returncode == code


def test_an_adopted_rank_in_a_job_ends_after_the_first_process_of_its_host() -> None:
    code = "from launch.torchrun import adoption\nadoption._END_S = 0.0\n"
    code += f"adoption.leave_sigterm_to_first_process(Path(os.environ[{RUN_DIR!r}]))\n"
    code += f"{KILL_SELF}print('there', flush=True)\ntime.sleep({WAIT_S})\n"
    run_dir = RunDir.create()
    child = subprocess.Popen(
        [sys.executable, "-c", f"import os, signal, time\nfrom pathlib import Path\n{code}"],
        env={**os.environ, **JOB, RUN_DIR: str(run_dir.path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "there\n"
        time.sleep(0.2)
        assert child.poll() is None
        run_dir.remove()
        assert child.wait(WAIT_S) == 128 + signal.SIGTERM
    finally:
        run_dir.remove()
        child.kill()
        child.communicate()
