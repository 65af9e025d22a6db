"""Who may use the server: whoever shows one of its keys, or everyone where there is none.

The key comes as a bearer token, as OpenAI's clients send it. Knows nothing of what is asked for.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from tprt.server.http.errors import ApiError

# Whether the server lives, and the page, which holds nothing to hide and asks its reader for a key.
OPEN_PATHS = frozenset({"/", "/health", "/ready"})
_BEARER = {"WWW-Authenticate": "Bearer"}


class RequireKey:
    """Answers 401 to whoever shows no key, except on `OPEN_PATHS`."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._keys = tuple(key.encode() for key in keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            refusal = self._refusal(Headers(scope=scope))
            if refusal is not None:
                await refusal.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refusal(self, headers: Headers) -> ApiError | None:
        shown = _shown_key(headers.get("authorization", ""))
        if not shown:
            message = "You didn't provide an API key; send it as the header Authorization: Bearer YOUR_KEY"
            return ApiError(401, message, headers=_BEARER)
        if not is_one_of(shown, self._keys):
            return ApiError(401, "Incorrect API key provided.", code="invalid_api_key", headers=_BEARER)
        return None


def is_one_of(shown: bytes, keys: Sequence[bytes]) -> bool:
    """Compare with every key, each in a time that does not depend on how much of it is right."""
    found = False
    for key in keys:
        found |= hmac.compare_digest(shown, key)
    return found


def _shown_key(authorization: str) -> bytes:
    scheme, _, value = authorization.partition(" ")
    return value.strip().encode("latin-1") if scheme.lower() == "bearer" else b""
