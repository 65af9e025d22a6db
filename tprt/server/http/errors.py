"""Errors as OpenAI's clients expect them: a status, and an object with message, type, param and code.

What the runtime raises is translated here, in words that hold neither a path nor a traceback nor a key.
Knows nothing of what a request asks for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from tprt.errors import EngineBusyError, EngineDeadError, InvalidRequestError
from tprt.server.invalid_field import InvalidFieldError

CLIENT_GONE_STATUS = 499
INTERNAL_STATUS = 500
_RETRY_NOT_READY_S = 2
_MAX_ECHO = 200
_FILE_PATH = re.compile(r"(?<![\w/:.<])/(?:[^\s/:'\"]+/)+[^\s:'\",;)]*")
# what pydantic calls the members of a union, within a location
_UNION_MEMBER = re.compile(r"str|int|float|bool|(list|dict|literal|function|constrained|nullable)\b.+|[A-Z]\w+")
_TYPES = {429: "rate_limit_error"}


class ApiError(HTTPException):
    """An answer that is an error; its message is for the client."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.param = param
        self.code = code

    def body(self) -> dict[str, object]:
        """Return the JSON object, without the status."""
        return error_body(self.status_code, self.detail, self.param, self.code)

    def response(self) -> JSONResponse:
        """Return the whole answer."""
        return JSONResponse(self.body(), self.status_code, self.headers)


def error_body(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, object]:
    """Return OpenAI's error object."""
    default = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": message, "type": _TYPES.get(status, default), "param": param, "code": code}
    return {"error": error}


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Return the error of a request that asks for what cannot be had."""
    return ApiError(400, message, param=param, code=code)


def as_api_error(error: BaseException) -> ApiError:
    """Translate what was raised; only what the client can act on is told to it."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InvalidRequestError):
        field = error.field if isinstance(error, InvalidFieldError) else None
        return invalid(without_paths(str(error)), field)
    if isinstance(error, EngineBusyError):
        retry = {"Retry-After": str(error.retry_after_s)}
        return ApiError(429, without_paths(str(error)), code="rate_limit_exceeded", headers=retry)
    if isinstance(error, EngineDeadError):
        return ApiError(503, "the engine has failed; the server's log says why", code="engine_dead")
    return ApiError(
        INTERNAL_STATUS, "the server failed at this request; its log says why", code="internal_error"
    )


def not_ready(reason: str) -> ApiError:
    """Return the error of a request that came before the engine was ready."""
    retry = {"Retry-After": str(_RETRY_NOT_READY_S)}
    return ApiError(503, f"the engine is not ready: {reason}", code="not_ready", headers=retry)


def without_paths(text: str) -> str:
    """Return the first line of `text`, cut to a moderate length, with names of files and folders left out."""
    line = text.partition("\n")[0]
    line = _FILE_PATH.sub("(path)", line)
    return line if len(line) <= 1000 else line[:1000] + " ..."


def validation_error(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """Return the error for the first place where pydantic has found something."""
    first = errors[0]
    place = _place(first["loc"])
    here = [without_paths(str(error["msg"])) for error in errors if _place(error["loc"]) == place]
    # a value that fits no member of a union has one finding for each of them
    message = "; or: ".join(dict.fromkeys(here))
    if not place:
        return invalid("the body must be a JSON object")
    if first["type"] == "missing":
        return invalid(f"Missing required parameter: '{place}'.", place, "missing_required_parameter")
    return invalid(f"Invalid value for '{place}': {message}", place, "invalid_value")


def _place(location: Sequence[str | int]) -> str:
    """Return the name of a parameter as OpenAI writes it, as in `messages[0].content`."""
    text = ""
    for part in location[1:]:
        if isinstance(part, str) and _UNION_MEMBER.fullmatch(part):
            break
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text[:_MAX_ECHO]


def routing_error(request: Request, error: HTTPException) -> ApiError:
    """Return the error for a path or a method that there is not, or whatever else the framework refuses."""
    path = request.url.path[:_MAX_ECHO]
    if error.status_code == 404:
        return ApiError(404, f"Invalid URL ({request.method} {path})", code="unknown_url")
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        message = f"Not allowed to {request.method} on {path}; allowed: {allowed}"
        return ApiError(405, message, code="method_not_supported", headers=error.headers)
    return ApiError(error.status_code, str(error.detail), headers=error.headers)
