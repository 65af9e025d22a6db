"""What the HTTP server leaves in the run directory: its address and its process.

For whoever looks from outside. Knows nothing of how it is shown.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

_FILE = "server.json"


class ServerRecord(BaseModel):
    """Where the server listens, its process, and whether it serves."""

    model_config = ConfigDict(frozen=True)

    url: str
    pid: int
    is_ready: bool


def write_server(run_dir: Path, record: ServerRecord) -> None:
    """Leave `record`, in one atomic step."""
    draft = run_dir / f"{_FILE}.draft"
    draft.write_text(record.model_dump_json(), encoding="utf-8")
    draft.rename(run_dir / _FILE)


def read_server(run_dir: Path) -> ServerRecord | None:
    """Return what the server of the newest start has left, or None where there is no server."""
    try:
        return ServerRecord.model_validate_json((run_dir / _FILE).read_text(encoding="utf-8"))
    except (OSError, ValidationError):
        return None
