"""How a rank on this host gets its lanes: one exchange over a unix socket, with descriptors attached.

The rank says who it is; the hub answers with the geometry of the rings and their descriptors, or with a reason
to refuse. The connection stays as the rank's control lane. Both ends are here, so that they agree. Knows
nothing of what travels on the lanes.
"""

from __future__ import annotations

import os
import socket
import struct
from dataclasses import asdict, dataclass

import msgpack

from tprt.errors import PeerLostError, TransportError

MAX_CONTROL_BYTES = 128 * 1024
_VERSION = 1
_MAX_FDS = 16
_CREDENTIALS = struct.Struct("3i")


@dataclass(frozen=True, slots=True)
class WorkerHello:
    """What a rank says of itself."""

    rank: int
    epoch: int
    version: int = _VERSION


@dataclass(frozen=True, slots=True)
class Welcome:
    """What a rank is told: the size of the rings, and where large messages go.

    `steps_overflow` is this rank's address for large steps; `outputs_overflow` is where rank 0 sends large
    outputs from. The descriptors that come along are memory, reader and writer of the steps ring and, for
    rank 0, of the outputs ring.
    """

    num_slots: int
    slot_bytes: int
    world_size: int
    steps_overflow: str
    outputs_overflow: str


def send_hello(connection: socket.socket, hello: WorkerHello) -> None:
    """Introduce this rank."""
    connection.send(msgpack.packb(asdict(hello)))


def receive_hello(connection: socket.socket) -> WorkerHello:
    """Read who has connected.

    Raises:
        TransportError: it is no rank of this version, or belongs to another user.
    """
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, uid, _ = _CREDENTIALS.unpack(raw)
    if uid != os.getuid():
        raise TransportError(f"user {uid} connected; expected user {os.getuid()}")
    try:
        hello = WorkerHello(**msgpack.unpackb(connection.recv(MAX_CONTROL_BYTES)))
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise TransportError(f"no rank of this version connected: {error}") from error
    if hello.version != _VERSION:
        raise TransportError(f"rank {hello.rank} speaks version {hello.version}; expected {_VERSION}")
    return hello


def send_welcome(connection: socket.socket, welcome: Welcome, fds: list[int]) -> None:
    """Give a rank its lanes."""
    socket.send_fds(connection, [msgpack.packb(asdict(welcome))], fds)


def refuse(connection: socket.socket, reason: str) -> None:
    """Tell whoever connected why it gets no lanes, and hang up."""
    try:
        connection.send(msgpack.packb({"refused": reason}))
    except OSError:
        pass
    finally:
        connection.close()


def receive_welcome(connection: socket.socket) -> tuple[Welcome, list[int]]:
    """Wait for the answer; the connection's own timeout is the deadline.

    Raises:
        PeerLostError: the coordinator is gone.
        TransportError: it refuses this rank; says why.
    """
    payload, fds, _, _ = socket.recv_fds(connection, MAX_CONTROL_BYTES, _MAX_FDS)
    if not payload:
        raise PeerLostError("the coordinator has closed the connection")
    answer = msgpack.unpackb(payload)
    if "refused" in answer:
        raise TransportError(f"the coordinator refuses this rank: {answer['refused']}")
    for fd in fds:
        os.set_inheritable(fd, False)
    return Welcome(**answer), fds
