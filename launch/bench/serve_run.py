"""Drives one load against an endpoint: warm-up, arrivals, concurrency, deadlines, and an early end on Ctrl-C.

Knows nothing of what the figures are called and how they are shown.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from launch.bench.serve_http import HttpClient, HttpError, Response
from launch.bench.serve_load import Lengths, RequestForm, arrival_times, some_text
from launch.bench.serve_stream import RequestResult, stream_request
from tprt.errors import ConfigError, TprtError

_ASK_S = 30.0


class EndpointError(TprtError):
    """The endpoint cannot be measured: it is not there, or refuses what a load is made of."""


@dataclass(frozen=True, slots=True)
class Load:
    """How many requests, of what length, and how they come.

    Attributes:
        num_prompts: requests that are measured.
        num_warmups: requests before them, that are not.
        lengths: of prompts and outputs.
        request_rate: arrivals per second; infinite: all at once.
        burstiness: shape of the gamma distribution of the pauses between them.
        max_concurrency: most requests at a time; others wait, and that wait is in no figure. None: no limit.
        timeout_s: for one request; it then fails.
        seed: prompts, lengths and arrivals follow from it.
    """

    num_prompts: int
    lengths: Lengths
    num_warmups: int = 1
    request_rate: float = float("inf")
    burstiness: float = 1.0
    max_concurrency: int | None = None
    timeout_s: float = 600.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class LoadOutcome:
    """Results in the order of arrival, of those that have ended; how long that took; whether all have ended."""

    results: list[RequestResult]
    duration_s: float
    was_interrupted: bool


async def first_model(client: HttpClient) -> str:
    """Return the first name of `/v1/models`.

    Raises:
        EndpointError: the endpoint is not there, or lists none.
    """
    response = await _ask(client.get("/v1/models"), "GET /v1/models")
    try:
        return str(json.loads(response.body)["data"][0]["id"])
    except (ValueError, LookupError, TypeError) as error:
        raise EndpointError(
            f"GET /v1/models: HTTP {response.status}, and no model in it; give --model"
        ) from error


async def find_vocab_size(client: HttpClient, model: str) -> int:
    """Return a number below which all token ids exist: one above the highest that `/tokenize` makes of a text.

    Raises:
        ConfigError: the endpoint has no such thing.
    """
    body = json.dumps({"model": model, "prompt": some_text()}).encode()
    response = await _ask(client.post("/tokenize", body), "POST /tokenize")
    try:
        return int(max(json.loads(response.body)["tokens"])) + 1
    except (ValueError, LookupError, TypeError) as error:
        raise ConfigError(
            f"prompts of random token ids need the size of the vocabulary, and POST /tokenize answers HTTP"
            f" {response.status}; give --vocab-size, 0 for prompts of text"
        ) from error


async def _ask(answer: Coroutine[Any, Any, Response], what: str) -> Response:
    try:
        async with asyncio.timeout(_ASK_S):
            return await answer
    except HttpError as error:
        raise EndpointError(f"{what}: {error.kind}: {error}") from error
    except TimeoutError as error:
        raise EndpointError(f"{what}: no answer in {_ASK_S} s") from error


async def run_load(
    client: HttpClient, form: RequestForm, load: Load, on_end: Callable[[RequestResult], None]
) -> LoadOutcome:
    """Send all requests; `on_end` hears of each measured one. Ctrl-C ends it with what there is, once.

    Raises:
        EndpointError: a request of the warm-up failed.
    """
    random = np.random.default_rng(load.seed)
    lengths = load.lengths.draw(random, load.num_warmups + load.num_prompts)
    bodies = [form.body(random, *pair) for pair in lengths]
    arrivals_s = arrival_times(random, load.num_prompts, load.request_rate, load.burstiness)
    results = [RequestResult(prompt_len) for prompt_len, _ in lengths]
    run = _Run(client, form, load)
    async with _interruptible() as stop:
        warm_ups = results[: load.num_warmups]
        await run.send(bodies[: load.num_warmups], warm_ups, [0.0] * load.num_warmups, stop)
        for result in warm_ups:
            if result.error_kind:
                raise EndpointError(f"a request of the warm-up failed: {result.error_kind}: {result.error}")
        run.on_end = on_end
        measured = results[load.num_warmups :]
        started_s = time.perf_counter()
        await run.send(bodies[load.num_warmups :], measured, arrivals_s, stop)
    done = [result for result in measured if result.is_done]
    return LoadOutcome(done, time.perf_counter() - started_s, len(done) < len(measured))


class _Run:
    """The requests of one load, in flight."""

    def __init__(self, client: HttpClient, form: RequestForm, load: Load) -> None:
        self.on_end: Callable[[RequestResult], None] = lambda result: None
        self._client = client
        self._form = form
        self._timeout_s = load.timeout_s
        self._places = asyncio.Semaphore(load.max_concurrency or 2**31)

    async def send(
        self,
        bodies: Sequence[bytes],
        results: Sequence[RequestResult],
        arrivals_s: Sequence[float],
        stop: asyncio.Event,
    ) -> None:
        """Send each body at its time and wait for the end of all, or for `stop`."""
        if not bodies:
            return
        started_s = time.perf_counter()
        requests = zip(bodies, results, arrivals_s, strict=True)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._one(*request, started_s)) for request in requests]
            waiting = group.create_task(_wait(stop))
            everything = group.create_task(_all(tasks))
            await asyncio.wait((everything, waiting), return_when=asyncio.FIRST_COMPLETED)
            for task in (*tasks, everything, waiting):
                task.cancel()

    async def _one(self, body: bytes, result: RequestResult, arrival_s: float, started_s: float) -> None:
        await asyncio.sleep(started_s + arrival_s - time.perf_counter())
        async with self._places:
            try:
                async with asyncio.timeout(self._timeout_s):
                    await stream_request(self._client, self._form.endpoint, body, result)
            except TimeoutError:
                result.fail("deadline", f"no end after {self._timeout_s} s")
                result.is_done = True
        self.on_end(result)


async def _wait(stop: asyncio.Event) -> None:
    await stop.wait()


async def _all(tasks: Sequence[asyncio.Task[None]]) -> None:
    await asyncio.wait(tasks)


@contextlib.asynccontextmanager
async def _interruptible() -> AsyncIterator[asyncio.Event]:
    """Give an event that the first Ctrl-C sets; a second one does what Ctrl-C otherwise does."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    earlier = signal.getsignal(signal.SIGINT)

    def interrupt() -> None:
        stop.set()
        loop.remove_signal_handler(signal.SIGINT)
        signal.signal(signal.SIGINT, earlier)

    loop.add_signal_handler(signal.SIGINT, interrupt)
    try:
        yield stop
    finally:
        loop.remove_signal_handler(signal.SIGINT)
        signal.signal(signal.SIGINT, earlier)
