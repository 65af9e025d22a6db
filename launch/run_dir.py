"""The private folder of one deployment: its sockets, its resolved configuration, its failure records.

Only small things: sockets take no space, so even a 1 MiB /dev/shm will do where nothing else is writable.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from tprt.config import Config
from tprt.errors import ConfigError

# A unix socket's path holds 107 characters; the longest name below is under 40.
_MAX_FOLDER = 64
_CONFIG = "config.json"


def make_run_dir() -> Path:
    """Create a folder that only this user can enter.

    Raises:
        ConfigError: no writable place was found.
    """
    tried = []
    for parent in (tempfile.gettempdir(), os.environ.get("XDG_RUNTIME_DIR"), "/tmp", "/run", "/dev/shm"):
        if not parent or len(parent) > _MAX_FOLDER:
            continue
        try:
            return Path(tempfile.mkdtemp(prefix="tprt-", dir=parent))
        except OSError as error:
            tried.append(f"{parent}: {error.strerror}")
    raise ConfigError(
        f"no place for the sockets of this deployment ({'; '.join(tried)}); set TMPDIR to a writable folder"
    )


def write_config(run_dir: Path, config: Config) -> None:
    """Leave the resolved configuration for the processes of the deployment."""
    (run_dir / _CONFIG).write_text(config.model_dump_json(), encoding="utf-8")


def read_config(run_dir: Path) -> Config:
    """Read what `write_config` left."""
    return Config.model_validate_json((run_dir / _CONFIG).read_text(encoding="utf-8"))


def worker_socket(run_dir: Path, epoch: int) -> str:
    """Return the path where workers of `epoch` find the coordinator."""
    return str(run_dir / f"workers-{epoch}.sock")


def request_address(run_dir: Path) -> str:
    """Return the ZeroMQ address where clients find the coordinator."""
    return f"ipc://{run_dir / 'requests.sock'}"
