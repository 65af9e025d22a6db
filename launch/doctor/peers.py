"""Whether what one CUDA device writes into another arrives: every pair, in both directions, read back.

Every pair has a process of its own, all side by side, since to open a device takes longer than all its copies.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from launch.doctor.finding import NO_TIME, Finding, bad, ok, silent, skipped
from launch.doctor.forked import ask_child, end_children, fork_child
from launch.doctor.request import DoctorRequest

_NAME = "peer copies"
_LONGEST_S = 5.0
# No copy is said to hang that had less.
_LEAST_S = 1.5
_NUM_ELEMENTS = 2**20
_FIX = (
    "set NCCL_P2P_DISABLE=1 to go by way of the host's memory; to repair it, disable PCIe ACS and the IOMMU"
    " in the BIOS and kernel, or update the driver"
)
Pair = tuple[int, int]


def check_peers(request: DoctorRequest) -> Iterator[Finding]:
    """Copy between all pairs of devices in processes of their own, which may hang."""
    num_devices = 0
    if request.expects_cuda and request.num_ranks > 1:
        visible = ask_child(torch.cuda.device_count, request.left_s(_LONGEST_S))
        num_devices = min(request.num_ranks, visible or 0)
    if num_devices < 2:
        yield skipped(_NAME, "the ranks have no two CUDA devices to copy between")
        return
    receivers: dict[Pair, Connection] = {}
    pids = []
    try:
        for pair in itertools.combinations(range(num_devices), 2):
            receivers[pair], sender = Pipe(duplex=False)
            with sender:
                pids.append(fork_child(partial(_copy_both_ways, pair, sender)))
        yield _hear(receivers, request.left_s(_LONGEST_S))
    finally:
        end_children(pids)
        for receiver in receivers.values():
            receiver.close()


def _copy_both_ways(pair: Pair, connection: Connection) -> None:
    """Say which direction begins, and then whether it is direct and whether what arrived is right."""
    try:
        with ThreadPoolExecutor(len(pair)) as threads:
            list(threads.map(torch.cuda.synchronize, pair))
        for source, target in (pair, pair[::-1]):
            connection.send((source, target))
            connection.send(_copy(source, target))
    except RuntimeError as error:
        connection.send(str(error))


def _copy(source: int, target: int) -> tuple[bool, bool]:
    written = torch.arange(_NUM_ELEMENTS, device=f"cuda:{source}") * (source + 1)
    received = torch.full_like(written, -1, device=f"cuda:{target}")
    received.copy_(written)
    torch.cuda.synchronize(target)
    is_right = torch.equal(received.cpu(), torch.arange(_NUM_ELEMENTS) * (source + 1))
    return torch.cuda.can_device_access_peer(source, target), is_right


@dataclass
class _Heard:
    """What the process of a pair has said: directions that are done, of which some are direct, and more.

    Attributes:
        at: where it is.
        since_s: since when it has been copying, on the monotonic clock; None while it opens its devices.
    """

    at: str
    since_s: float | None = None
    num_done: int = 0
    num_direct: int = 0
    wrong: str = ""
    error: str = ""

    def take(self, message: Any) -> None:
        if isinstance(message, str):
            self.error = f"{self.at}: {message}"
        elif isinstance(message[0], bool):
            is_direct, is_right = message
            self.num_done += 1
            self.num_direct += is_direct
            self.wrong = self.wrong or ("" if is_right else self.at)
        else:
            self.at, self.since_s = "device {} to {}".format(*message), time.monotonic()

    def lose(self) -> None:
        """Take in that nothing more will come."""
        if self.num_done < 2 and not self.error:
            self.error = f"{self.at}: the process died"

    @property
    def waits_s(self) -> float:
        """For how long what it copies has not arrived."""
        return 0.0 if self.since_s is None else time.monotonic() - self.since_s


def _hear(receivers: Mapping[Pair, Connection], timeout_s: float) -> Finding:
    """Take in what is said of all pairs, until all have said all or the time is over, and judge it."""
    end_s = time.monotonic() + timeout_s
    heard = {pair: _Heard("device {} and {}, before the first copy".format(*pair)) for pair in receivers}
    open_ = {receiver: pair for pair, receiver in receivers.items()}
    while open_ and (left_s := end_s - time.monotonic()) > 0:
        for receiver in wait(list(open_), left_s):
            assert isinstance(receiver, Connection)
            try:
                heard[open_[receiver]].take(receiver.recv())
            except EOFError:
                heard[open_.pop(receiver)].lose()
    return _judge(list(heard.values()))


def _judge(heard: list[_Heard]) -> Finding:
    num_done, num_all = sum(one.num_done for one in heard), 2 * len(heard)
    errors = [one.error for one in heard if one.error]
    wrong = [one.wrong for one in heard if one.wrong]
    unfinished = [one for one in heard if one.num_done < 2 and not one.error]
    stuck = [one for one in unfinished if one.waits_s >= _LEAST_S]
    if errors:
        return bad(_NAME, "; ".join(errors), _FIX)
    if wrong:
        return bad(_NAME, f"what arrived is not what was written: {', '.join(wrong)}", _FIX)
    if stuck:
        waited = ", ".join(f"{one.at}: nothing arrived in {one.waits_s:.1f} s" for one in stuck)
        return silent(_NAME, waited, _FIX)
    if unfinished:
        return skipped(_NAME, f"{num_done} of {num_all} pairs of devices are well; for the rest {NO_TIME}")
    num_direct = sum(one.num_direct for one in heard)
    text = f"{num_all} pairs of devices: what was written was read, {num_direct} directly"
    return ok(_NAME, text, pairs=num_all, direct=num_direct)
