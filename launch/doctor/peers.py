"""Whether what one CUDA device writes into another arrives: every pair, in both directions, read back."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import torch

from launch.doctor.finding import NO_TIME, Finding, bad, ok, silent, skipped
from launch.doctor.forked import ask_child, end_child, fork_child
from launch.doctor.request import DoctorRequest

_NAME = "peer copies"
_LONGEST_S = 5.0
# No pair is judged that had less, the start of CUDA on its two devices included.
_LEAST_S = 1.5
_NUM_ELEMENTS = 2**20
_FIX = (
    "set NCCL_P2P_DISABLE=1 to go by way of the host's memory; to repair it, disable PCIe ACS and the IOMMU"
    " in the BIOS and kernel, or update the driver"
)


def check_peers(request: DoctorRequest) -> Iterator[Finding]:
    """Copy between all pairs of devices in a process of its own, which may hang."""
    num_devices = 0
    if request.expects_cuda and request.num_ranks > 1:
        visible = ask_child(torch.cuda.device_count, request.left_s(_LONGEST_S))
        num_devices = min(request.num_ranks, visible or 0)
    if num_devices < 2:
        yield skipped(_NAME, "the ranks have no two CUDA devices to copy between")
        return
    receiver, sender = Pipe(duplex=False)
    with receiver:
        with sender:
            pid = fork_child(partial(_copy, num_devices, sender))
        try:
            yield _hear(num_devices, receiver, request.left_s(_LONGEST_S))
        finally:
            end_child(pid)


def _copy(num_devices: int, connection: Connection) -> None:
    """Copy between all pairs: say which one begins, and then whether it is direct and what arrived is right."""
    try:
        for source, target in itertools.permutations(range(num_devices), 2):
            connection.send((source, target))
            written = torch.arange(_NUM_ELEMENTS, device=f"cuda:{source}") * (source + 1)
            received = torch.full_like(written, -1, device=f"cuda:{target}")
            received.copy_(written)
            torch.cuda.synchronize(target)
            is_right = torch.equal(received.cpu(), torch.arange(_NUM_ELEMENTS) * (source + 1))
            connection.send((torch.cuda.can_device_access_peer(source, target), is_right))
    except RuntimeError as error:
        connection.send(str(error))


def _hear(num_devices: int, receiver: Connection, timeout_s: float) -> Finding:
    """Take in what is said of each pair."""
    began_s = time.monotonic()
    end_s = began_s + timeout_s
    num_pairs = num_devices * (num_devices - 1)
    at, wrong, num_direct, num_done = "before the first copy", [], 0, 0
    try:
        while num_done < num_pairs:
            source, target = _receive(receiver, end_s)
            at, began_s = f"device {source} to {target}", time.monotonic()
            is_direct, is_right = _receive(receiver, end_s)
            num_done += 1
            num_direct += is_direct
            wrong += [] if is_right else [at]
    except RuntimeError as error:
        return bad(_NAME, f"{at}: {error}", _FIX)
    except EOFError:
        return bad(_NAME, f"{at}: the process died", _FIX)
    except TimeoutError:
        waited_s = time.monotonic() - began_s
        if waited_s >= _LEAST_S:
            return silent(_NAME, f"{at}: nothing arrived in {waited_s:.1f} s", _FIX)
        if not wrong:
            return skipped(
                _NAME, f"{num_done} of {num_pairs} pairs of devices are well; for the rest {NO_TIME}"
            )
    if wrong:
        return bad(_NAME, f"what arrived is not what was written: {', '.join(wrong)}", _FIX)
    text = f"{num_pairs} pairs of devices: what was written was read, {num_direct} directly"
    return ok(_NAME, text, pairs=num_pairs, direct=num_direct)


def _receive(receiver: Connection, end_s: float) -> Any:
    if not receiver.poll(max(0.0, end_s - time.monotonic())):
        raise TimeoutError
    message = receiver.recv()
    if isinstance(message, str):
        raise RuntimeError(message)
    return message
