"""What torchrun or srun has told this process in its environment, and what that makes of the settings.

For other launchers RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set by hand;
the rest follows. Knows nothing of how ranks are started.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launch.config_file import peek_setting
from launch.torchrun.slurm import is_task, variables_of_task
from tprt.errors import ConfigError

_EXPECTED = (
    "start this with torchrun or srun, or with what sets the variables of torchrun; or take `tprt serve`"
)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a process stands among those that torchrun, or another launcher, has started.

    Attributes:
        rank, local_rank: its number, among all and on its host.
        world_size, local_world_size: how many there are, in all and on its host.
        node_rank, nnodes: the number of its host, and how many hosts there are.
        master_addr, master_port: an address of the first host, and a port that belongs to this job there.
        run_id: name of the job.
        restart_count: how often this host's processes have been started again.
        has_agent: torchrun's agent is there, and has that port.
    """

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    node_rank: int
    nnodes: int
    master_addr: str
    master_port: int
    run_id: str
    restart_count: int
    has_agent: bool

    @property
    def meeting(self) -> str:
        """A name that the processes of this host and this start have in common, and others have not."""
        parts = (self.master_addr, self.master_port, self.run_id, self.restart_count, self.node_rank)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:8]

    @property
    def endpoint(self) -> str:
        """Where the hosts of the deployment meet if the settings name no place."""
        return f"{self.master_addr}:{self.master_port + int(self.has_agent)}"


def read_place(env: Mapping[str, str]) -> Place:
    """Read the variables: torchrun's, or where there are none those of Slurm.

    Raises:
        ConfigError: one is missing or is no number, or they do not fit together; says which.
    """
    if "RANK" not in env and is_task(env):
        env = {**env, **variables_of_task(env)}
    world_size, local_world_size = _number(env, "WORLD_SIZE"), _number(env, "LOCAL_WORLD_SIZE")
    rank, local_rank = _number(env, "RANK"), _number(env, "LOCAL_RANK")
    if not 0 < local_world_size <= world_size or not local_rank <= rank < world_size:
        raise ConfigError(
            f"RANK {rank}, LOCAL_RANK {local_rank}, WORLD_SIZE {world_size} and LOCAL_WORLD_SIZE"
            f" {local_world_size} do not fit together; set them as torchrun does"
        )
    return Place(
        rank=rank,
        local_rank=local_rank,
        world_size=world_size,
        local_world_size=local_world_size,
        node_rank=_number(env, "GROUP_RANK", rank // local_world_size),
        nnodes=_number(env, "GROUP_WORLD_SIZE", -(-world_size // local_world_size)),
        master_addr=_text(env, "MASTER_ADDR"),
        master_port=_number(env, "MASTER_PORT"),
        run_id=env.get("TORCHELASTIC_RUN_ID") or env.get("SLURM_JOB_ID", "none"),
        restart_count=_number(env, "TORCHELASTIC_RESTART_COUNT", 0),
        has_agent="TORCHELASTIC_RUN_ID" in env,
    )


def overrides_of(place: Place, path: str, given: Sequence[str]) -> list[str]:
    """Return what the launcher decides of the settings in the file `path` with the overrides `given`.

    Raises:
        ConfigError: the numbers of processes are not those that the settings expect.
    """
    counts = _ranks_of_hosts(place, peek_setting(path, given, "hosts.nproc_per_node", None))
    settings: dict[str, object] = {
        "parallel.tensor_parallel_size": place.world_size,
        # Whoever has started the ranks starts them again.
        "supervision.max_restarts": 0,
        "hosts.nnodes": place.nnodes,
        "hosts.node_rank": place.node_rank,
        "hosts.nproc_per_node": counts,
    }
    if place.nnodes > 1:
        settings["hosts.rdzv_id"] = place.run_id
        settings["hosts.rdzv_endpoint"] = peek_setting(path, given, "hosts.rdzv_endpoint", place.endpoint)
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def _ranks_of_hosts(place: Place, given: object) -> list[int]:
    """Return the number of ranks of each host, and check that this process has the rank that they give it."""
    here, hosts = place.local_world_size, place.nnodes
    counts = given if isinstance(given, list) and sum(given) == place.world_size else [here] * hosts
    if sum(counts) != place.world_size or counts[place.node_rank : place.node_rank + 1] != [here]:
        raise ConfigError(
            f"{here} of {place.world_size} processes were started on this host, number {place.node_rank} of"
            f" {hosts}; start equally many on each, or say in hosts.nproc_per_node how many each has"
        )
    expected = sum(counts[: place.node_rank]) + place.local_rank
    if place.rank != expected:
        raise ConfigError(
            f"RANK is {place.rank} where LOCAL_RANK is {place.local_rank} on host number {place.node_rank};"
            f" expected {expected}: ranks of a host follow each other (srun --distribution=block)"
        )
    return counts


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name, "" if default is None else str(default))
    if not text.isdecimal():
        found = f"is {text!r}" if text else "is not set"
        raise ConfigError(f"{name} {found}: {_EXPECTED}")
    return int(text)


def _text(env: Mapping[str, str], name: str) -> str:
    if not env.get(name):
        raise ConfigError(f"{name} is not set: {_EXPECTED}")
    return env[name]
