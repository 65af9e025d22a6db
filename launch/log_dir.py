"""Where the output of each process of a deployment goes, by its settings.

Knows nothing of how it gets there.
"""

from __future__ import annotations

from pathlib import Path

from launch.child_log import LogSink
from tprt.config import LoggingConfig
from tprt.errors import ConfigError


def make_log_dir(logging: LoggingConfig) -> None:
    """Make the folder of log files, if one is set.

    Raises:
        ConfigError: it cannot be made.
    """
    if logging.dir is None:
        return
    try:
        Path(logging.dir).mkdir(parents=True, exist_ok=True)
        # That it is there does not mean that files can be made in it.
        probe = Path(logging.dir, f".{id(logging)}.probe")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"logging.dir {logging.dir} cannot be used: {error.strerror}; expected a folder to write to"
        ) from error


def sink_of(name: str, logging: LoggingConfig, local_rank: int | None = None) -> LogSink:
    """Return where the output of process `name` goes; a rank is number `local_rank` on its host."""
    path = None if logging.dir is None else Path(logging.dir, f"{name.replace(' ', '-')}.log")
    shown = logging.local_ranks_filter
    return LogSink(path, local_rank is None or shown is None or local_rank in shown)
