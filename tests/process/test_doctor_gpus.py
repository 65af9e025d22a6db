"""`tprt doctor` on a host of four CUDA devices, which are fakes: how and when it ends, whatever they do."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.checkpoint_layouts import QWEN3_600M
from tests.support.deployments import TPRT
from tests.support.fake_gpus import build_fakes, needs_compiler

pytestmark = [needs_compiler, pytest.mark.usefixtures("tmpdir_of_children")]
WAIT_S = 60.0
# A busy machine needs longer than ten seconds to import torch.
PATIENT = ("--timeout-s", "50")
# By when all is over: as it is, and where a busy machine is to get as far as a fault that uses up all time.
TEN_S, LONGEST_S = 10.0, 20.0
# For a busy machine to start and to end.
BUSY_S = 10.0
OF_GPUS = ("devices", "device memory", "computing", "peer copies", "all-reduce nccl", "all-reduce nccl, fewer")
Rows = dict[str, dict[str, Any]]
Examine = Callable[..., tuple[int, Rows]]


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_fakes(tmp_path_factory.mktemp("fakes"))


@pytest.fixture
def examine(libraries: Path, tmp_path: Path) -> Examine:
    """Run `tprt doctor` for four ranks with these faults; returns the exit code and findings by check."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_600M))
    config = tmp_path / "deployment.yaml"
    config.write_text(
        f"model: {{path: {tmp_path}, dtype: bfloat16, max_model_len: 8192, load_format: dummy}}\n"
        "parallel: {tensor_parallel_size: 4}\nruntime: {device: cuda}\nserver: {port: 0}\n"
    )

    def run(faults: str, *options: str) -> tuple[int, Rows]:
        environment = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
        environment |= {
            "LD_LIBRARY_PATH": str(libraries),
            "PYTHONPATH": str(libraries),
            "FAKE_CUDA_DEVICES": "4",
            "FAKE_CUDA_FAULTS": faults,
        }
        ran = subprocess.run(
            [TPRT, "doctor", config, "--json", *options],
            capture_output=True,
            text=True,
            timeout=WAIT_S,
            check=False,
            env=environment,
        )
        assert ran.stderr == ""
        result = json.loads(ran.stdout)
        return ran.returncode, {finding["check"]: finding for finding in result["findings"]}

    return run


def bad_ones(rows: Rows) -> list[str]:
    return [name for name, row in rows.items() if row["verdict"] == "bad"]


@pytest.mark.parametrize("faults", ["", "init-slow"])
def test_sound_devices_are_said_to_be_sound_however_slow_their_driver_is(examine: Examine, faults: str) -> None:
    code, rows = examine(faults, *PATIENT)
    assert (code, bad_ones(rows)) == (0, [])
    assert {rows[name]["verdict"] for name in (*OF_GPUS, "memory", "torch")} == {"ok"}
    assert rows["all-reduce nccl, fewer"]["details"]["world_sizes"] == [2, 3]


def test_sound_devices_are_not_said_to_be_bad_when_ten_seconds_are_over(examine: Examine) -> None:
    began_s = time.monotonic()
    code, rows = examine("init-slow,torch-slow,open-slow")
    assert time.monotonic() - began_s < TEN_S + BUSY_S
    assert (code, bad_ones(rows)) == (0, [])


def test_devices_are_tried_while_torch_is_imported(examine: Examine) -> None:
    code, rows = examine("torch-slow", "--timeout-s", str(LONGEST_S))
    assert (code, bad_ones(rows)) == (0, [])
    assert rows["torch"]["verdict"] == "warning"
    assert {rows[name]["verdict"] for name in OF_GPUS} == {"ok"}


@pytest.mark.parametrize(
    ("faults", "name", "found"),
    [
        ("init-fails", "devices", "cuInit: CUDA_ERROR_SYSTEM_NOT_READY (system not yet initialized)"),
        ("kernel-wrong:2", "computing", "wrong results on device 2"),
        ("copy-wrong:1-3", "peer copies", "what arrived is not what was written: device 1 to 3"),
        ("sum-wrong", "all-reduce nccl", "the sum over 4 devices is wrong"),
    ],
)
def test_a_fault_is_the_one_thing_that_is_bad(examine: Examine, faults: str, name: str, found: str) -> None:
    code, rows = examine(faults, *PATIENT)
    assert (code, bad_ones(rows)) == (1, [name])
    assert rows[name]["found"].endswith(found)


@pytest.mark.parametrize(
    ("faults", "name", "verdict", "found"),
    [
        ("open-hangs:2", "devices", "bad", "no answer: opening device 2 for "),
        ("copy-hangs:1-3", "peer copies", "bad", "no answer: the copy from device 1 to 3 for "),
        ("sum-hangs", "all-reduce nccl", "warning", " s were not enough: the sum over 4 devices by NCCL for "),
        ("init-hangs", "devices", "warning", " s were not enough: initialising the driver for "),
    ],
)
def test_what_hangs_is_named_in_time(
    examine: Examine, faults: str, name: str, verdict: str, found: str
) -> None:
    began_s = time.monotonic()
    code, rows = examine(faults, "--timeout-s", str(LONGEST_S))
    assert time.monotonic() - began_s < LONGEST_S + BUSY_S
    assert (rows[name]["verdict"], found in rows[name]["found"]) == (verdict, True)
    assert bad_ones(rows) == ([name] if verdict == "bad" else [])
    assert code == (1 if verdict == "bad" else 0)
