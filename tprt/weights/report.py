"""What one rank's loading cost: bytes asked for, bytes kept, and time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LoadReport:
    """Bytes and seconds of one rank's loading.

    Attributes:
        file_bytes: size of all tensors of the checkpoint.
        own_kept_bytes: bytes in the checkpoint of what only this rank keeps: its column shards.
        own_read_bytes: bytes that this rank asked the file system for to get them.
        shared_kept_bytes: bytes in the checkpoint of what this rank keeps of tensors that every rank needs a
            part of: row shards, norms, replicated heads.
        shared_read_bytes: bytes that this rank read of those tensors, for all ranks of its host.
        cached_bytes: of all that it read, what came from the page cache.
        seconds: from the first header to the last element in place.
    """

    file_bytes: int
    own_kept_bytes: int
    own_read_bytes: int
    shared_kept_bytes: int
    shared_read_bytes: int
    cached_bytes: int
    seconds: float

    @property
    def read_bytes(self) -> int:
        """All that this rank asked the file system for."""
        return self.own_read_bytes + self.shared_read_bytes

    @property
    def kept_bytes(self) -> int:
        """All that this rank keeps, as large as it is in the checkpoint."""
        return self.own_kept_bytes + self.shared_kept_bytes
