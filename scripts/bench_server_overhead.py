"""CPU time of the HTTP server for each token that it streams, with an engine that costs nothing.

    python scripts/bench_server_overhead.py
    python scripts/bench_server_overhead.py --endpoint chat --streams 64,256 --steps-per-s 50 --json

How it is measured. The server is the real one: the process that `tprt serve` starts (`launch.serving.entry`),
with its tokenizer, its routes and uvicorn. In the place of coordinator and ranks is stand_in_coordinator.py,
which answers on the same ZeroMQ lane and gives every request a made-up token of the model's vocabulary at each
step, at a fixed rate. The client of `tprt bench serve`, in this process, opens `--streams` streams at once, of
`--output-len` tokens each. The server's user and system time are read from /proc/PID/stat (in ticks of 10 ms,
so a round must be long) when all streams have their first token, and when the first of them ends. Between
these nothing begins or ends, and the difference, over the tokens that came in that time, is what a token
costs: its detokenisation, its event, its send, and its share of the lane, of the metrics and of the loop. `us
per request` is what a request with one token costs, in a load of nothing else.

The figures are CPU time, so they do not count waiting; but whoever shares the cores takes their caches away,
and a server that is late sends several tokens in one event: `events per token` shows that (1: none), and a
figure with less is of another, cheaper case. Lower --steps-per-s then.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

# Run as a file, this finds only scripts/ on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from launch.bench.rows import print_rows, split_numbers
from launch.bench.serve_http import HttpClient, HttpError
from launch.bench.serve_load import Lengths, RequestForm
from launch.bench.serve_run import Load, run_load
from launch.bench.serve_stream import PATHS, Endpoint, RequestResult, StreamTimes
from launch.child import API_KEYS, LISTENER_FD
from launch.child_log import LogTee
from launch.child_process import ChildProcess, ChildSpec
from launch.config_file import load_config
from launch.parent_death import RUN_DIR
from launch.run_dir import RunDir, request_address, write_config
from launch.serving.http_socket import listen, url_of
from tprt.checkpoint_config import read_checkpoint_config
from tprt.config import Config

_ROOT = Path(__file__).resolve().parents[1]
DEMO = str(_ROOT / "configs" / "smollm2-135m-tp2-cpu.yaml")
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
_READY_S = 60.0
_NUM_SHORT = 300
Row = dict[str, object]


def cpu_s(pid: int) -> tuple[float, float]:
    """Return the user and the system time that a process has taken so far."""
    # The name in parentheses may hold spaces; utime and stime are the 12th and 13th fields after it.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) * _TICK_S, int(fields[12]) * _TICK_S


@dataclass(frozen=True, slots=True)
class Server:
    """The process that is measured."""

    base_url: str
    pid: int
    config: Config


@contextmanager
def served(config: Config, steps_per_s: float) -> Iterator[Server]:
    """Start the HTTP server before a stand-in for the coordinator, and end both."""
    vocab_size = read_checkpoint_config(config.model.path).vocab_size
    run_dir = RunDir.create()
    write_config(run_dir.path, config)
    stand_in = [str(_ROOT / "scripts" / "stand_in_coordinator.py"), request_address(run_dir.path)]
    engine = subprocess.Popen([sys.executable, *stand_in, str(vocab_size), str(steps_per_s)])
    try:
        with listen(config.server, False) as listener:
            env = {RUN_DIR: str(run_dir.path), LISTENER_FD: str(listener.fileno()), API_KEYS: ""}
            spec = ChildSpec("server", "launch.serving.entry", env, (listener.fileno(),))
            server = ChildProcess.start(spec, LogTee())
            try:
                yield Server(url_of(listener, config.server), server.pid, config)
            finally:
                server.kill()
                server.release()
    finally:
        engine.kill()
        engine.wait()
        run_dir.remove()


@dataclass(slots=True)
class Window:
    """The time in which all streams run: from the first token of the last of them to the first end."""

    pid: int
    num_streams: int
    results: list[RequestResult] = field(default_factory=list)
    begin: tuple[float, float, float, int] | None = None
    end: tuple[float, float, float, int] | None = None

    def look(self) -> None:
        """Note time and tokens when the window opens and when it closes."""
        if self.begin is None and all(result.ttft_s for result in self.results):
            self.begin = self._now()

    def close(self) -> None:
        """Note that a stream has come to its last token."""
        if self.end is None:
            self.end = self._now()

    def _now(self) -> tuple[float, float, float, int]:
        num_events = sum(1 + len(result.itls_s) for result in self.results if result.ttft_s)
        return (*cpu_s(self.pid), time.perf_counter(), num_events)


async def wait_until_ready(client: HttpClient) -> None:
    """Wait until the server has heard from the engine.

    Raises:
        TimeoutError: it does not come.
    """
    async with asyncio.timeout(_READY_S):
        while True:
            try:
                if (await client.get("/ready")).status == 200:
                    return
            except HttpError:
                pass
            await asyncio.sleep(0.05)


async def stream_all(client: HttpClient, form: RequestForm, window: Window, output_len: int) -> None:
    """Open all streams at once and read them to their end.

    Raises:
        RuntimeError: one has failed.
    """
    random = np.random.default_rng(0)

    async def one(result: RequestResult) -> None:
        times = StreamTimes(result)

        def on_body(body: bytes) -> None:
            times.feed(body)
            if window.begin is None:
                window.look()
            elif b"[DONE]" in body:
                window.close()

        body = form.body(random, 16, output_len)
        result.start_s = time.perf_counter()
        response = await client.post(PATHS[form.endpoint], body, on_body)
        times.finish()
        if response.status != 200 or result.error_kind:
            raise RuntimeError(f"HTTP {response.status}: {result.error} {response.body!r}")

    window.results = [RequestResult(0) for _ in range(window.num_streams)]
    async with asyncio.TaskGroup() as group:
        for result in window.results:
            group.create_task(one(result))


async def request_us(client: HttpClient, form: RequestForm, pid: int) -> float:
    """Return the CPU time of a request with one token, in us."""
    load = Load(_NUM_SHORT, Lengths(16, 1), num_warmups=20, max_concurrency=8)
    before: list[float] = []

    def on_end(result: RequestResult) -> None:
        if not before:
            before.append(sum(cpu_s(pid)))

    await run_load(client, form, load, on_end)
    return (sum(cpu_s(pid)) - before[0]) / (_NUM_SHORT - 1) * 1e6


async def measure(server: Server, endpoint: Endpoint, counts: list[int], output_len: int) -> list[Row]:
    """Return a row for each number of streams."""
    client = HttpClient(server.base_url, {})
    await wait_until_ready(client)
    form = RequestForm(Path(server.config.model.path).resolve().name, endpoint, 10_000)
    await stream_all(client, form, Window(server.pid, 8), 50)
    rows = []
    for num_streams in counts:
        window = Window(server.pid, num_streams)
        await stream_all(client, form, window, output_len)
        rows.append(_row(window, endpoint, output_len))
    per_request = await request_us(client, form, server.pid)
    client.close()
    return [row | {"us_per_request": round(per_request)} for row in rows]


def _row(window: Window, endpoint: Endpoint, output_len: int) -> Row:
    assert window.begin is not None
    assert window.end is not None
    user_s, system_s, seconds, num_events = (
        end - begin for begin, end in zip(window.begin, window.end, strict=True)
    )
    events_per_token = sum(1 + len(result.itls_s) for result in window.results) / (
        window.num_streams * output_len
    )
    num_tokens = num_events / events_per_token
    return {
        "endpoint": endpoint,
        "streams": window.num_streams,
        "tokens_per_s": round(num_tokens / seconds),
        "us_per_token": round((user_s + system_s) / num_tokens * 1e6, 1),
        "user_us": round(user_s / num_tokens * 1e6, 1),
        "system_us": round(system_s / num_tokens * 1e6, 1),
        "events_per_token": round(events_per_token, 3),
        "core_percent": round((user_s + system_s) / seconds * 100),
    }


def bench_overhead(args: argparse.Namespace, say: Callable[[list[Row]], None]) -> None:
    """Measure each endpoint on a server of its own."""
    config = load_config(args.config, ["server.port=0", "logging.level=warning", *(args.settings or ())])
    counts = split_numbers("--streams", args.streams)
    rows: list[Row] = []
    for endpoint in args.endpoint or ("completions", "chat"):
        with served(config, args.steps_per_s) as server:
            rows += asyncio.run(measure(server, endpoint, counts, args.output_len))
    say(rows)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "config", nargs="?", default=DEMO, help="YAML file; of its model only the tokenizer is used"
    )
    parser.add_argument("--endpoint", action="append", choices=list(PATHS), help="default: both")
    parser.add_argument("--streams", default="64", help="numbers of streams, separated by commas")
    parser.add_argument("--steps-per-s", type=float, default=50.0, help="tokens per second of each stream")
    parser.add_argument("--output-len", type=int, default=600, help="tokens of each stream")
    parser.add_argument("--set", dest="settings", action="append", metavar="KEY=VALUE")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    bench_overhead(args, lambda rows: print_rows(rows, args.json))
    return 0


if __name__ == "__main__":
    sys.exit(main())
