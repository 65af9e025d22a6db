"""The process of the HTTP server: `python -m launch.serving.entry`, started by tprt. It never imports torch.

The listening socket is the launcher's, so that it outlives this process; API keys come in the environment, from
which they are removed.
"""

from __future__ import annotations

from launch.job_signals import leave_sigterm_to_parent
from launch.parent_death import RUN_DIR, die_with_parent

if __name__ == "__main__":
    # Before the imports below, which take their time.
    die_with_parent()
    leave_sigterm_to_parent()

import asyncio
import logging
import os
import resource
import socket
import time
from functools import partial
from pathlib import Path

from launch.checkpoint_tokenizer import open_tokenizer
from launch.child import API_KEYS, LISTENER_FD, run_child
from launch.run_dir import newest_heartbeats, read_config, replica_dirs, request_address
from launch.serving.http_server import serve
from launch.serving.http_socket import url_of
from launch.serving.record import ServerRecord, write_server
from launch.serving.tracing import open_tracer
from launch.stack_dump import install_stack_dumps
from tprt.config import Config
from tprt.errors import TransportError
from tprt.log import configure_logging, get_logger
from tprt.server.async_engine import AsyncEngine
from tprt.server.http.app import make_app
from tprt.server.http.context import ServerContext
from tprt.server.http.drain_gate import DrainGate
from tprt.server.metrics import ServerMetrics
from tprt.server.no_lane import NoLane
from tprt.server.sampling_defaults import read_sampling_defaults
from tprt.transport.heartbeat import HeartbeatReader
from tprt.transport.zmq_socket import RequestClient

NAME = "server"
# For the spans that have not been sent: shorter than what the launcher grants beyond server.drain_timeout_s.
_LAST_SPANS_S = 2.0


def make_context(config: Config, run_dir: Path, api_keys: tuple[str, ...]) -> ServerContext:
    """Return what the handlers work with; the engine is not started."""

    folders = replica_dirs(run_dir, config.parallel.data_parallel_size)
    heartbeats = [partial(_open_heartbeats, folder) for folder in folders]
    folder = config.model.path
    model_name = config.server.served_model_name or Path(folder).resolve().name
    tokenizer = open_tokenizer(folder)
    metrics = ServerMetrics(model_name, heartbeats)
    lanes = [RequestClient.connect(request_address(one)) if one.exists() else NoLane() for one in folders]
    return ServerContext(
        config=config,
        engine=AsyncEngine(lanes, tokenizer, config, metrics, heartbeats),
        tokenizer=tokenizer,
        metrics=metrics,
        model_name=model_name,
        created_s=int(time.time()),
        api_keys=api_keys,
        heartbeats=heartbeats,
        tracer=open_tracer(config.server, model_name),
        sampling_defaults=read_sampling_defaults(config.model),
    )


def _open_heartbeats(run_dir: Path) -> HeartbeatReader | None:
    path = newest_heartbeats(run_dir)
    try:
        return None if path is None else HeartbeatReader.open(path)
    except TransportError:
        # The ranks of that epoch have ended meanwhile.
        return None


async def serve_http(config: Config, run_dir: Path, listener: socket.socket, api_keys: tuple[str, ...]) -> None:
    """Serve until asked to end."""
    context = make_context(config, run_dir, api_keys)
    gate = DrainGate(make_app(context))
    url = url_of(listener, config.server)
    announcing = asyncio.ensure_future(_announce(run_dir, url, context.engine))
    try:
        await serve(gate, context.engine, config.server, listener)
    finally:
        announcing.cancel()
        if context.tracer is not None:
            context.tracer.close(_LAST_SPANS_S)


async def _announce(run_dir: Path, url: str, engine: AsyncEngine) -> None:
    """Tell whoever looks from outside that there is a server, and when it serves."""
    write_server(run_dir, ServerRecord(url=url, pid=os.getpid(), is_ready=False))
    await engine.wait_until_ready()
    write_server(run_dir, ServerRecord(url=url, pid=os.getpid(), is_ready=True))


def main() -> None:
    """Run the server."""
    run_dir = Path(os.environ[RUN_DIR])
    install_stack_dumps(run_dir, NAME)
    listener = socket.socket(fileno=int(os.environ.pop(LISTENER_FD)))
    listener.set_inheritable(False)
    api_keys = tuple(os.environ.pop(API_KEYS).split())
    config = read_config(run_dir)
    configure_logging(config.logging.level, config.logging.format, NAME)
    _adopt_log("uvicorn")
    _adopt_log("opentelemetry")
    _allow_many_connections()
    run_child(
        NAME, run_dir, lambda: "serving", lambda: asyncio.run(serve_http(config, run_dir, listener, api_keys))
    )


def _adopt_log(library: str) -> None:
    """Let what a library has to complain about come out as our own records do."""
    log = logging.getLogger(library)
    log.handlers = get_logger("tprt").handlers
    log.setLevel(logging.WARNING)
    log.propagate = False


def _allow_many_connections() -> None:
    """Raise this process's soft limit of descriptors, one for each connection, to its hard limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    main()
