"""Sends millions of messages through a shared-memory ring to reader processes that check every byte of them.

Usage: soak_ring.py [--messages 10000000] [--readers 4] [--stall 0.0001] [--large 0.0001]

Prints the rate while it runs and, for each reader, the one-way latency. Exits with 1 at the first message that
is lost, doubled, overtaken or torn, and after 30 s without progress. Knows nothing of engines.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Iterator

from tprt.transport.hub import ShmWorkerHub
from tprt.transport.link import ShmWorkerLink
from tprt.transport.shm_ring import RingGeometry

TIMEOUT_S = 30.0
GEOMETRY = RingGeometry(num_slots=8, slot_bytes=8 * 1024)
POOL = random.Random(0).randbytes(64 * 1024)
LATENCY_EVERY = 64
REPORT_S = 5.0


def contents(share_of_large: float) -> Iterator[bytes]:
    """Yield the content of one message after the other; the same at both ends."""
    dice = random.Random(1)
    while True:
        is_large = dice.random() < share_of_large
        size = dice.randrange(GEOMETRY.slot_bytes, 60_000) if is_large else dice.randrange(4096)
        start = dice.randrange(len(POOL) - size)
        yield POOL[start : start + size]


def read(path: str, rank: int, args: argparse.Namespace) -> None:
    """Be a reader: check every message, stall now and then, and tell the latency in the end."""
    link = ShmWorkerLink.connect(path, epoch=0, rank=rank, timeout_s=TIMEOUT_S)
    stalls = random.Random(rank)
    latencies_ns = array("q")
    for number, content in zip(range(args.messages), contents(args.large), strict=False):
        message = link.steps.receive(TIMEOUT_S)
        if number % LATENCY_EVERY == 0:
            latencies_ns.append(time.monotonic_ns() - int.from_bytes(message[8:16], "little"))
        if int.from_bytes(message[:8], "little") != number or message[16:] != content:
            sys.exit(
                f"reader {rank}: message {number} is wrong: {len(message)} bytes, {message[:8].hex()} first"
            )
        if stalls.random() < args.stall:
            time.sleep(stalls.random() * 0.05)
    ordered_us = [latency_ns / 1e3 for latency_ns in sorted(latencies_ns)]
    p50, p99 = (ordered_us[int(len(ordered_us) * share)] for share in (0.5, 0.99))
    # One write, so that the lines of readers do not mix.
    sys.stdout.write(f"reader {rank}: {args.messages:,} messages, one way p50 {p50:.0f} us, p99 {p99:.0f} us\n")
    link.close()


def write(hub: ShmWorkerHub, args: argparse.Namespace) -> None:
    """Send all messages, as fast as the readers let."""
    begin_s = report_s = time.monotonic()
    for number, content in zip(range(args.messages), contents(args.large), strict=False):
        stamp = number.to_bytes(8, "little") + time.monotonic_ns().to_bytes(8, "little")
        hub.steps.send([stamp, content], TIMEOUT_S)
        if number % 1024 == 0 and time.monotonic() - report_s > REPORT_S:
            report_s = time.monotonic()
            rate = number / (report_s - begin_s)
            print(f"{number:,} messages, {rate:,.0f} per second", file=sys.stderr, flush=True)


def main() -> int:
    """Run the soak, or one of its readers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--messages", type=int, default=10_000_000)
    parser.add_argument("--readers", type=int, default=4)
    parser.add_argument(
        "--stall", type=float, default=1e-4, help="share of messages after which a reader sleeps"
    )
    parser.add_argument("--large", type=float, default=1e-4, help="share of messages that outgrow a slot")
    parser.add_argument("--be-reader", nargs=2, metavar=("PATH", "RANK"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.be_reader:
        read(args.be_reader[0], int(args.be_reader[1]), args)
        return 0
    with tempfile.TemporaryDirectory(prefix="tprt-soak-") as folder:
        path = os.path.join(folder, "hub")
        hub = ShmWorkerHub.listen(path, epoch=0, world_size=args.readers, geometry=GEOMETRY)
        command = [sys.executable, *sys.argv, "--be-reader", path]
        readers = [subprocess.Popen([*command, str(rank)]) for rank in range(args.readers)]
        try:
            hub.accept_all(TIMEOUT_S)
            write(hub, args)
            return int(any([reader.wait(TIMEOUT_S) for reader in readers]))
        finally:
            for reader in readers:
                reader.kill()
                reader.wait()
            hub.close()


if __name__ == "__main__":
    sys.exit(main())
