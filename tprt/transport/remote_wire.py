"""What goes over the TCP connection between a step writer and a rank on another host.

Plain TCP, one connection for each rank, and not ZeroMQ: its end is then the end of that rank, seen at once and
by name, and there is no queue in between where a message could wait without being counted.

    rank to writer    hello: magic, version, epoch, rank, token; then the number of each message that was read
    writer to rank    answer: a text that is empty when the rank is let in; then messages: number, length, bytes

The token keeps out strangers and other deployments, but nobody who can read the network. Knows nothing of who
waits for what.
"""

from __future__ import annotations

import contextlib
import hashlib
import socket
import struct
from urllib.parse import urlsplit

from tprt.errors import TransportError

MAGIC = b"tprtstep"
VERSION = 1
HELLO = struct.Struct("<8sIqq32s")
LENGTH = struct.Struct("<I")
FRAME = struct.Struct("<QQ")
ACK = struct.Struct("<Q")
MAX_FRAME_BYTES = 1024 * 1024 * 1024

# A host that vanishes says nothing: the kernel asks after 5 s of silence and gives up 15 s later. What it has
# not taken by then has the deadline of `send`.
_KEEPALIVE_IDLE_S = 5
_KEEPALIVE_INTERVAL_S = 5
_KEEPALIVE_COUNT = 3


def pack_hello(epoch: int, rank: int, token: bytes) -> bytes:
    """Return a rank's hello; the token, of any length, goes as its digest."""
    return HELLO.pack(MAGIC, VERSION, epoch, rank, hashlib.sha256(token).digest())


def pack_answer(reason: str) -> bytes:
    """Return the writer's answer: an empty `reason` lets the rank in."""
    text = reason.encode()
    return LENGTH.pack(len(text)) + text


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of `tcp://host:port`.

    Raises:
        TransportError: it is not of that form.
    """
    with contextlib.suppress(ValueError):
        parts = urlsplit(address)
        if parts.scheme == "tcp" and parts.hostname and parts.port is not None:
            return parts.hostname, parts.port
    raise TransportError(f"address {address!r}; expected tcp://host:port, with port 0 to have one chosen")


def join_address(host: str, port: int) -> str:
    """Return `tcp://host:port`, with brackets around an IPv6 address."""
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def set_options(connection: socket.socket) -> None:
    """Send small messages at once, and notice a host that has vanished."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_IDLE_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_INTERVAL_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _KEEPALIVE_COUNT)
