"""The HTTP server in its process: serves, drains when asked to, ends.

On DRAIN_SIGNAL, or a SIGTERM that is not left to the parent, new requests get status 503, and those inside have
`server.drain_timeout_s` to finish; what has not finished then ends with what it has. Knows nothing of what is
served.
"""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from launch.job_signals import DRAIN_SIGNAL
from tprt.config import ServerConfig
from tprt.log import get_logger
from tprt.server.async_engine import AsyncEngine
from tprt.server.http.drain_gate import DrainGate

_LOG = get_logger(__name__)
# For clients to take the end of a request that was cut short.
_LAST_WORDS_S = 1
# Clients keep a connection for the next request; one that is closed just then fails it.
_KEEP_ALIVE_S = 75


class _Uvicorn(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone: the end is asked for here, and Ctrl-C reaches the parent only."""
        yield


async def serve(gate: DrainGate, engine: AsyncEngine, server: ServerConfig, listener: socket.socket) -> None:
    """Serve what is behind `gate` until asked to end and until all is drained; closes `engine`, `listener`."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(DRAIN_SIGNAL, stop.set)
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:
        loop.add_signal_handler(signal.SIGTERM, stop.set)
    http = _Uvicorn(_settings(gate, server))
    engine.start()
    serving = asyncio.ensure_future(http.serve([listener]))
    waiting = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({serving, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if not serving.done():
            await _drain(gate, engine, server.drain_timeout_s)
        http.should_exit = True
        await serving
    finally:
        waiting.cancel()
        engine.close()


async def _drain(gate: DrainGate, engine: AsyncEngine, timeout_s: float) -> None:
    gate.close()
    _LOG.debug("no new requests; up to %g s for the %d that run", timeout_s, gate.num_inside)
    if await gate.wait_until_empty(timeout_s):
        return
    _LOG.warning(
        "%d requests have not finished in %g s (server.drain_timeout_s) and are ended",
        *(gate.num_inside, timeout_s),
    )
    engine.abort_all()
    await gate.wait_until_empty(_LAST_WORDS_S)


def _settings(gate: DrainGate, server: ServerConfig) -> uvicorn.Config:
    return uvicorn.Config(
        gate,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_LAST_WORDS_S,
        ssl_certfile=server.ssl_certfile,
        ssl_keyfile=server.ssl_keyfile,
    )
