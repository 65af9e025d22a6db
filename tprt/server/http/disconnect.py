"""Work that is given up when its client has left.

Knows nothing of what the work is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

from tprt.server.http.errors import CLIENT_GONE_STATUS, ApiError

T = TypeVar("T")


async def while_wanted(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    """Do `work` and return its result; cancel it as soon as its client disconnects.

    The request's body must have been read.

    Raises:
        ApiError: the client has gone (status 499, which nobody sees).
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(disconnected(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise client_gone()
        return task.result()
    finally:
        await cancel_all(task, watcher)


async def disconnected(receive: Receive) -> None:
    """Return when the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass


def client_gone() -> ApiError:
    """Return the error that ends the work for a client that has left."""
    return ApiError(CLIENT_GONE_STATUS, "the client has disconnected")


async def cancel_all(*tasks: asyncio.Future[Any]) -> None:
    """Cancel what still runs, and wait until it has cleaned up."""
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
