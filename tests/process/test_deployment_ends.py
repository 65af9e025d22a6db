"""However a deployment ends, the cause is named and nothing is left: no process, no run directory."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import LLM, SamplingParams
from tests.support.checkpoints import TinyModel
from tests.support.deployments import (
    TinyDeployment,
    descendants,
    make_tiny_deployment,
    start,
    still_there,
)
from tprt.errors import EngineDeadError

pytestmark = pytest.mark.usefixtures("tmpdir_of_children")

WAIT_S = 60.0
ENDLESS = 60_000
REFUSED = [500]
NO_RESTART = ["supervision.max_restarts=0"]
# Where nothing depends on a second rank.
ONE_RANK = "parallel.tensor_parallel_size=1"


def endless() -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=ENDLESS, ignore_eos=True)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


# Children that die before a line of ours runs in them.


def replace_interpreter(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> None:
    """Start children with `script`, which finds the real interpreter in $PYTHON."""
    interpreter = folder / "python"
    interpreter.write_text(f"#!/bin/sh\n{script}\n")
    interpreter.chmod(0o700)
    monkeypatch.setenv("PYTHON", sys.executable)
    monkeypatch.setattr(sys, "executable", str(interpreter))


def test_a_child_that_cannot_be_started_is_named_with_the_reason(
    tiny: TinyDeployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(EngineDeadError) as caught:
        LLM(tiny.config)
    assert str(caught.value).startswith("coordinator could not be started with /nowhere/python: ")
    assert "No such file" in str(caught.value)


def test_a_child_that_cannot_be_watched_is_not_left_to_itself(
    tiny: TinyDeployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []

    def open_one_pidfd(pid: int) -> int:
        started.append(pid)
        if len(started) > 1:
            raise OSError(errno.EMFILE, "Too many open files")
        return pidfd_open(pid)

    pidfd_open = os.pidfd_open
    monkeypatch.setattr(os, "pidfd_open", open_one_pidfd)
    with pytest.raises(EngineDeadError, match=r"^rank 0 could not be started with .*Too many open files$"):
        LLM(tiny.config)
    assert len(started) == 2
    assert still_there(started) == []


@pytest.mark.parametrize("victim", [0, 1])
def test_a_child_that_dies_before_python_runs_ends_all_at_once_and_is_named(
    tiny: TinyDeployment, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, victim: int
) -> None:
    replace_interpreter(
        monkeypatch, tmp_path, f'if [ "$RANK" = {victim} ]; then exit 7; fi; exec "$PYTHON" "$@"'
    )
    with pytest.raises(
        EngineDeadError, match=rf"rank {victim} \(pid \d+\) ended unexpectedly with exit code 7 in phase spawn$"
    ):
        LLM(tiny.config)


# Failures of a rank that does not answer.


def test_an_error_that_only_a_rank_without_output_has_ends_all_with_its_traceback(tmp_path: Path) -> None:
    wide = make_tiny_deployment(tmp_path, TinyModel(heads=4, intermediate_size=16384))
    with LLM(wide.config, ["cache.num_blocks=300", *NO_RESTART]) as llm:
        pid = llm.pids["rank 1"]
        size_kib = next(
            int(line.split()[1])
            for line in Path(f"/proc/{pid}/status").read_text().splitlines()
            if line.startswith("VmSize")
        )
        # Enough for Python, too little for 4000 tokens by 16384 channels in float32.
        limit = size_kib * 1024 + 128 * 2**20
        resource.prlimit(pid, resource.RLIMIT_AS, (limit, limit))
        prompts = [[number + 1] * 200 for number in range(20)]
        with pytest.raises(EngineDeadError) as caught:
            llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=2))
    lines = str(caught.value).splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert any("model_runner.py" in line for line in lines)
    assert f"pid {pid}) failed in phase prefill: RuntimeError" in str(caught.value)
    assert "can't allocate memory" in str(caught.value)


def test_a_stopped_rank_is_named_at_the_deadline_and_all_end(tiny: TinyDeployment) -> None:
    with LLM(tiny.config, ["supervision.step_timeout_s=2", *NO_RESTART]) as llm:
        pids = llm.pids
        os.kill(pids["rank 1"], signal.SIGSTOP)
        with pytest.raises(EngineDeadError) as caught:
            llm.generate([5, 6, 7], endless())
        assert "rank 1" in str(caught.value).splitlines()[-1]
        assert still_there(list(pids.values())) == []


def test_a_stopped_coordinator_is_named_at_the_deadline_and_all_end(tiny: TinyDeployment) -> None:
    settings = ["step_timeout_s=3", "shutdown_grace_s=0.1"]
    with LLM(tiny.config, [ONE_RANK, *(f"supervision.{setting}" for setting in settings)]) as llm:
        pids = llm.pids
        os.kill(pids["coordinator"], signal.SIGSTOP)
        with pytest.raises(
            EngineDeadError, match=rf"coordinator \(pid {pids['coordinator']}\).*has not answered"
        ):
            llm.generate([5, 6, 7], endless())
    assert still_there(list(pids.values())) == []


# Signals to the program itself.

SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]


@pytest.mark.parametrize(("number", "exit_code"), SIGNALS, ids=[number.name for number, _ in SIGNALS])
def test_a_signal_during_generation_ends_all_in_order_and_shows_what_there_is(
    tiny: TinyDeployment, number: signal.Signals, exit_code: int
) -> None:
    # That the refused prompt is answered says that the other one has been taken in.
    command = start(tiny.command([REFUSED, [5, 6, 7]], ENDLESS, ONE_RANK))
    assert command.stdout is not None
    assert "outside the vocabulary" in command.stdout.readline()
    time.sleep(0.3)
    pids = descendants(command.pid)
    assert len(pids) == 2
    os.killpg(command.pid, number)
    output, errors = command.communicate(timeout=WAIT_S)
    assert command.returncode == exit_code, errors
    (line,) = output.splitlines()
    found = json.loads(line)
    assert found["finish_reason"] == "abort"
    # Few on a slow machine.
    count = min(len(found["token_ids"]), 8)
    assert found["token_ids"][:count] == tiny.expected([5, 6, 7], 8)[:count]
    assert len(found["token_ids"]) < ENDLESS
    assert "Traceback" not in errors
    assert still_there(pids) == []


@pytest.mark.parametrize(("number", "exit_code"), SIGNALS[:2], ids=[number.name for number, _ in SIGNALS[:2]])
def test_a_signal_while_ranks_load_ends_all_in_order(
    tiny: TinyDeployment, number: signal.Signals, exit_code: int
) -> None:
    command = start(tiny.command([[5, 6, 7]], 8))
    wait_until(lambda: len(descendants(command.pid)) == 3)
    pids = descendants(command.pid)
    os.killpg(command.pid, number)
    output, errors = command.communicate(timeout=WAIT_S)
    assert (command.returncode, output) == (exit_code, ""), errors
    assert still_there(pids) == []


@pytest.mark.parametrize(("last_words", "exit_code"), [("", 0), ("raise ValueError('mine')", 1)])
def test_a_program_that_never_closes_its_llm_leaves_nothing(
    tiny: TinyDeployment, last_words: str, exit_code: int
) -> None:
    program = (
        "from launch import LLM\n"
        f"llm = LLM({tiny.config!r}, [{ONE_RANK!r}])\n"
        f"print(*llm.pids.values())\n{last_words}"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=WAIT_S, check=False
    )
    assert ran.returncode == exit_code, ran.stderr
    assert ("ValueError: mine" in ran.stderr) == bool(exit_code)
    pids = [int(pid) for pid in ran.stdout.split()]
    assert len(pids) == 2
    assert still_there(pids) == []
