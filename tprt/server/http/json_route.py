"""Routes whose bodies are parsed as JSON to the letter.

Python's own parser lets NaN, infinities and halves of surrogate pairs through, which fail later, where nobody
expects them. Knows nothing of what a body should hold.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.requests import Request
from starlette.responses import Response

from tprt.server.http.errors import ApiError, invalid

_Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class JsonRoute(APIRoute):
    """A route that reads its body with a strict parser."""

    def get_route_handler(self) -> _Handler:
        """Return the framework's handler, given a request that parses strictly."""
        handle: _Handler = super().get_route_handler()

        async def strictly(request: Request) -> Response:
            if request.method == "POST":
                _check_type(request.headers.get("content-type", ""))
            return await handle(_StrictRequest(request.scope, request.receive))

        return strictly


def _check_type(content_type: str) -> None:
    kind = content_type.partition(";")[0].strip().lower()
    if not (kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))):
        raise ApiError(415, "the body must be JSON; send it with the header Content-Type: application/json")


class _StrictRequest(Request):
    async def json(self) -> Any:
        body = await self.body()
        try:
            return from_json(body, allow_inf_nan=False)
        except ValueError as error:
            raise invalid(f"the body is not valid JSON: {error}", code="invalid_json") from error
