"""How a rank on this host gets its lanes: one exchange over a unix socket, with descriptors attached.

The rank says who it is; the hub answers with descriptors, or with a reason to refuse. Both ends are here, so
that they agree. Knows nothing of what the descriptors are for.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import msgpack

from tprt.errors import PeerLostError, TransportError, TransportTimeoutError

_MAGIC = b"tprthand"
_VERSION = 1
# Magic, version, epoch, rank. The process id comes from the kernel.
_HELLO = struct.Struct("<8sIqq")
_CREDENTIALS = struct.Struct("3i")
_MAX_ANSWER_BYTES = 16 * 1024
_MAX_FDS = 16
_MAX_PATH_BYTES = 107
# Between two attempts while the hub is not listening yet.
_RETRY_S = 0.01


@dataclass(frozen=True, slots=True)
class WorkerHello:
    """Who has connected."""

    epoch: int
    rank: int
    pid: int


@dataclass(frozen=True, slots=True)
class Welcome:
    """What a rank is told along with its descriptors: where large messages go by.

    Attributes:
        large_steps: where this rank is to listen for large steps.
        large_outputs: where rank 0 sends large outputs to.
    """

    large_steps: str
    large_outputs: str


def check_path(path: str) -> None:
    """Check that a unix socket can have this path.

    Raises:
        TransportError: it is too long.
    """
    if len(os.fsencode(path)) > _MAX_PATH_BYTES:
        raise TransportError(
            f"the socket path {path} has {len(os.fsencode(path))} bytes; a unix socket allows"
            f" {_MAX_PATH_BYTES}: choose a run directory with a shorter path"
        )


def read_hello(connection: socket.socket) -> WorkerHello:
    """Read who has connected; the hello must be there already.

    Raises:
        TransportError: it is no rank of this version, or belongs to another user.
    """
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(raw)
    hello = connection.recv(_HELLO.size, socket.MSG_DONTWAIT)
    if uid != os.getuid():
        raise TransportError(f"process {pid} belongs to user {uid}; expected user {os.getuid()}")
    magic, version, epoch, rank = _HELLO.unpack(hello.ljust(_HELLO.size, b"\0"))
    if (magic, version) != (_MAGIC, _VERSION):
        raise TransportError(
            f"process {pid} began with {hello[:12]!r}; expected a tprt worker that speaks version {_VERSION}"
        )
    return WorkerHello(epoch, rank, pid)


def welcome(connection: socket.socket, answer: Welcome, fds: Sequence[int]) -> None:
    """Give a rank its lanes.

    Raises:
        OSError: it is gone.
    """
    socket.send_fds(connection, [_pack(asdict(answer))], list(fds))


def refuse(connection: socket.socket, reason: str) -> None:
    """Tell whoever connected why it gets no lanes, and hang up."""
    with contextlib.closing(connection), contextlib.suppress(OSError):
        connection.send(_pack({"refused": reason}), socket.MSG_DONTWAIT)


def join(path: str, epoch: int, rank: int, timeout_s: float) -> tuple[socket.socket, Welcome, list[int]]:
    """Connect to the hub at `path`, which may begin to listen later.

    Returns:
        The connection, which is the rank's control lane from now on, what the hub said, and the descriptors.

    Raises:
        TransportTimeoutError: nobody listened or answered in time.
        PeerLostError: the coordinator went away.
        TransportError: it refuses this rank; says why.
    """
    check_path(path)
    deadline_s = time.monotonic() + timeout_s
    connection = _connect(path, deadline_s, timeout_s)
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(connection.close)
        try:
            connection.settimeout(max(deadline_s - time.monotonic(), _RETRY_S))
            connection.send(_HELLO.pack(_MAGIC, _VERSION, epoch, rank))
            packed, fds, _, _ = socket.recv_fds(
                connection, _MAX_ANSWER_BYTES, _MAX_FDS, socket.MSG_CMSG_CLOEXEC
            )
        except TimeoutError as error:
            raise TransportTimeoutError(
                f"the coordinator at {path} did not answer in {timeout_s:g} s"
            ) from error
        except OSError as error:
            raise PeerLostError(f"the coordinator at {path} went away: {error.strerror}") from error
        if not packed:
            raise PeerLostError(f"the coordinator at {path} went away before it answered")
        answer: dict[str, Any] = msgpack.unpackb(packed)
        if "refused" in answer:
            raise TransportError(f"the coordinator refuses rank {rank}: {answer['refused']}")
        cleanup.pop_all()
    return connection, Welcome(**answer), fds


def _connect(path: str, deadline_s: float, timeout_s: float) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    while True:
        left_s = deadline_s - time.monotonic()
        connection.settimeout(max(left_s, _RETRY_S))
        try:
            connection.connect(path)
        except (FileNotFoundError, ConnectionRefusedError, BlockingIOError, TimeoutError) as error:
            if left_s <= 0:
                connection.close()
                raise TransportTimeoutError(
                    f"no coordinator listens at {path} after {timeout_s:g} s: {error.strerror}"
                ) from error
            time.sleep(_RETRY_S)
        except OSError as error:
            connection.close()
            raise TransportError(f"cannot connect to {path}: {error.strerror}") from error
        else:
            return connection


def _pack(answer: dict[str, Any]) -> bytes:
    packed: bytes = msgpack.packb(answer)
    return packed
