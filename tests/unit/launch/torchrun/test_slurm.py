"""What srun says in the environment of a task is what torchrun would say, and what is no task is left alone."""

from __future__ import annotations

import pytest

from launch.torchrun.place import read_place
from tprt.errors import ConfigError

TASK = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),2",
    "SLURM_STEP_NODELIST": "gpu[03-05]",
}


def test_the_place_of_a_task_is_that_which_srun_has_given_it() -> None:
    place = read_place(TASK)
    assert (place.rank, place.local_rank, place.world_size, place.local_world_size) == (9, 1, 10, 2)
    assert (place.node_rank, place.nnodes, place.run_id, place.restart_count) == (2, 3, "77", 0)


def test_all_tasks_of_a_step_meet_at_one_port_of_its_first_node_and_another_step_at_another() -> None:
    place, first = (
        read_place(TASK),
        read_place(TASK | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}),
    )
    assert place.endpoint == first.endpoint == f"gpu03:{place.master_port}"
    assert 20_000 <= place.master_port < 30_000
    assert read_place(TASK | {"SLURM_STEP_ID": "1"}).master_port != place.master_port


def test_where_the_hosts_meet_can_be_said() -> None:
    assert read_place(TASK | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "7"}).endpoint == "10.0.0.1:7"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("login", "login"),
        ("a,b", "a"),
        ("gpu[3,7-9]", "gpu3"),
        ("gpu[007-009]-ib,login", "gpu007-ib"),
        ("rack[1-2]n[01-16],a", "rack1n01"),
    ],
)
def test_the_first_of_a_list_of_nodes_is_found(nodes: str, first: str) -> None:
    assert read_place(TASK | {"SLURM_STEP_NODELIST": nodes}).master_addr == first


def test_what_torchrun_says_under_slurm_wins() -> None:
    torchrun = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    place = read_place(TASK | torchrun | {"MASTER_ADDR": "a", "MASTER_PORT": "7", "TORCHELASTIC_RUN_ID": "run"})
    assert (place.rank, place.world_size, place.run_id, place.endpoint) == (1, 2, "run", "a:8")


@pytest.mark.parametrize(
    ("env", "words"),
    [
        (
            {"SLURM_STEP_TASKS_PER_NODE": "four"},
            "SLURM_STEP_TASKS_PER_NODE is 'four'; start the ranks as tasks of srun",
        ),
        ({"SLURM_NODEID": ""}, "SLURM_NODEID is ''"),
        ({"SLURM_NODEID": "3"}, "SLURM_NODEID is 3 and SLURM_STEP_TASKS_PER_NODE has 3 nodes"),
    ],
)
def test_what_srun_does_not_say_is_named(env: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_place(TASK | env)


def test_a_batch_script_is_no_task() -> None:
    batch = {name: value for name, value in TASK.items() if not name.startswith("SLURM_STEP")}
    with pytest.raises(ConfigError, match="WORLD_SIZE is not set: start this with torchrun or srun"):
        read_place(batch)
