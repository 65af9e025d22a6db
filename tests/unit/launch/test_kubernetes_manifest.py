"""The manifest in docs/multi-host.md starts what it should, on the ports and with the mounts that tprt uses."""

from __future__ import annotations

import os
import subprocess
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import yaml
from fastapi.routing import APIRoute

from launch import torchrun_options
from launch.child import HOSTS_SECRET
from launch.cli import main
from launch.serving import command
from launch.serving.http_socket import API_KEY
from tprt.config import Config, split_endpoint
from tprt.server.http.auth import OPEN_PATHS
from tprt.server.http.context import ServerContext
from tprt.server.http.probes import make_probe_router

DOCS = Path(__file__).parents[3] / "docs/multi-host.md"
SHELL_S = 20
LEADER = "tprt-0.tprt.default"


def read_manifest() -> dict[str, Any]:
    text = DOCS.read_text(encoding="utf-8").partition("    apiVersion: leaderworkerset")
    lines = (text[1] + text[2]).splitlines()
    end = next(number for number, line in enumerate(lines) if line and not line.startswith("    "))
    return cast(dict[str, Any], yaml.safe_load(textwrap.dedent("\n".join(lines[:end]))))


MANIFEST = read_manifest()
GROUP = MANIFEST["spec"]["leaderWorkerTemplate"]
PODS = [GROUP["leaderTemplate"]["spec"], GROUP["workerTemplate"]["spec"]]
both = pytest.mark.parametrize("index", [0, 1], ids=["leader", "worker"])


@pytest.fixture
def config_map(tmp_path: Path) -> Path:
    """The deployment that the text above the manifest tells of."""
    path = tmp_path / "model.yaml"
    path.write_text("model: {path: /model}\nserver: {host: 0.0.0.0}\n")
    return path


def words_of(pod: dict[str, Any], index: int, folder: Path) -> list[str]:
    """Return the arguments that `tprt` gets in a pod, as the shell there expands them."""
    (container,) = pod["containers"]
    shown = folder / "tprt"
    shown.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    shown.chmod(0o755)
    injected = {
        "LWS_LEADER_ADDRESS": LEADER,
        "LWS_GROUP_SIZE": str(GROUP["size"]),
        "LWS_WORKER_INDEX": str(index),
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
    }
    line = [*container["command"], *container["args"]]
    ran = subprocess.run(line, env=injected, check=True, capture_output=True, text=True, timeout=SHELL_S)
    return ran.stdout.splitlines()


def config_of(index: int, config_map: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """Return the settings with which a pod's command serves, or takes part on another host."""
    found: dict[str, Config] = {}
    monkeypatch.setattr(command, "_serve", lambda config: found.update(leader=config))
    monkeypatch.setattr(torchrun_options, "run_agent", lambda config: found.update(worker=config))
    words = words_of(PODS[index], index, config_map.parent)
    mounted = f"{mounts_of(PODS[index])['config']}/{config_map.name}"
    assert mounted in words
    with pytest.raises(SystemExit, match="0"):
        main([str(config_map) if word == mounted else word for word in words])
    assert list(found) == [["leader", "worker"][index]]
    return found.popitem()[1]


def mounts_of(pod: dict[str, Any]) -> dict[str, str]:
    return {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}


@both
def test_each_pod_is_the_host_that_its_variables_say(
    index: int, config_map: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(index, config_map, monkeypatch)
    gpus = int(PODS[index]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    assert (config.hosts.nnodes, config.hosts.node_rank) == (GROUP["size"], index)
    assert config.hosts.nproc_per_node == (gpus, gpus)
    assert config.parallel.tensor_parallel_size == gpus * GROUP["size"]


@both
def test_the_ports_are_those_where_tprt_listens(
    index: int, config_map: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(index, config_map, monkeypatch)
    ports = {port["name"]: port["containerPort"] for port in PODS[index]["containers"][0]["ports"]}
    assert config.hosts.rdzv_endpoint is not None
    assert split_endpoint(config.hosts.rdzv_endpoint) == (LEADER, ports.pop("hosts"))
    assert ports == {"http": config.server.port}


def test_the_leader_alone_is_probed_where_the_server_answers_without_a_key() -> None:
    (leader,), (worker,) = (pod["containers"] for pod in PODS)
    probe = leader.pop("readinessProbe")["httpGet"]
    assert leader == worker
    routes = make_probe_router(cast(ServerContext, SimpleNamespace())).routes
    assert probe["path"] in {route.path for route in routes if isinstance(route, APIRoute)} & OPEN_PATHS
    assert probe["port"] in [port["name"] for port in leader["ports"]]


def test_workers_do_not_wait_for_a_leader_that_waits_for_them() -> None:
    assert MANIFEST["spec"]["startupPolicy"] == "LeaderCreated"


@both
def test_secrets_and_volumes_are_there(index: int, config_map: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (container,) = PODS[index]["containers"]
    assert {one["name"] for one in container["env"]} == {HOSTS_SECRET, API_KEY}
    assert all(one["valueFrom"]["secretKeyRef"].keys() == {"name", "key"} for one in container["env"])
    mounts = mounts_of(PODS[index])
    volumes = {volume.pop("name"): volume for volume in map(dict, PODS[index]["volumes"])}
    assert mounts.keys() == volumes.keys()
    assert (mounts["shm"], volumes["shm"]) == ("/dev/shm", {"emptyDir": {"medium": "Memory"}})
    config = config_of(index, config_map, monkeypatch)
    assert mounts["model"] == config.model.path
    assert PODS[index]["terminationGracePeriodSeconds"] > config.server.drain_timeout_s
