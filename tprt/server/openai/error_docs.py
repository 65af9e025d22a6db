"""What the server's description of itself says of errors.

Knows nothing of when they occur.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


class ErrorObject(BaseModel):
    """What was wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """The body of an answer that is an error."""

    error: ErrorObject


_MEANINGS = {
    400: "the request asks for what cannot be had",
    401: "no key, or a wrong one",
    404: "there is no such model",
    413: "the body is too large",
    415: "the body is not JSON",
    422: "never sent; such requests get 400",
    429: "the queue is full; Retry-After says when to come again",
    503: "the engine is not ready or has failed",
}
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": meaning} for status, meaning in _MEANINGS.items()
}
