"""The step bench: real processes, every stage measured, nothing left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from launch.bench import step as bench
from launch.bench.step import StepWorkload, bench_step
from tprt.config import Config
from tprt.errors import ConfigError, EngineDeadError

WAIT_S = 60.0
STAGES = ["schedule", "encode", "broadcast", "decode", "prepare", "update"]
BESIDE = ["total", "answer", "news", "step"]


def processes_of_session(session: int) -> list[str]:
    """Return the command lines of the processes in a session."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                # The name in parentheses may hold spaces; the session is the fourth field after it.
                if int((folder / "stat").read_text().rpartition(")")[2].split()[3]) == session:
                    found.append((folder / "cmdline").read_text())
            except (FileNotFoundError, ProcessLookupError):
                continue
    return found


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, int | float | str]]:
    """Run the command on two ranks, without a checkpoint, and check that its processes and files are gone."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "deployment.yaml").write_text("model: {path: nowhere}\nparallel: {tensor_parallel_size: 2}\n")
    tprt = str(Path(sys.executable).with_name("tprt"))
    command = [tprt, "bench", "step", str(folder / "deployment.yaml"), "--json"]
    command += ["--num-seqs", "8", "--context-len", "64", "--steps", "20"]
    (folder / "tmp").mkdir()
    environment = {**os.environ, "TMPDIR": str(folder / "tmp")}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as ran:
        output, _ = ran.communicate(timeout=WAIT_S)
        # Looked at before the process is waited for the last time: its session id is still its own.
        assert processes_of_session(ran.pid) == []
    assert ran.returncode == 0
    assert list((folder / "tmp").iterdir()) == []
    return [json.loads(line) for line in output.splitlines()]


def test_every_stage_has_positive_times_in_order(rows: list[Mapping[str, float]]) -> None:
    assert [row["stage"] for row in rows] == [*STAGES, *BESIDE]
    for row in rows:
        assert (row["ranks"], row["num_seqs"], row["context_len"]) == (2, 8, 64)
        assert 0 < row["p50_us"] <= row["p99_us"]
        assert row["mean_us"] > 0


def test_the_total_is_the_sum_of_its_stages_and_the_step_holds_all(rows: list[Mapping[str, float]]) -> None:
    mean = {row["stage"]: row["mean_us"] for row in rows}
    rounding = 0.05 * (len(STAGES) + 1)
    assert mean["total"] == pytest.approx(sum(mean[stage] for stage in STAGES), abs=rounding)
    ours = mean["schedule"] + mean["encode"] + mean["update"] + mean["news"]
    assert ours < mean["step"]


def test_ranks_that_fail_at_the_start_are_named_and_do_not_keep_the_bench_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench.sys, "executable", "/bin/false")
    config = Config.model_validate({"model": {"path": "nowhere"}})
    with pytest.raises(EngineDeadError, match=r"has not started: rank 0 ended with 1"):
        bench_step(config, StepWorkload(num_seqs=1, context_len=16, steps=1, temperature=0.0))


def test_a_workload_without_a_step_is_refused() -> None:
    with pytest.raises(ConfigError, match="1 or more of each"):
        StepWorkload(num_seqs=8, context_len=64, steps=0, temperature=0.0)
