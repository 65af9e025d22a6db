"""The routes of the live page: the page itself, which holds nothing to hide, and what it shows.

The page is one file that loads nothing; its content security policy names its script and its style by their
hashes and lets it talk to this server only. Who may read the state is decided by whoever serves these routes.
"""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from fastapi import APIRouter
from starlette.responses import HTMLResponse, JSONResponse

from tprt.server.http.context import ServerContext
from tprt.server.page.state import read_state

_PAGE = Path(__file__).with_name("page.html")


def make_page_router(context: ServerContext) -> APIRouter:
    """Return `GET /`, the page, and `GET /state`, which it asks once a second."""
    router = APIRouter(include_in_schema=False)
    page = _PAGE.read_text(encoding="utf-8")
    headers = _security_headers(page)

    @router.get("/")
    async def show_page() -> HTMLResponse:
        return HTMLResponse(page, headers=headers)

    @router.get("/state")
    async def show_state(history: bool = False) -> JSONResponse:
        return JSONResponse(read_state(context, history), headers={"Cache-Control": "no-store"})

    return router


def _security_headers(page: str) -> dict[str, str]:
    policy = (
        "default-src 'none'",
        f"script-src {_hash_of(page, 'script')}",
        f"style-src {_hash_of(page, 'style')}",
        "connect-src 'self'",
        # the empty icon, so that no browser asks for one
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
    return {
        "Content-Security-Policy": "; ".join(policy),
        "Cross-Origin-Opener-Policy": "same-origin",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-cache",
    }


def _hash_of(page: str, tag: str) -> str:
    """Return the source expression for the one element of that kind, as in CSP level 2."""
    (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"
