"""What srun has told a task in its environment, in the variables that torchrun sets.

Knows nothing of what is made of them.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping

from tprt.errors import ConfigError

# Below the ports that systems give out by themselves, and those of well-known services.
_FIRST_PORT, _NUM_PORTS = 20_000, 10_000


def is_task(env: Mapping[str, str]) -> bool:
    """Tell whether srun has started this process; what a batch script runs by itself is no task."""
    return "SLURM_STEP_TASKS_PER_NODE" in env


def variables_of_task(env: Mapping[str, str]) -> dict[str, str]:
    """Return torchrun's variables for this task; what `env` has of MASTER_ADDR and MASTER_PORT stays.

    Without them the hosts meet on the first node of the step, at a port that all its tasks make of its number.

    Raises:
        ConfigError: one of srun's variables is missing or has another form than srun gives it.
    """
    node_id, sizes = _value(env, "SLURM_NODEID", r"\d+"), _tasks_of_nodes(env)
    if int(node_id) >= len(sizes):
        raise ConfigError(f"SLURM_NODEID is {node_id} and SLURM_STEP_TASKS_PER_NODE has {len(sizes)} nodes")
    step = f"{_value(env, 'SLURM_JOB_ID')}.{_value(env, 'SLURM_STEP_ID')}"
    return {
        "RANK": _value(env, "SLURM_PROCID"),
        "LOCAL_RANK": _value(env, "SLURM_LOCALID"),
        "WORLD_SIZE": str(sum(sizes)),
        "LOCAL_WORLD_SIZE": str(sizes[int(node_id)]),
        "GROUP_RANK": node_id,
        "GROUP_WORLD_SIZE": str(len(sizes)),
        "MASTER_ADDR": env.get("MASTER_ADDR") or _first_node(_value(env, "SLURM_STEP_NODELIST")),
        "MASTER_PORT": env.get("MASTER_PORT") or str(_FIRST_PORT + zlib.crc32(step.encode()) % _NUM_PORTS),
    }


def _tasks_of_nodes(env: Mapping[str, str]) -> list[int]:
    """Return the number of tasks of each node: "4(x2),1" is [4, 4, 1]."""
    text = _value(env, "SLURM_STEP_TASKS_PER_NODE", r"\d+(\(x\d+\))?(,\d+(\(x\d+\))?)*")
    runs = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, nodes in runs for _ in range(int(nodes or 1))]


def _first_node(nodes: str) -> str:
    """Return the first name of a list of nodes: "gpu[03-05,9]-ib,login" begins with gpu03-ib."""
    name = re.match(r"(?:[^\[,]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", name[0] if name else nodes)


def _value(env: Mapping[str, str], name: str, form: str = r".+") -> str:
    text = env.get(name, "")
    if not re.fullmatch(form, text):
        raise ConfigError(f"{name} is {text!r}; start the ranks as tasks of srun")
    return text
