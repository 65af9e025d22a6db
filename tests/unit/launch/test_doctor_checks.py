"""Checks of `tprt doctor`, one by one, each with a real fault."""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch.doctor.attention import check_attention
from launch.doctor.checkpoint import check_headers
from launch.doctor.disk import check_disk, find_mount
from launch.doctor.finding import Verdict, bad, silent
from launch.doctor.host import check_host
from launch.doctor.hosts import check_hosts, interface_of
from launch.doctor.memory import check_memory
from launch.doctor.model import check_model
from launch.doctor.network import check_server
from launch.doctor.ranks import check_all_reduce
from launch.doctor.request import DoctorRequest, parse_host
from launch.doctor.shared_memory import check_shared_memory, own_bytes
from launch.doctor.versions import check_torch, check_versions
from tests.support.checkpoints import TinyModel, save_tiny
from tests.support.doctoring import request_for, run_check
from tprt.errors import ConfigError

NOBODY = 65534


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("doctor")
    save_tiny(folder, TinyModel(heads=9, kv_heads=3), shard_size="100KB")
    return folder


@pytest.fixture
def checkpoint(saved: Path, tmp_path: Path) -> Path:
    """A checkpoint of several files that a test may spoil."""
    shutil.copytree(saved, tmp_path / "model")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    return tmp_path / "model"


def test_versions_name_what_is_here_and_what_is_optional() -> None:
    row = run_check(check_versions, request_for())["versions"]
    assert row.verdict is Verdict.OK
    assert "tprt 0.1.0" in row.found


def test_a_torch_without_cuda_is_bad_for_ranks_that_are_to_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.version.cuda", None)
    row = run_check(check_torch, request_for(runtime={"device": "cuda"}))["torch"]
    assert (row.verdict, "built without CUDA" in row.found) == (Verdict.BAD, True)
    assert "runtime.device: cpu" in row.fix
    assert run_check(check_torch, request_for(runtime={"device": "cpu"}))["torch"].verdict is Verdict.OK


def test_a_number_of_ranks_that_is_not_legal_is_named_with_those_that_are(checkpoint: Path) -> None:
    row = run_check(check_model, request_for(checkpoint, parallel={"tensor_parallel_size": 10}))["model"]
    assert row.verdict is Verdict.BAD
    assert "tensor_parallel_size 10 cannot split 9 query heads" in row.found
    assert row.fix.startswith("set parallel.tensor_parallel_size to 1 to 9")


def test_a_model_that_can_be_split_is_shown_with_its_heads(checkpoint: Path) -> None:
    rows = run_check(check_model, request_for(checkpoint, parallel={"tensor_parallel_size": 2}))
    assert rows["model"].verdict is Verdict.OK
    assert (
        "query heads 6 + 3, KV heads 2 + 1; sequences of up to 256 tokens; 1 to 9 ranks" in rows["model"].found
    )
    assert rows["tokenizer"].verdict is Verdict.WARNING


def test_a_length_beyond_the_checkpoint_is_named(checkpoint: Path) -> None:
    row = run_check(check_model, request_for(checkpoint, model={"max_model_len": 1000}))["model"]
    assert (row.verdict, "lower model.max_model_len" in row.fix) == (Verdict.BAD, True)


def test_a_folder_that_is_not_there_is_named() -> None:
    assert "there is no folder 'nowhere'" in run_check(check_model, request_for())["model"].found


def test_a_checkpoint_that_is_whole_is_said_to_be(checkpoint: Path) -> None:
    row = run_check(check_headers, request_for(checkpoint))["checkpoint"]
    assert row.verdict is Verdict.OK
    assert row.details["num_files"] == len(list(checkpoint.glob("*.safetensors")))


def test_a_file_that_was_cut_is_named(checkpoint: Path) -> None:
    file = sorted(checkpoint.glob("*.safetensors"))[1]
    os.truncate(file, file.stat().st_size - 100)
    row = run_check(check_headers, request_for(checkpoint))["checkpoint"]
    assert row.verdict is Verdict.BAD
    assert str(file) in row.found
    assert row.fix == "fetch it again"


def test_a_checkpoint_of_another_model_is_named(checkpoint: Path) -> None:
    settings = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**settings, "intermediate_size": 128}))
    row = run_check(check_headers, request_for(checkpoint))["checkpoint"]
    assert row.verdict is Verdict.BAD
    assert "of another shape: model.layers.0.mlp.down_proj.weight" in row.to_fields()["found"]
    assert "model.path" in row.fix


@contextmanager
def nobodys_rights() -> Iterator[None]:
    """Have the rights of a user who owns nothing."""
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_file_that_this_user_may_not_read_is_named(checkpoint: Path) -> None:
    # Imports take place before, since that user may not read everything they need.
    run_check(check_headers, request_for(checkpoint))
    with nobodys_rights():
        row = run_check(check_headers, request_for(checkpoint))["checkpoint"]
    assert (row.verdict, "Permission denied" in row.found) == (Verdict.BAD, True)


def test_the_disk_is_read_and_its_file_system_named(checkpoint: Path) -> None:
    row = run_check(check_disk, request_for(checkpoint))["disk"]
    kind = subprocess.run(
        ["stat", "-f", "-c", "%T", checkpoint], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert row.verdict is Verdict.OK
    assert str(row.details["file_system"])[:3] == kind[:3]
    assert row.details["bytes"] == sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    assert isinstance(row.details["bytes_per_s"], int)
    assert row.details["bytes_per_s"] > 0


def test_empty_files_are_no_sample_of_a_disk(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    row = run_check(check_disk, request_for(tmp_path))["disk"]
    assert (row.verdict, row.found) == (Verdict.SKIPPED, "there are no weights to read")


def test_a_start_that_has_no_time_to_read_the_checkpoint_is_bad(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.doctor.disk.cached_share", lambda files: 0.0)
    request = request_for(checkpoint, supervision={"startup_timeout_s": 1e-9})
    row = run_check(check_disk, request)["disk"]
    assert (row.verdict, "startup_timeout_s" in row.fix) == (Verdict.BAD, True)


def test_the_mount_of_a_folder_is_the_innermost_and_the_last() -> None:
    mounts = (
        "22 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n"
        "30 22 0:40 / /mnt/my\\040disk rw - nfs4 server:/models rw\n"
        "31 22 0:41 / /mnt rw - tmpfs tmpfs rw\n"
        "32 22 0:42 / /mnt/my\\040disk rw shared:7 - ceph monitor:/ rw\n"
        "33 22 0:43 / /mnt/Müll rw - xfs /dev/vdb rw\n"
    )
    assert find_mount(Path("/mnt/my disk/model"), mounts).kind == "ceph"
    assert find_mount(Path("/mnt/other"), mounts).source == "tmpfs"
    assert find_mount(Path("/mnt/Müll/model"), mounts).kind == "xfs"
    assert find_mount(Path("/home"), mounts).place == "/"


@contextmanager
def soft_limit(kind: int, limit: int) -> Iterator[None]:
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


def test_too_few_files_are_named_with_how_many_are_needed(checkpoint: Path) -> None:
    request = request_for(checkpoint, parallel={"tensor_parallel_size": 100})
    with soft_limit(resource.RLIMIT_NOFILE, 500):
        row = run_check(check_host, request)["open files"]
    assert row.verdict is Verdict.BAD
    assert f"needs {64 + 800 + 2 * len(list(checkpoint.glob('*.safetensors')))}" in row.found
    assert row.fix.startswith("ulimit -n 4096")


def test_more_ranks_than_cpus_are_a_warning() -> None:
    ranks = len(os.sched_getaffinity(0)) + 1
    row = run_check(check_host, request_for(parallel={"tensor_parallel_size": ranks}))["CPUs"]
    assert (row.verdict, "tensor_parallel_size" in row.fix) == (Verdict.WARNING, True)


def test_more_threads_than_cpus_are_a_warning() -> None:
    threads = len(os.sched_getaffinity(0)) + 1
    row = run_check(check_host, request_for(runtime={"num_threads": threads, "device": "cpu"}))["CPUs"]
    assert (row.verdict, row.fix) == (Verdict.WARNING, f"set runtime.num_threads: {threads - 1}")


def test_no_place_for_sockets_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.run_dir._places", lambda: iter(["/proc/nowhere"]))
    row = run_check(check_host, request_for())["run directory"]
    assert (row.verdict, row.fix.startswith("set TMPDIR")) == (Verdict.BAD, True)


def test_what_is_shared_grows_with_the_ranks_and_is_not_in_dev_shm() -> None:
    one, two = (own_bytes(request_for(parallel={"tensor_parallel_size": ranks})) for ranks in (1, 2))
    assert 4 * 2**20 < one < 8 * 2**20
    assert two > one + 64 * 2**20
    row = run_check(check_shared_memory, request_for(runtime={"device": "cpu"}))["/dev/shm"]
    assert row.details["own"] == one


@pytest.mark.parametrize(
    ("free_mib", "device", "verdict"),
    [
        (0.5, "cpu", Verdict.WARNING),
        (2, "cpu", Verdict.OK),
        (8, "cuda", Verdict.BAD),
        (64, "cuda", Verdict.WARNING),
        (1024, "cuda", Verdict.OK),
    ],
)
def test_shm_must_hold_what_nccl_puts_there_and_little_else(
    monkeypatch: pytest.MonkeyPatch, free_mib: float, device: str, verdict: Verdict
) -> None:
    size = int(free_mib * 2**20)
    found = SimpleNamespace(f_bavail=size, f_blocks=size, f_frsize=1)
    monkeypatch.setattr("os.statvfs", lambda path: found)
    request = request_for(runtime={"device": device}, parallel={"tensor_parallel_size": 4})
    row = run_check(check_shared_memory, request)["/dev/shm"]
    assert (row.verdict, "--shm-size" in row.fix) == (verdict, verdict is not Verdict.OK)


def test_an_occupied_port_is_named_with_who_holds_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        row = run_check(check_server, request_for(server={"port": port}))["server"]
    assert row.verdict is Verdict.BAD
    assert f"server.port {port}: cannot listen there: Address already in use" in row.found
    assert f"(pid {os.getpid()})" in row.found
    assert "--port" in row.fix
    assert run_check(check_server, request_for(server={"port": 0}))["server"].verdict is Verdict.OK


def test_an_address_without_a_key_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TPRT_API_KEY", raising=False)
    row = run_check(check_server, request_for(server={"host": "0.0.0.0", "port": 0}))["server"]
    assert (row.verdict, row.fix.startswith("set $TPRT_API_KEY")) == (Verdict.BAD, True)


def spread(port: int, **hosts: object) -> DoctorRequest:
    """Return a request about a deployment of two hosts that meet at `port` of this one."""
    endpoint = {"nnodes": 2, "rdzv_endpoint": f"127.0.0.1:{port}"}
    return request_for(parallel={"tensor_parallel_size": 2}, hosts=endpoint | hosts, server={"port": 0})


def test_where_hosts_meet_must_be_free_on_the_first_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TPRT_HOSTS_SECRET", "0123456789abcdef")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        row = run_check(check_hosts, spread(port))["rendezvous"]
    assert (row.verdict, f"(pid {os.getpid()})" in row.found) == (Verdict.BAD, True)
    assert row.fix.startswith("set hosts.rdzv_endpoint to an address of this host and a free port")
    monkeypatch.setenv("TPRT_HOSTS_SECRET", "0123456789abcdef")
    rows = run_check(check_hosts, spread(port))
    assert {rows[name].verdict for name in ("rendezvous", "secret", "interface")} == {Verdict.OK}
    assert rows["interface"].found == "ranks of several hosts use lo"


def test_another_host_reaches_the_first_or_is_told_that_it_is_not_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as first:
        port = first.getsockname()[1]
        assert run_check(check_hosts, spread(port, node_rank=1))["rendezvous"].verdict is Verdict.OK
    row = run_check(check_hosts, spread(port, node_rank=1))["rendezvous"]
    assert (row.verdict, "node rank 0 does not answer" in row.found) == (Verdict.WARNING, True)
    assert run_check(check_server, spread(port, node_rank=1))["server"].verdict is Verdict.SKIPPED


def test_a_missing_secret_and_an_interface_that_is_not_there_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TPRT_HOSTS_SECRET", raising=False)
    rows = run_check(check_hosts, spread(29400, interface="nosuch0", node_rank=1))
    assert (rows["secret"].verdict, "set hosts.secret_file" in rows["secret"].found) == (Verdict.BAD, True)
    assert rows["interface"].verdict is Verdict.BAD
    assert "hosts.interface nosuch0: this host has" in rows["interface"].found


def test_a_host_looks_at_its_own_ranks_alone(checkpoint: Path) -> None:
    hosts = {"nnodes": 2, "rdzv_endpoint": "127.0.0.1:29400", "nproc_per_node": [1, 2], "node_rank": 1}
    request = request_for(
        checkpoint,
        parallel={"tensor_parallel_size": 3},
        hosts=hosts,
        runtime={"device": "cpu"},
        cache={"num_blocks": 64},
    )
    assert (request.num_ranks, list(request.ranks)) == (2, [1, 2])
    assert run_check(check_memory, request)["memory"].verdict is Verdict.OK
    assert "for 2 ranks" in run_check(check_host, request)["CPUs"].found
    assert "on 3 ranks" in run_check(check_model, request)["model"].found
    assert interface_of(request.config.hosts) == "lo"


def test_no_answer_is_a_warning_on_a_busy_machine_and_bad_on_an_idle_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr("os.getloadavg", lambda: (7.5, 0.0, 0.0))
    assert silent("disk", "gave no answer", "fix it") == bad("disk", "gave no answer", "fix it")
    monkeypatch.setattr("os.getloadavg", lambda: (8.5, 0.0, 0.0))
    row = silent("disk", "gave no answer", "fix it")
    assert (row.verdict, row.found) == (
        Verdict.WARNING,
        "gave no answer, on a busy machine (load 8.5 on 4 CPUs)",
    )


def test_other_hosts_are_reached_or_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other, socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        there, closed = other.getsockname()[1], unheard.getsockname()[1]
        hosts = (("127.0.0.1", there), ("127.0.0.1", closed), ("nosuch.invalid", 1))
        rows = run_check(check_hosts, replace(request_for(), hosts=hosts))
    assert rows[f"host 127.0.0.1:{there}"].verdict is Verdict.OK
    assert "Connection refused" in rows[f"host 127.0.0.1:{closed}"].found
    assert "the name is not known" in rows["host nosuch.invalid:1"].found
    assert "was not measured" in rows["clock"].found


@pytest.mark.parametrize("text", ["host", ":1", "host:", "host:0", "host:x", "host:70000"])
def test_a_host_without_a_name_and_a_port_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected HOST:PORT"):
        parse_host(text)
    assert parse_host("[fd00::2]:29500") == ("fd00::2", 29500)


def test_memory_that_is_not_there_is_named(checkpoint: Path) -> None:
    request = request_for(checkpoint, runtime={"device": "cpu"}, cache={"num_blocks": 10**9})
    row = run_check(check_memory, request)["memory"]
    assert (row.verdict, "cache.num_blocks" in row.fix) == (Verdict.BAD, True)


def test_kv_blocks_for_less_than_one_sequence_are_a_warning_and_none_at_all_is_bad(checkpoint: Path) -> None:
    few = request_for(checkpoint, runtime={"device": "cpu"}, cache={"num_blocks": 3})
    assert run_check(check_memory, few)["memory"].verdict is Verdict.WARNING
    assert run_check(check_attention, few)["attention"].verdict is Verdict.OK
    none = request_for(checkpoint, runtime={"device": "cpu"}, cache={"cpu_memory_gib": 1e-9})
    row = run_check(check_memory, none)["memory"]
    assert (row.verdict, row.fix.startswith("use more ranks")) == (Verdict.BAD, True)


def test_an_attention_backend_that_does_not_work_here_is_named(checkpoint: Path) -> None:
    request = request_for(checkpoint, runtime={"device": "cpu", "attention_backend": "flash_attn_3"})
    row = run_check(check_attention, request)["attention"]
    assert (row.verdict, "it needs a CUDA device" in row.found) == (Verdict.BAD, True)


def test_one_rank_has_nobody_to_sum_with() -> None:
    assert run_check(check_all_reduce, request_for())["all-reduce"].verdict is Verdict.SKIPPED
