"""Whether a server is, after a soak, as it was before: requests, KV blocks, memory, descriptors, its end.

Knows nothing of what clients did.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Mapping, Sequence

from launch.bench.serve_http import HttpClient, HttpError
from scripts.soak_server_process import ServedDeployment
from scripts.soak_tally import Tally
from scripts.soak_watch import Sample, second_half

_QUIET_S = 60.0
# The engine tells of itself once a second: what it said before does not count.
_NEWS_S = 2.5
# Of the server's own: a look at a rank's heartbeats, the last connection on its way to its end.
_SPARE_DESCRIPTORS = 3
_IDLE = {"vllm:num_requests_running": 0.0, "vllm:num_requests_waiting": 0.0}
BLOCKS, FREE_BLOCKS = "tprt_kv_blocks", "tprt_kv_blocks_free"


async def wait_until(client: HttpClient, path: str, timeout_s: float) -> None:
    """Wait until GET `path` answers 200.

    Raises:
        TimeoutError: it does not.
    """
    async with asyncio.timeout(timeout_s):
        while True:
            try:
                if (await client.get(path)).status == 200:
                    return
            except HttpError:
                pass
            await asyncio.sleep(0.1)


async def read_metrics(client: HttpClient) -> dict[str, float]:
    """Return the value of each metric that has one, by its name."""
    text = (await client.get("/metrics")).body.decode()
    found = re.findall(r"^([a-z_:]+)(?:\{[^}]*\})? ([0-9.e+-]+)$", text, re.MULTILINE)
    return {name: float(value) for name, value in found}


async def wait_until_idle(client: HttpClient, tally: Tally) -> None:
    """Note whether all requests have ended and all KV blocks are free, once the server has had time for it."""
    deadline_s = time.monotonic() + _QUIET_S
    while True:
        await asyncio.sleep(_NEWS_S)
        metrics = await read_metrics(client)
        in_use = metrics[BLOCKS] - metrics[FREE_BLOCKS]
        if (is_idle := in_use == 0 and metrics.items() >= _IDLE.items()) or time.monotonic() > deadline_s:
            break
    running = {name: metrics.get(name) for name in _IDLE}
    tally.check("all requests ended, all KV blocks free", is_idle, f"{in_use} blocks in use, {running}")


def judge_memory(samples_by_name: Mapping[str, Sequence[Sample]], tally: Tally, most_mib: float) -> None:
    """Note which of the processes have grown by more than `most_mib` MiB, and print how all have."""
    for name, samples in samples_by_name.items():
        trend = second_half(samples)
        if trend is None:
            tally.count(f"memory of {name}: too new to tell")
            continue
        line = f"{trend.first_mib:.1f} to {trend.last_mib:.1f} MiB in the second half"
        print(f"memory of {name:<12} {samples[0].resident_mib:8.1f} MiB at first, {line}", flush=True)
        tally.check(f"memory of {name} is flat", trend.growth_mib <= most_mib, line)


def judge_descriptors(
    before: Mapping[str, Sample | None], after: Mapping[str, Sample | None], tally: Tally
) -> None:
    """Note whether each process that was there before has as many descriptors as then."""
    for name, first in before.items():
        last = after.get(name)
        if first is None or last is None or last.pid != first.pid:
            continue
        words = f"{first.num_descriptors} before, {last.num_descriptors} after"
        is_flat = last.num_descriptors <= first.num_descriptors + _SPARE_DESCRIPTORS
        tally.check(f"descriptors of {name} are flat", is_flat, words)


def judge_end(deployment: ServedDeployment, tally: Tally) -> None:
    """End the deployment and note what is wrong about that."""
    code = deployment.stop()
    tally.check("SIGTERM ends it", code == 0, f"exit code {code}")
    left = deployment.left_behind()
    tally.check("nothing is left behind", not left, ", ".join(left))
    log = deployment.log
    at = log.find("Traceback")
    tally.check("no traceback in the log", at < 0, log[max(0, at - 200) : at + 3000])
