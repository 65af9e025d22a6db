"""`tprt plan` says what it knows, to people and to programs, and what its predictions rest on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer import Typer
from typer.testing import CliRunner

from launch.cuda_devices import CudaDevice
from launch.planning.command import plan
from launch.planning.replica_plans import _device_names
from tests.support.checkpoint_layouts import QWEN3_600M
from tprt.errors import ConfigError

Plan = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """Plan the model on GPUs that this machine need not have; returns what is printed."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_600M))
    file = tmp_path / "deployment.yaml"
    file.write_text(f"model: {{path: {tmp_path}, max_model_len: 8192}}\nruntime: {{device: cuda}}\n")
    app = Typer()
    app.command()(plan)

    def run_plan(*arguments: str) -> str:
        result = CliRunner().invoke(app, [str(file), *arguments])
        if result.exception is not None:
            raise result.exception
        return result.stdout

    return run_plan


def as_json(text: str) -> dict[str, Any]:
    planned: dict[str, Any] = json.loads(text)
    return planned


def test_json_holds_everything_that_the_tables_show(run: Plan) -> None:
    two = ("--set", "parallel.tensor_parallel_size=2", "--memory-gib", "80", "--batch-size", "64")
    planned = as_json(run(*two, "--json"))
    assert [rank["kv_heads"] for rank in planned["ranks"]] == [4, 4]
    assert planned["num_tokens"] == 16 * planned["num_blocks"]
    assert planned["max_full_sequences"] == planned["num_blocks"] // 512
    assert planned["legal_world_sizes"] == [1, 16]
    memory = planned["ranks"][0]["memory"]
    assert memory["total"] == 80 * 2**30
    assert memory["weights"] > planned["ranks"][0]["weight_bytes"] > 0
    times = planned["decode"]["times"]
    assert [(time["num_ranks"], time["batch_size"]) for time in times] == [
        *((1, 1), (2, 1), (4, 1), (8, 1)),
        *((1, 64), (2, 64), (4, 64), (8, 64)),
    ]
    shown = run(*two)
    for value in (planned["num_blocks"], planned["num_tokens"], planned["max_full_sequences"]):
        assert f"{value:,}" in shown
    for line in planned["decode"]["assumptions"] + planned["warnings"]:
        assert line in shown


def test_a_small_model_is_said_to_be_slower_on_more_gpus(run: Plan) -> None:
    planned = as_json(run("--json", "--memory-gib", "80"))
    assert any("NCCL" in line for line in planned["decode"]["assumptions"])
    slower = [
        line for line in planned["warnings"] if line.startswith("more ranks will be slower: at batch 1, 2 ")
    ]
    assert len(slower) == 1
    assert "take longer than 1 (" in slower[0]
    fast = as_json(run("--json", "--memory-gib", "80", "--allreduce-us", "1"))
    assert not any("at batch 1, 2 " in line for line in fast["warnings"])


def test_the_warning_compares_with_nothing_that_does_not_fit(run: Plan) -> None:
    planned = as_json(run("--json", "--memory-gib", "2", "--set", "parallel.tensor_parallel_size=2"))
    fits = {time["num_ranks"]: time["fits"] for time in planned["decode"]["times"]}
    assert fits[1] is False
    assert not any("than 1 (" in line for line in planned["warnings"])


def test_what_is_assumed_of_the_devices_can_be_given(run: Plan) -> None:
    given = as_json(run("--json", "--bandwidth-gbs", "100", "--allreduce-us", "7", "--context-len", "1"))
    one, two = given["decode"]["times"][:2]
    assert one["read_ms"] == pytest.approx(596_000_000 * 2 / 100e9 * 1e3, rel=0.01)
    assert two["all_reduce_ms"] == pytest.approx((2 * 28 + 2) * 0.007, abs=1e-4)


def test_an_all_reduce_is_planned_with_as_the_links_of_this_hosts_gpus_will_have_it(
    run: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = ("--set", "parallel.tensor_parallel_size=2", "--memory-gib", "80", "--bandwidth-gbs", "3000")
    assert "the time of: NCCL as seen" in run(*two)
    gpus = [CudaDevice("NVIDIA H200", 2**37, 2**37)] * 2
    monkeypatch.setattr("launch.cuda_devices.look_at_devices", lambda: gpus)
    for are_linked, words in (
        (True, "the time of: symmetric memory as seen"),
        (False, "the time of: NCCL as seen"),
    ):
        asked: list[int] = []

        def ask(num_gpus: int, answer: bool = are_linked, asked: list[int] = asked) -> bool:
            asked.append(num_gpus)
            return answer

        monkeypatch.setattr("launch.planning.decode.are_gpus_linked", ask)
        assert words in " ".join(run(*two).split())
        assert asked == [2]


def test_weights_are_fitted_to_the_memory_that_is_given(run: Plan) -> None:
    settings = ("--set", "parallel.tensor_parallel_size=3", "--set", "parallel.rank_weights=auto")
    planned = as_json(run("--json", *settings, "--memory-gib", "80,80,48"))
    sizes = [rank["weight_bytes"] for rank in planned["ranks"]]
    assert sizes[2] / sum(sizes) == pytest.approx(48 / 208, rel=0.05)
    assert [rank["memory"]["total"] >> 30 for rank in planned["ranks"]] == [80, 80, 48]


def test_without_memory_blocks_are_not_known_and_it_says_how_to_know_them(run: Plan) -> None:
    assert as_json(run("--json"))["num_blocks"] is None
    assert "give it with --memory-gib" in run()


def test_too_little_memory_is_a_warning(run: Plan) -> None:
    assert "no KV block fits on ranks [0]" in run("--memory-gib", "2")
    few = run("--memory-gib", "4.5", "--set", "model.max_model_len=40000")
    assert "less than one sequence of max_model_len 40,000" in few


def test_the_memory_of_gpus_is_not_that_of_cpu_ranks(run: Plan) -> None:
    with pytest.raises(ConfigError, match=r"runtime.device is cpu; set cache.cpu_memory_gib instead"):
        run("--memory-gib", "80", "--set", "runtime.device=cpu")


TWO_REPLICAS = ("--set", "parallel.data_parallel_size=2", "--set", "parallel.tensor_parallel_size=2")


def test_one_replica_is_all_there_is(run: Plan) -> None:
    planned = as_json(run("--json", "--memory-gib", "80"))
    (only,), total = planned["replicas"], planned["total"]
    assert (planned["num_replicas"], only.pop("replica")) == (1, 0)
    assert only == total
    assert total["num_tokens"] == planned["num_tokens"]
    assert "replica" not in run("--memory-gib", "80")


def test_replicas_have_devices_of_their_own_and_hold_together_what_each_holds(run: Plan) -> None:
    planned = as_json(run(*TWO_REPLICAS, "--json", "--memory-gib", "80"))
    one = as_json(run(*TWO_REPLICAS[2:], "--json", "--memory-gib", "80"))
    first, second = planned["replicas"]
    assert (first["devices"], second["devices"]) == (["0", "1"], ["2", "3"])
    assert planned["ranks"] == one["ranks"]
    assert planned["num_tokens"] == one["num_tokens"]
    assert first["weight_bytes"] == sum(rank["weight_bytes"] for rank in one["ranks"])
    assert first["kv_bytes"] == one["num_tokens"] * sum(rank["kv_bytes_per_token"] for rank in one["ranks"])
    total = planned["total"]
    assert total["devices"] == ["0", "1", "2", "3"]
    assert total["device_bytes"] == 4 * 80 * 2**30
    for field in ("weight_bytes", "kv_bytes", "num_tokens", "max_full_sequences"):
        assert total[field] == 2 * first[field] == 2 * second[field]
    shown = run(*TWO_REPLICAS, "--memory-gib", "80")
    assert f"{total['num_tokens']:,}" in shown
    assert "2,3" in shown
    assert "2 replicas, which serve different requests" in shown


def test_replicas_on_unlike_devices_are_planned_one_by_one(run: Plan) -> None:
    settings = (*TWO_REPLICAS, "--set", "parallel.rank_weights=auto")
    planned = as_json(run(*settings, "--json", "--memory-gib", "80,48,2,2"))
    first, second = planned["replicas"]
    assert [one["device_bytes"] >> 30 for one in (first, second)] == [128, 4]
    assert first["num_tokens"] > second["num_tokens"]
    assert planned["total"]["num_tokens"] == first["num_tokens"] + second["num_tokens"]
    assert planned["ranks"][0]["weight_bytes"] > planned["ranks"][1]["weight_bytes"]
    assert any(line.startswith("replica 1: no KV block fits") for line in planned["warnings"])


def test_replicas_take_the_devices_that_are_visible_in_their_order(
    run: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    gib = 2**30
    gpus = [CudaDevice("NVIDIA H200", size * gib, size * gib) for size in (80, 80, 40)]
    monkeypatch.setattr("launch.cuda_devices.look_at_devices", lambda: gpus)
    monkeypatch.setattr("launch.planning.decode.are_gpus_linked", lambda num_gpus: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,5,3,1")
    planned = as_json(run(*TWO_REPLICAS, "--json"))
    first, second = planned["replicas"]
    assert (first["devices"], second["devices"]) == (["7", "5"], ["3", "1"])
    # The fourth is not there, and counts as the least of them.
    assert [one["device_bytes"] // gib for one in (first, second)] == [160, 80]
    assert first["num_tokens"] > second["num_tokens"]


def test_what_is_not_known_of_replicas_is_not_added_up(run: Plan) -> None:
    planned = as_json(run(*TWO_REPLICAS, "--json"))
    assert (planned["total"]["num_tokens"], planned["total"]["device_bytes"]) == (None, None)
    assert planned["total"]["weight_bytes"] == 2 * planned["replicas"][0]["weight_bytes"]
    with pytest.raises(ConfigError, match="3 values for 2 ranks in each of 2 replicas; give one for all"):
        run(*TWO_REPLICAS, "--memory-gib", "80,80,80")


def test_replicas_of_cpu_ranks_have_no_devices(run: Plan) -> None:
    cpu = ("--set", "runtime.device=cpu", "--set", "cache.num_blocks=64", "--bandwidth-gbs", "10")
    planned = as_json(run(*TWO_REPLICAS, *cpu, "--json"))
    assert planned["total"]["devices"] == []
    assert planned["total"]["num_tokens"] == 2 * 64 * 16


def test_names_of_devices_are_those_that_are_visible_or_else_numbers() -> None:
    assert _device_names(2, {"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b,GPU-c"}) == ["GPU-a", "GPU-b"]
    assert _device_names(2, {"CUDA_VISIBLE_DEVICES": "4"}) == _device_names(2, {}) == ["0", "1"]


@pytest.mark.parametrize(
    "option", ["--bandwidth-gbs=0", "--bandwidth-gbs=nan", "--bandwidth-gbs=inf", "--allreduce-us=-1"]
)
def test_times_that_make_no_sense_are_refused(run: Plan, option: str) -> None:
    with pytest.raises(ConfigError, match=option.partition("=")[0]):
        run(option)
