"""What hosts tell each other once they belong together: JSON objects with one key, which says what it is.

start    node rank 0: run the ranks of an epoch; with the addresses that their environment needs
beat     both, all the time: a sign of life, from a host with the heartbeats of its ranks
failed   a host: its ranks cannot go on; with the cause
done     a host: its ranks have ended as they were told to
"""

from __future__ import annotations

import json
from typing import Any

from tprt.coordinator.cause import Cause, CauseKind
from tprt.errors import TransportError

START, BEAT, FAILED, DONE = "start", "beat", "failed", "done"


def pack(kind: str, content: object = None) -> bytes:
    """Return a message."""
    return json.dumps({kind: content}).encode()


def unpack(message: bytes) -> tuple[str, Any]:
    """Return kind and content of a message.

    Raises:
        TransportError: it is none.
    """
    try:
        ((kind, content),) = json.loads(message).items()
    except (ValueError, AttributeError, UnicodeDecodeError) as error:
        raise TransportError(f"{message[:40]!r} came; expected a JSON object with one key") from error
    return str(kind), content


def pack_cause(cause: Cause) -> bytes:
    """Return the message of a failure."""
    content = [int(cause.kind), cause.text, cause.is_input_error, cause.is_from_outside]
    return pack(FAILED, content)


def read_cause(content: Any, where: str) -> Cause:
    """Return the cause in the message of a failure, with `where` that was.

    Raises:
        TransportError: it is none.
    """
    try:
        kind, text, is_input_error, is_from_outside = content
        return Cause(CauseKind(kind), f"{text} ({where})", 0, bool(is_input_error), bool(is_from_outside))
    except (TypeError, ValueError) as error:
        raise TransportError(f"{str(content)[:80]} came as a cause; use one version of tprt") from error
