"""What every answer says of itself: id, kind, time, model and system.

Knows nothing of what an answer holds.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version

from tprt.config import Config
from tprt.server.http.context import ServerContext
from tprt.server.http.request_log import RequestRecord


@dataclass(frozen=True, slots=True)
class AnswerHead:
    """The fields that all chunks of an answer share."""

    id: str
    kind: str
    created: int
    model: str
    system_fingerprint: str

    def fields(self) -> dict[str, object]:
        """Return them in OpenAI's order."""
        return {
            "id": self.id,
            "object": self.kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
        }


def make_head(context: ServerContext, record: RequestRecord, prefix: str, kind: str) -> AnswerHead:
    """Return the head of the answer to a request; its id holds the request's."""
    return AnswerHead(
        f"{prefix}-{record.request_id}",
        kind,
        int(time.time()),
        context.model_name,
        system_fingerprint(context.config),
    )


@lru_cache(maxsize=8)
def system_fingerprint(config: Config) -> str:
    """Return a name for what the numbers of an output depend on: version, model, type and number of ranks."""
    model, parallel, runtime = config.model, config.parallel, config.runtime
    parts = (version("tprt"), model.path, model.dtype, parallel.tensor_parallel_size, runtime.device)
    return "fp_" + hashlib.sha256(repr(parts).encode()).hexdigest()[:12]
