"""Options that people know from torchrun, for the commands that start a deployment: short names of settings.

Knows nothing of what the settings do.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any, get_type_hints

import typer

from tprt.errors import ConfigError

_SETTINGS = {
    "nproc_per_node": "parallel.tensor_parallel_size",
    "max_restarts": "supervision.max_restarts",
    "log_dir": "logging.dir",
    "local_ranks_filter": "logging.local_ranks_filter",
}


def _options(
    nproc_per_node: Annotated[
        int | None, typer.Option(help="Ranks of this host; see parallel.tensor_parallel_size.")
    ] = None,
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
) -> None:
    """Declare the options; never called."""


def with_torchrun_options(command: Callable[..., None]) -> Callable[..., None]:
    """Return `command`, which takes `set_`, with these options as well: they become overrides in `set_`."""

    @wraps(command)
    def wrapped(**arguments: Any) -> None:
        given = {name: arguments.pop(name) for name in _SETTINGS}
        command(**{**arguments, "set_": [*(arguments["set_"] or ()), *to_overrides(given)]})

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


def _split(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} {text}: expected numbers separated by commas, as in 0,1") from None
