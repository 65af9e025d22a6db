"""Many clients on `tprt serve`, well-behaved and not; then all must be as before.

    python scripts/soak_server.py                               200 clients, two minutes, SmolLM2 on 2 CPU ranks
    python scripts/soak_server.py --kill-rank 20                and a random rank is killed every 20 s
    python scripts/soak_server.py --base-url http://host:8000   a server that runs; its processes are left alone
    python scripts/soak_server.py CONFIG --clients 24 --seconds 8 --set server.max_queued_requests=4

Half of what clients do is to read a stream to its end (text prompts, token ids and chats in turns), whose text
must be that of the same prompt offline; the rest asks for whole answers, reads late, leaves before the
headers, in the queue or in mid-stream, sends what must be refused, and half requests. Steps are small, since
on a CPU oneDNN keeps 2 MB and more for each number of tokens that a step has had, which would look like a
leak. It fails (exit code 1) if

* a good request gets no whole answer, another text or number of tokens, or an error; 429 and 503 with a time to
  come again are an announcement, and the client does;
* a bad request is not refused with the status that it should have;
* the server's metrics still show a request or a KV block in use after the clients have left;
* the memory of a process (but of ranks that are killed) grows by more than `--growth-mib` over the second half
  of the time, or its descriptors are more than before;
* the log has a traceback; SIGTERM is not followed by the end; a process, file or shared memory is left.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

# Run as a file, this finds only scripts/ on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from launch.bench.serve_http import HttpClient
from launch.bench.serve_load import RequestForm
from launch.bench.serve_run import first_model
from scripts.soak_cases import Case, make_cases
from scripts.soak_clients import Client, Target
from scripts.soak_server_process import ServedDeployment
from scripts.soak_tally import Tally
from scripts.soak_verdict import (
    BLOCKS,
    judge_descriptors,
    judge_end,
    judge_memory,
    read_metrics,
    wait_until,
    wait_until_idle,
)
from scripts.soak_watch import Watch, look_at

DEMO = str(Path(__file__).resolve().parents[1] / "configs" / "smollm2-135m-tp2-cpu.yaml")
_READY_S = 300.0
# The engine tells of itself once a second.
_NEWS_S = 2.0
# Prompts that fill the KV blocks, which have this many tokens unless they are told otherwise.
_MOST_BLOCK_TOKENS = 16
_FILL_TOKENS = 128
_FILL_AT_ONCE = 8
_FILL_VOCABULARY = 10_000


async def kill_ranks(deployment: ServedDeployment, every_s: float, tally: Tally, seed: int) -> None:
    """Kill a random rank every `every_s` seconds."""
    draw = random.Random(seed)
    while True:
        await asyncio.sleep(every_s)
        if (name := deployment.kill_a_rank(draw)) is not None:
            tally.count(f"killed {name}")


async def soak(
    args: argparse.Namespace, target: Target, deployment: ServedDeployment | None, tally: Tally
) -> None:
    """Let the clients loose on a server that is ready, and look at it before, meanwhile and after."""
    watch = Watch(deployment.pids if deployment is not None else dict)
    client = HttpClient(target.base_url, {})
    before = {name: look_at(pid) for name, pid in deployment.pids().items()} if deployment is not None else {}
    disturbers = [asyncio.ensure_future(watch.run())]
    if deployment is not None and args.kill_rank:
        disturbers.append(asyncio.ensure_future(kill_ranks(deployment, args.kill_rank, tally, args.seed)))
    until_s = time.monotonic() + args.seconds
    clients = [Client(target, tally, args.seed + number) for number in range(args.clients)]
    try:
        async with asyncio.TaskGroup() as group:
            for one in clients:
                group.create_task(one.run(until_s))
    finally:
        for disturber in disturbers:
            disturber.cancel()
    await wait_until_idle(client, tally)
    client.close()
    if deployment is not None:
        await asyncio.sleep(1.0)
        after = {name: look_at(pid) for name, pid in deployment.pids().items()}
        # Ranks that take the place of others have not warmed up.
        settled = [name for name in watch.samples if not (args.kill_rank and name.startswith("rank"))]
        judge_memory({name: watch.samples[name] for name in settled}, tally, args.growth_mib)
        judge_descriptors(before, after, tally)


async def prepare(base_url: str, cases: list[Case], args: argparse.Namespace) -> Target:
    """Wait until the server is ready, and touch all that it touches when it is busy; return what to soak.

    On a CPU a rank keeps what oneDNN has prepared for each number of tokens of a step, so there is a prompt of
    each length; and KV blocks take memory when they are first written, so all of them are filled.
    """
    client = HttpClient(base_url, {})
    try:
        await wait_until(client, "/ready", _READY_S)
        target = Target(base_url, await first_model(client), cases)
        await asyncio.sleep(_NEWS_S)
        num_tokens = (await read_metrics(client))[BLOCKS] * _MOST_BLOCK_TOKENS
        random = np.random.default_rng(args.seed)
        form = RequestForm(target.model, "completions", _FILL_VOCABULARY)
        places = asyncio.Semaphore(_FILL_AT_ONCE)

        async def send(length: int) -> None:
            async with places:
                await client.post("/v1/completions", form.body(random, length, 1), lambda part: None)

        for length in range(1, args.step_tokens + 1):
            await send(length)
        await asyncio.gather(*map(send, [_FILL_TOKENS] * math.ceil(num_tokens / _FILL_TOKENS)))
        return target
    finally:
        client.close()


def run(args: argparse.Namespace) -> Tally:
    """Soak the server that is asked for and return what came of it."""
    few = [f"cache.num_blocks={args.blocks}", f"scheduler.max_num_batched_tokens={args.step_tokens}"]
    settings = [*few, *(args.settings or ())]
    cases = make_cases(args.config, settings, args.cases, args.max_tokens, args.seed)
    print(f"{len(cases)} prompts with their answers; {args.clients} clients, {args.seconds} s", flush=True)
    tally = Tally()
    if args.base_url:
        target = asyncio.run(prepare(args.base_url, cases, args))
        asyncio.run(soak(args, target, None, tally))
        return tally
    if args.kill_rank:
        settings.append("supervision.max_restarts=1000000")
    deployment = ServedDeployment(args.config, settings)
    try:
        target = asyncio.run(prepare(deployment.start(), cases, args))
        asyncio.run(soak(args, target, deployment, tally))
        judge_end(deployment, tally)
    finally:
        deployment.close()
    return tally


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options of a command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", nargs="?", default=DEMO, help="YAML file; the demo's model on two CPU ranks")
    parser.add_argument("--base-url", help="a server of the same model that runs already")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--cases", type=int, default=48, help="different prompts")
    parser.add_argument("--max-tokens", type=int, default=48, help="of the longest output")
    parser.add_argument(
        "--blocks", type=int, default=128, help="KV blocks; few, so that sequences are preempted"
    )
    parser.add_argument("--step-tokens", type=int, default=64, help="most tokens of one step")
    parser.add_argument("--growth-mib", type=float, default=8.0)
    parser.add_argument("--kill-rank", type=float, metavar="SECONDS", help="kill a random rank that often")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", dest="settings", action="append", metavar="KEY=VALUE")
    return parser.parse_args(arguments)


def main() -> int:
    """Run the soak; return 1 if anything is not as it must be."""
    tally = run(parse(sys.argv[1:]))
    print(tally.table())
    return int(bool(tally.violations))


if __name__ == "__main__":
    sys.exit(main())
