"""`tprt doctor` on real devices: what it says of sound ones, of a full one, and of an nvidia-smi that hangs."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.cuda_devices import look_at_devices
from tests.support.checkpoint_layouts import QWEN3_600M
from tests.support.deployments import TPRT

pytestmark = pytest.mark.gpu

WAIT_S = 120.0
HELD_BYTES = 4 * 2**30
Rows = dict[str, dict[str, Any]]


@pytest.fixture
def config(tmp_path: Path) -> str:
    """Qwen3-0.6B without files of weights."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_600M))
    file = tmp_path / "deployment.yaml"
    file.write_text(
        f"model: {{path: {tmp_path}, dtype: bfloat16, max_model_len: 8192, load_format: dummy}}\n"
        "runtime: {device: cuda}\nserver: {port: 0}\n"
    )
    return str(file)


def examine(config: str, *settings: str, timeout_s: float = 10.0, **environment: str) -> tuple[int, Rows]:
    """Run `tprt doctor` for `timeout_s` at most; returns the exit code and what was found, by check."""
    overrides = [part for setting in settings for part in ("--set", setting)]
    ran = subprocess.run(
        [TPRT, "doctor", config, "--json", "--timeout-s", str(timeout_s), *overrides],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
        env=os.environ | environment,
    )
    assert ran.stderr == ""
    result = json.loads(ran.stdout)
    rows = {finding["check"]: finding for finding in result["findings"]}
    for row in rows.values():
        print(f"{row['check']}: {row['verdict']}: {row['found']} {row['details'].get('seconds', '')}")
    print(f"{result['verdict']} in {result['seconds']} s")
    assert len(rows) == len(result["findings"])
    return ran.returncode, rows


def test_a_sound_device_is_said_to_be_sound_within_ten_seconds(config: str) -> None:
    began_s = time.monotonic()
    code, rows = examine(config)
    assert time.monotonic() - began_s < 11
    assert {name: row for name, row in rows.items() if row["verdict"] == "bad"} == {}
    assert code == 0
    assert torch.cuda.get_device_name(0) in rows["devices"]["found"]
    assert {rows[name]["verdict"] for name in ("torch", "torch kernels", "computing", "memory")} == {"ok"}
    assert rows["attention"]["verdict"] in ("ok", "warning")
    assert rows["GPU driver"]["verdict"] in ("ok", "skipped")
    assert rows["memory"]["details"]["num_tokens"] > 8192


def test_the_driver_says_of_the_devices_what_torch_says() -> None:
    devices = look_at_devices()
    assert len(devices) == torch.cuda.device_count()
    for index, device in enumerate(devices):
        assert device.name == torch.cuda.get_device_name(index)
        free, total = torch.cuda.mem_get_info(index)
        assert (device.total, abs(device.free - free) < 2**30) == (total, True)


@pytest.mark.multigpu
def test_all_devices_are_tried_within_ten_seconds(config: str) -> None:
    count = torch.cuda.device_count()
    began_s = time.monotonic()
    code, rows = examine(config, f"parallel.tensor_parallel_size={count}")
    assert time.monotonic() - began_s < 11
    assert code == 0
    assert {rows[name]["verdict"] for name in ("devices", "computing", "peer copies")} == {"ok"}
    assert rows["peer copies"]["details"]["pairs"] == count * (count - 1)
    assert rows["all-reduce nccl"]["verdict"] == "ok"


@pytest.mark.multigpu
def test_all_devices_and_fewer_sum_by_each_backend(config: str) -> None:
    count = torch.cuda.device_count()
    code, rows = examine(config, f"parallel.tensor_parallel_size={count}", timeout_s=90.0)
    assert code == 0
    assert rows["all-reduce nccl"]["details"]["world_size"] == count
    if count > 2:
        sizes = rows["all-reduce nccl, fewer"]["details"]["world_sizes"]
        assert sizes == list(range(2, count))
    linked = rows["devices"]["details"]["linked"]
    assert ("all-reduce symm_mem" in rows) == linked
    assert not linked or rows["all-reduce symm_mem"]["verdict"] == "ok"


@pytest.mark.multigpu
def test_a_device_that_is_not_visible_is_not_tried(config: str) -> None:
    last = str(torch.cuda.device_count() - 1)
    _, rows = examine(config, CUDA_VISIBLE_DEVICES=last)
    assert (rows["devices"]["verdict"], rows["devices"]["details"]["visible"]) == ("ok", 1)


def test_ranks_that_share_a_gpu_sum(config: str) -> None:
    count = torch.cuda.device_count()
    shared = ("parallel.allow_shared_gpu=true", f"parallel.tensor_parallel_size={count + 1}")
    _, rows = examine(config, *shared, timeout_s=90.0)
    assert rows["devices"]["verdict"] == "ok"
    assert "all-reduce nccl" not in rows
    assert rows["all-reduce symm_mem"]["verdict"] == "ok"


def test_memory_that_somebody_else_has_is_named(config: str) -> None:
    held = torch.empty(HELD_BYTES, dtype=torch.uint8, device="cuda:0")
    try:
        code, rows = examine(config)
    finally:
        del held
        torch.cuda.empty_cache()
    assert (code, rows["device memory"]["verdict"]) == (0, "warning")
    assert "CUDA_VISIBLE_DEVICES" in rows["device memory"]["fix"]


def test_ranks_without_a_device_are_named(config: str) -> None:
    count = torch.cuda.device_count()
    code, rows = examine(config, f"parallel.tensor_parallel_size={count + 1}")
    assert (code, rows["devices"]["verdict"]) == (1, "bad")
    assert f"need a CUDA device each, but {count} are visible" in rows["devices"]["found"]
    assert rows["devices"]["fix"].startswith("lower parallel.tensor_parallel_size")
    assert rows["all-reduce"]["verdict"] == "bad"


def test_a_share_of_memory_that_holds_no_kv_block_is_bad(config: str) -> None:
    code, rows = examine(config, "cache.memory_fraction=0.02")
    assert (code, rows["memory"]["verdict"]) == (1, "bad")
    assert "no KV block fits" in rows["memory"]["found"]


def test_a_nvidia_smi_that_hangs_is_named_and_the_devices_are_looked_at(config: str, tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    # It has six seconds of its own, also where Python starts slowly.
    code, rows = examine(config, timeout_s=20.0, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert (code, rows["GPU driver"]["verdict"]) == (1, "bad")
    assert "gave no answer" in rows["GPU driver"]["found"]
    assert rows["devices"]["verdict"] == "ok"


def test_no_visible_device_is_named(config: str) -> None:
    code, rows = examine(config, "runtime.device=cuda", CUDA_VISIBLE_DEVICES="")
    assert (code, rows["devices"]["verdict"]) == (1, "bad")
