"""Serve a model with Ray Serve: each of its replicas is a deployment of tprt, on whatever host Ray has for it.

    pip install 'ray[serve]'
    python scripts/ray_serve.py CONFIG --num-replicas 2 --port 8000 [--set section.key=value]

Ray gives a replica as many GPUs as its ranks need, on one host of the cluster, and CUDA_VISIBLE_DEVICES says
which. There it runs `tprt serve` on a port that the system chose, and passes on what Serve's proxy sends:
OpenAI's API, streams too. A replica whose server has ended, or makes no progress, is replaced by Ray. Every
host needs the checkpoint at the same path, and tprt in the environment of Ray's workers.
"""

from __future__ import annotations

import argparse
import ctypes
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

# Run as a file, this finds only scripts/ on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.config_file import load_config
from tprt.config import Config

_PR_SET_PDEATHSIG = 1
_HEALTH_S = 10.0
_LISTENING = re.compile(r"listening on (http\S+);")
# Of a message that belongs to one connection, and not to the next (RFC 9110, 7.6.1).
_OF_ONE_HOP = {"connection", "content-length", "host", "keep-alive", "te", "transfer-encoding", "upgrade"}


class TprtServer:
    """One replica of the Serve deployment: `tprt serve`, and who passes requests on to it."""

    def __init__(self, config: str, settings: Sequence[str], startup_s: float) -> None:
        """Start the server and wait until it serves.

        Raises:
            RuntimeError: it ended before that, or took longer than `startup_s`; its words are in Ray's log.
        """
        overrides = [part for setting in settings for part in ("--set", setting)]
        self._command = [sys.executable, "-m", "launch", "serve", config, *overrides]
        self._command += ["--host", "127.0.0.1", "--port", "0"]
        self._process: subprocess.Popen[str] | None = None
        self._session: aiohttp.ClientSession | None = None
        self._url = ""
        self._is_ready = threading.Event()
        # The signal of a parent's death goes by the thread that started the child: this one lives as long.
        self._watcher = threading.Thread(target=self._run, name="tprt-serve", daemon=True)
        self._watcher.start()
        deadline_s = time.monotonic() + startup_s
        while not self._is_ready.wait(0.2):
            if not self._watcher.is_alive() or time.monotonic() > deadline_s:
                self._end()
                raise RuntimeError(f"tprt serve {config} does not serve; the lines above say why")

    async def __call__(self, request: Request) -> Response:
        """Pass a request on, and its answer back as it comes."""
        if self._session is None:
            # Here and not above: it belongs to this event loop. An answer takes as long as it takes.
            self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None))
        answer = await self._session.request(
            request.method,
            f"{self._url}{request.url.path}",
            params=request.query_params.multi_items(),
            data=await request.body(),
            headers=_end_to_end(request.headers.items()),
        )
        return StreamingResponse(_body(answer), answer.status, _end_to_end(answer.headers.items()))

    async def check_health(self) -> None:
        """Raise unless the engine makes progress; asked by Ray, which replaces a replica that fails this."""
        timeout, url = aiohttp.ClientTimeout(total=_HEALTH_S), f"{self._url}/health"
        async with aiohttp.ClientSession(timeout=timeout) as session, session.get(url) as answer:
            if answer.status != 200:
                raise RuntimeError(f"tprt is not well: {await answer.text()}")

    def __del__(self) -> None:
        self._end()

    def _run(self) -> None:
        """Start the server and take in its words until it has ended."""
        process = self._process = subprocess.Popen(
            self._command, stderr=subprocess.PIPE, text=True, preexec_fn=_end_with_parent
        )
        assert process.stderr is not None
        for line in process.stderr:
            print(line, end="", file=sys.stderr, flush=True)
            if found := _LISTENING.search(line):
                self._url = found[1]
            if "ready: serving" in line:
                self._is_ready.set()
        process.wait()

    def _end(self) -> None:
        """Let the server finish what it serves, and wait for that."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
        self._watcher.join()


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _end_to_end(headers: Any) -> dict[str, str]:
    return {name: value for name, value in headers if name.lower() not in _OF_ONE_HOP}


async def _body(answer: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """Yield the body as it comes; a reader that leaves closes the connection, which aborts the request."""
    try:
        async for data in answer.content.iter_any():
            yield data
    finally:
        answer.close()


def make_app(path: str, config: Config, settings: Sequence[str], num_replicas: int) -> Any:
    """Return the Serve application."""
    parallel = config.parallel
    num_ranks = parallel.tensor_parallel_size * parallel.data_parallel_size
    resources = {"num_cpus": num_ranks} if config.runtime.device == "cpu" else {"num_gpus": num_ranks}
    most = config.scheduler.max_num_seqs + config.server.max_queued_requests
    deployment = serve.deployment(TprtServer).options(
        num_replicas=num_replicas,
        ray_actor_options=resources,
        # Serve holds back what is more; tprt queues by itself.
        max_ongoing_requests=most,
        health_check_timeout_s=_HEALTH_S,
        graceful_shutdown_timeout_s=config.server.drain_timeout_s + config.supervision.shutdown_grace_s,
    )
    return deployment.bind(path, list(settings), config.supervision.startup_timeout_s)


def main() -> None:
    """Serve until Ctrl-C or SIGTERM."""
    parser = argparse.ArgumentParser(description="Serve a model with Ray Serve.")
    parser.add_argument("config", help="YAML file of the deployment that each replica runs")
    parser.add_argument("--num-replicas", type=int, default=1)
    parser.add_argument("--host", default="127.0.0.1", help="address of Serve's proxy")
    parser.add_argument("--port", type=int, default=8000, help="port of Serve's proxy")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="settings")
    args = parser.parse_args()
    path = str(Path(args.config).resolve())
    config = load_config(path, args.settings)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # The cluster of $RAY_ADDRESS, or one of this host alone.
    ray.init(include_dashboard=False)
    serve.start(http_options={"host": args.host, "port": args.port})
    try:
        serve.run(make_app(path, config, args.settings, args.num_replicas))
        print(f"ray_serve: {args.num_replicas} replicas serve on http://{args.host}:{args.port}", flush=True)
        signal.pause()
    except KeyboardInterrupt:
        pass
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()
