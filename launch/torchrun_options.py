"""Options that people know from torchrun, for the commands that start a deployment: short names of settings.

Knows nothing of what the settings do.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any, get_type_hints

import typer

from launch.config_file import load_config, peek_setting
from launch.multihost.agent import run_agent
from tprt.errors import ConfigError

_SETTINGS = {
    "nnodes": "hosts.nnodes",
    "node_rank": "hosts.node_rank",
    "rdzv_endpoint": "hosts.rdzv_endpoint",
    "rdzv_id": "hosts.rdzv_id",
    "max_restarts": "supervision.max_restarts",
    "log_dir": "logging.dir",
    "local_ranks_filter": "logging.local_ranks_filter",
}


def _options(
    nnodes: Annotated[int | None, typer.Option(help="Hosts; see hosts.nnodes.")] = None,
    node_rank: Annotated[int | None, typer.Option(help="Which host this is; see hosts.node_rank.")] = None,
    nproc_per_node: Annotated[
        str | None,
        typer.Option(metavar="N|N,N", help="Ranks of each host, which make parallel.tensor_parallel_size."),
    ] = None,
    rdzv_endpoint: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Where hosts meet; see hosts.rdzv_endpoint.")
    ] = None,
    rdzv_id: Annotated[str | None, typer.Option(help="Name of the deployment; see hosts.rdzv_id.")] = None,
    max_restarts: Annotated[
        int | None, typer.Option(help="How often failed ranks are replaced; see supervision.max_restarts.")
    ] = None,
    log_dir: Annotated[
        str | None, typer.Option(help="Folder for a log file of each process; see logging.dir.")
    ] = None,
    local_ranks_filter: Annotated[
        str | None,
        typer.Option(metavar="0,1", help="Ranks whose log is shown; logging.local_ranks_filter."),
    ] = None,
    redirects: Annotated[
        str | None,
        typer.Option("--redirects", "-r", metavar="3|0:3,1:3", help="Ranks whose log is only in --log-dir."),
    ] = None,
    tee: Annotated[
        str | None,
        typer.Option("--tee", "-t", metavar="3|0:3,1:3", help="Ranks whose log is shown all the same."),
    ] = None,
) -> None:
    """Declare the options; never called."""


def with_torchrun_options(command: Callable[..., None], on_every_host: bool = False) -> Callable[..., None]:
    """Return `command`, which takes `config` and `set_`, with these options as well: they become overrides.

    On a host other than that of node rank 0 the command takes part in the deployment that it starts there,
    unless it does its own work `on_every_host`.
    """

    @wraps(command)
    def wrapped(**arguments: Any) -> None:
        given = {name: arguments.pop(name) for name in inspect.signature(_options).parameters}
        set_ = [*(arguments["set_"] or ()), *to_overrides(given)]
        if given["nproc_per_node"] is not None:
            set_ += _spread(given["nproc_per_node"], peek_setting(arguments["config"], set_, "hosts.nnodes", 1))
        set_ += _show_some(given["redirects"], given["tee"], arguments["config"], set_)
        if not on_every_host and (config := load_config(arguments["config"], set_)).hosts.node_rank > 0:
            run_agent(config)
        else:
            command(**{**arguments, "set_": set_})

    own, added = inspect.signature(command), inspect.signature(_options)
    hints = get_type_hints(command, include_extras=True) | get_type_hints(_options, include_extras=True)
    parameters = [*own.parameters.values(), *added.parameters.values()]
    typed = [parameter.replace(annotation=hints[parameter.name]) for parameter in parameters]
    wrapped.__signature__ = own.replace(parameters=typed, return_annotation=None)  # type: ignore[attr-defined]
    wrapped.__annotations__ = hints
    return wrapped


def to_overrides(given: dict[str, Any]) -> list[str]:
    """Return `section.key=value` for each option that was given.

    Raises:
        ConfigError: a list has what is no number.
    """
    values = dict(given)
    if values["local_ranks_filter"] is not None:
        values["local_ranks_filter"] = _split("--local-ranks-filter", values["local_ranks_filter"])
    return [f"{key}={json.dumps(values[name])}" for name, key in _SETTINGS.items() if values[name] is not None]


def _spread(text: str, nnodes: object) -> list[str]:
    """Return the overrides for `--nproc-per-node`: one number for all hosts, or one for each."""
    counts = _split("--nproc-per-node", text)
    if len(counts) == 1 and isinstance(nnodes, int):
        counts *= nnodes
    return [f"hosts.nproc_per_node={json.dumps(counts)}", f"parallel.tensor_parallel_size={sum(counts)}"]


def _show_some(redirects: str | None, tee: str | None, config: str, set_: list[str]) -> list[str]:
    """Return the override for `--redirects` and `--tee`: which ranks are shown as well as written to files.

    The two streams of a rank are one here, so that 1, 2 and 3 mean the same.
    """
    if redirects is None and tee is None:
        return []
    if peek_setting(config, set_, "logging.dir", None) is None:
        raise ConfigError("--redirects and --tee choose what is shown of the files in --log-dir; give that too")
    size, num_replicas = (
        peek_setting(config, set_, f"parallel.{key}", 1)
        for key in ("tensor_parallel_size", "data_parallel_size")
    )
    ranks = range(size * num_replicas) if isinstance(size, int) and isinstance(num_replicas, int) else range(0)
    is_written, is_shown = _streams("--redirects", redirects), _streams("--tee", tee)
    given = peek_setting(config, set_, "logging.local_ranks_filter", None)
    allowed = given if isinstance(given, list) else ranks
    shown = [rank for rank in ranks if rank in allowed and (is_shown(rank) or not is_written(rank))]
    return [f"logging.local_ranks_filter={json.dumps(shown)}"]


def _streams(option: str, text: str | None) -> Callable[[int], bool]:
    """Return what tells of a rank on its host whether torchrun's `3`, or `0:3,1:3`, means any stream of it.

    Raises:
        ConfigError: it is neither.
    """
    whole = re.fullmatch("[0-3]", text or "0")
    if whole:
        return lambda rank: whole[0] != "0"
    pairs = [re.fullmatch(r"(\d+):([0-3])", part) for part in (text or "").split(",")]
    if not all(pairs):
        raise ConfigError(
            f"{option} {text}: expected a number from 0 to 3, or one for each rank, as in 0:3,1:3"
        )
    chosen = {int(pair[1]) for pair in pairs if pair and pair[2] != "0"}
    return chosen.__contains__


def _split(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} {text}: expected numbers separated by commas, as in 0,1") from None
