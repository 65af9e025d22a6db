"""A digest of what a checkpoint is, without its weights: config.json and the headers of its tensor files.

Knows nothing of what is in them.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from tprt.errors import CheckpointError

_MAX_HEADER_BYTES = 100_000_000


def digest_checkpoint(folder: str) -> str:
    """Return a hexadecimal digest; equal checkpoints have equal ones wherever they are.

    Raises:
        CheckpointError: a file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        digest.update(Path(folder, "config.json").read_bytes())
        for path in sorted(Path(folder).glob("*.safetensors")):
            digest.update(path.name.encode() + b"\0" + _read_header(path))
    except OSError as error:
        raise CheckpointError(f"{error.filename or folder} cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def _read_header(path: Path) -> bytes:
    """Return the length of a header and the header, as far as there is one: loading says what is wrong."""
    with path.open("rb") as file:
        length = file.read(8)
        return length + file.read(min(int.from_bytes(length, "little"), _MAX_HEADER_BYTES))
