"""What torchrun says in the environment becomes settings, and what does not fit is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.config_file import load_config
from launch.torchrun.place import overrides_of, read_place
from tprt.config import Config
from tprt.errors import ConfigError

BY_HAND = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29400",
}
TORCHRUN = BY_HAND | {
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "TORCHELASTIC_RUN_ID": "job",
    "TORCHELASTIC_RESTART_COUNT": "2",
}


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "deployment.yaml"
    path.write_text("model: {path: m}\nparallel: {tensor_parallel_size: 2}\n")
    return str(path)


def settings(file: str, *given: str, **env: str) -> Config:
    return load_config(file, [*given, *overrides_of(read_place(TORCHRUN | env), file, given)])


def test_the_number_of_processes_and_hosts_is_that_of_torchrun(file: str) -> None:
    config = settings(file, "supervision.max_restarts=3")
    assert config.parallel.tensor_parallel_size == 8
    assert (config.hosts.nnodes, config.hosts.node_rank, config.hosts.nproc_per_node) == (2, 1, (4, 4))
    assert (config.hosts.rdzv_id, config.supervision.max_restarts) == ("job", 0)


def test_hosts_meet_at_the_master_port_or_beside_it_where_that_is_the_agents(file: str) -> None:
    assert settings(file).hosts.rdzv_endpoint == "10.0.0.1:29401"
    assert read_place(BY_HAND).endpoint == "10.0.0.1:29400"
    assert settings(file, "hosts.rdzv_endpoint=10.0.0.1:7").hosts.rdzv_endpoint == "10.0.0.1:7"


def test_without_torchrun_the_hosts_follow_from_the_ranks() -> None:
    place = read_place(BY_HAND)
    assert (place.node_rank, place.nnodes, place.restart_count) == (1, 2, 0)


def test_one_host_needs_no_endpoint(file: str) -> None:
    config = settings(file, LOCAL_WORLD_SIZE="8", GROUP_RANK="0", GROUP_WORLD_SIZE="1", RANK="1")
    assert (config.hosts.nnodes, config.hosts.rdzv_endpoint) == (1, None)


def test_hosts_may_have_different_numbers_of_ranks_if_the_settings_say_so(file: str) -> None:
    unequal = {"LOCAL_WORLD_SIZE": "5", "RANK": "4"}
    assert settings(file, "hosts.nproc_per_node=[3, 5]", **unequal).hosts.nproc_per_node == (3, 5)
    with pytest.raises(ConfigError, match=r"5 of 8 processes .* hosts\.nproc_per_node how many"):
        settings(file, **unequal)


def test_processes_of_one_start_of_one_host_have_one_meeting() -> None:
    own = read_place(TORCHRUN).meeting
    assert read_place(TORCHRUN | {"RANK": "4", "LOCAL_RANK": "0"}).meeting == own
    for other in ({"TORCHELASTIC_RESTART_COUNT": "3"}, {"GROUP_RANK": "0"}, {"MASTER_PORT": "29500"}):
        assert read_place(TORCHRUN | other).meeting != own


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"RANK": ""}, "RANK is not set: start this with torchrun"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"RANK": "8"}, "RANK 8, LOCAL_RANK 1, WORLD_SIZE 8 and LOCAL_WORLD_SIZE 4 do not fit together"),
        ({"RANK": "3"}, "RANK is 3 where LOCAL_RANK is 1 on host number 1; expected 5"),
    ],
)
def test_what_does_not_fit_is_named(file: str, env: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        settings(file, **env)
